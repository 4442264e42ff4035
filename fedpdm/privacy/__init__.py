"""The guarantee: the mechanism and its noise, accounting, the ledger, and what is promised in
words.

The mechanism and the accountant know no run configuration; `planning` and `statement` do. It
imports `data`, `diffusion`, `storage` and `config`; clients, strategies and everything above import
it.
"""
