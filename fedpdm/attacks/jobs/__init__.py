"""Attacks on the models of a finished simulation, or on any diffusers U-Net.

`plan` lists the attacks, `running` runs them and keeps each result, `report` writes the summary.
The mathematics is in `fedpdm.attacks`.
"""
