"""How good samples are: features, distances, near-copies, classifiers, and the held-out loss.

It imports `setup` and the rooms below. `metrics` and `features` know arrays and networks only.
"""
