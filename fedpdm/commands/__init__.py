"""The commands of `fedpdm`: they parse, call and print.

A command may import every room but `api`; only `fedpdm.cli` imports commands. Modules that need a
network's libraries are imported when a command acts, so that `fedpdm --help` is quick.
"""
