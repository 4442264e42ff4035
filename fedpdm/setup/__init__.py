"""From a run configuration to the objects that do the work: models, optimisers, losses.

It imports every room below that needs a configuration explained (`data`, `privacy`, `diffusion`);
clients, strategies and commands build through it.
"""
