"""Commands of `fedpdm` that are longer than a call; heavy modules are imported by the actions."""
