"""A participant's own side of a real federation: policy, acceptance, certificates, node checks.

It imports `setup`, `privacy`, `data` and `storage`. `clients` ask it before they answer, and
`engines` start the processes.
"""
