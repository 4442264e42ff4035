"""Release mechanisms: the door for custom ones, per-image releases, and releases as records."""

from fedpdm.privacy.mechanism.door import (
    ReleaseMechanism,
    ReleaseSource,
    StoredRelease,
    mechanism_named,
    mechanism_of,
    recorded_mechanism,
    register,
)
from fedpdm.privacy.mechanism.gaussian import clip_l2, clip_to_grid, noised_chunks, release
from fedpdm.privacy.mechanism.images import ImageMechanism, prepared
from fedpdm.privacy.mechanism.records import (
    IMAGES,
    event_of,
    join,
    mechanism_field,
    read_release_metadata,
    recorded_event,
    release_metadata,
    released_images,
    restore_release,
    select,
)
from fedpdm.privacy.noise import NoiseSource, SeededNoise, SystemNoise

__all__ = [
    "IMAGES",
    "ImageMechanism",
    "NoiseSource",
    "ReleaseMechanism",
    "ReleaseSource",
    "SeededNoise",
    "StoredRelease",
    "SystemNoise",
    "clip_l2",
    "clip_to_grid",
    "event_of",
    "join",
    "mechanism_field",
    "mechanism_named",
    "mechanism_of",
    "noised_chunks",
    "prepared",
    "read_release_metadata",
    "recorded_event",
    "recorded_mechanism",
    "register",
    "release",
    "release_metadata",
    "released_images",
    "restore_release",
    "select",
]
