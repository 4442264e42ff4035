"""The diffusion core: schedule, denoisers, objectives, samplers and the training step.

It knows tensors and formulas; it knows no clients, no privacy budget and no run configuration. It
imports nothing of fedpdm; everything above may import it.
"""
