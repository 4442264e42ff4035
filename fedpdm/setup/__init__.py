"""From a run configuration to the objects of the run: schedule, models, optimisers, losses.

It may import `wire` and the rooms below; everything above builds its objects here.
"""
