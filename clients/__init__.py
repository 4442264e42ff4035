"""Flower clients: decode a message, call fedpdm, encode the answer.

All state of a client is in its store, so its object is made anew for every message. It may
import Flower, `deployment`, `reporting` and the rooms below, never `strategies`. `attacks`,
`engines` and Flower's own loader (`client_app`) import it.
"""
