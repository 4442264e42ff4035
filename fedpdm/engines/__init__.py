"""Engines run the same client and strategy objects.

`inprocess` runs them one after the other in this process, `flower` through `flwr run` in Ray,
`deployed` as the real processes of a federation. With `clients` and `strategies` it is the only
room that imports Flower. `commands` and `api` import it.
"""
