"""A participant's own side of a real federation: policy, acceptance, certificates, node checks.

It imports `setup`, `privacy`, `data` and `storage`. Clients ask it before they answer; the
processes themselves are started by `engines`.
"""
