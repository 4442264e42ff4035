"""Engines run the same client and strategy objects: in this process, or through `flwr run`."""
