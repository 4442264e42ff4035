"""Flower strategies and the server app: only the shared coarse model is aggregated."""
