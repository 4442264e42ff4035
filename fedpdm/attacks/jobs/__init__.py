"""Attacks on the models of a finished simulation, or on any diffusers U-Net.

`plan` lists what is to be done, `running` does it and keeps each result, `report` writes the
summary. The mathematics is in `fedpdm.attacks`.
"""
