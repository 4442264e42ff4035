"""What a client may publish: its pair of models as a diffusers pipeline, and the model card.

`pipeline` is copied into every export, so it imports nothing of fedpdm. The rest may import
`reporting` and the rooms below; `attacks`, `engines`, `commands` and `api` may import it.
"""
