"""Flower clients: decode a message, call fedpdm, encode the answer."""
