"""How good samples are: features, distances, near-copies, classifiers, and the held-out loss.

It may import `setup` and the rooms below; `reporting` and everything above may import it. `metrics`
and `features` know arrays and networks only.
"""
