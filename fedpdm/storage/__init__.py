"""Files that appear complete or not at all: tensors, a client's store, a run's directory.

It imports `config` alone; `data` and everything above may import it. It does not know what the
bytes mean: their writers decide that.
"""
