"""Flower strategies and the server app: only the shared coarse model is aggregated.

`coarse.CoarseStrategy` is the base of every strategy, also of one in another package. It may
import Flower, `reporting` and the rooms below, never `clients`. `engines` and Flower's own loader
(`server_app`) import it.
"""
