"""A federation of real processes: the Flower programs of the coordinator and of the nodes."""
