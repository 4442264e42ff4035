"""Files that appear complete or not at all: tensors, a client's store, a run's directory.

It imports `config` alone. What the bytes mean is decided by those who write them.
"""
