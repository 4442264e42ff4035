"""Release mechanisms: the door for custom ones, images, class statistics, releases as records."""

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
from fedpdm.privacy.mechanism.gradients import (
    GradientParameters,
    NoisedGradients,
    ReleasedGradient,
    largest_total,
    noised_round,
)
from fedpdm.privacy.mechanism.images import ImageMechanism, prepared
from fedpdm.privacy.mechanism.records import (
    IMAGES,
    event_of,
    group_event_of,
    join,
    mechanism_field,
    parameter_fields,
    read_release_metadata,
    recorded_event,
    release_metadata,
    released_images,
    restore_release,
    select,
)
from fedpdm.privacy.mechanism.statistics import ClassStatistics
from fedpdm.privacy.mechanism.sums import ReleasedStatistics, StatisticsParameters
from fedpdm.privacy.noise import NoiseSource, SeededNoise, SystemNoise

__all__ = [
    "IMAGES",
    "ClassStatistics",
    "GradientParameters",
    "ImageMechanism",
    "NoiseSource",
    "NoisedGradients",
    "ReleaseMechanism",
    "ReleaseSource",
    "ReleasedGradient",
    "ReleasedStatistics",
    "SeededNoise",
    "StatisticsParameters",
    "StoredRelease",
    "SystemNoise",
    "clip_l2",
    "clip_to_grid",
    "event_of",
    "group_event_of",
    "join",
    "largest_total",
    "mechanism_field",
    "mechanism_named",
    "mechanism_of",
    "noised_chunks",
    "noised_round",
    "parameter_fields",
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
