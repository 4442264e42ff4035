"""The local differential privacy mechanism: clip, noise, and the record of having done so."""

from fedpdm.privacy.mechanism.events import (
    implied_event,
    release_event,
    release_parameters,
    same_release,
)
from fedpdm.privacy.mechanism.gaussian import clip_l2, clip_to_grid, noised_chunks, release
from fedpdm.privacy.mechanism.records import (
    read_release_metadata,
    release_metadata,
    restore_release,
    select,
)
from fedpdm.privacy.noise import NoiseSource, SeededNoise, SystemNoise

__all__ = [
    "NoiseSource",
    "SeededNoise",
    "SystemNoise",
    "clip_l2",
    "clip_to_grid",
    "implied_event",
    "noised_chunks",
    "read_release_metadata",
    "release",
    "release_event",
    "release_metadata",
    "release_parameters",
    "restore_release",
    "same_release",
    "select",
]
