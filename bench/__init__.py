"""Benchmarks: `python -m bench` (or `make bench`) on an otherwise idle machine."""
