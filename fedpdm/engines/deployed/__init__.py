"""A federation of real processes: the coordinator's and the participants' Flower programs."""
