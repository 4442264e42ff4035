"""Random streams, one per purpose, client and round.

Every stream derives from `SeedSequence(seed, spawn_key=(purpose, client, round, chunk))`
(numpy's documented way to independent streams), so the same seed repeats a run exactly and each
component changes the draw. The noise of a private release does *not* come from here outside
simulation: see `fedpdm.privacy.mechanism`.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np
import torch

__all__ = ["Purpose", "numpy_rng", "seed_sequence", "torch_generator"]


class Purpose(IntEnum):
    """What a stream is for. Numbers are part of the reproducibility contract: never reuse one."""

    PARTITION = 0
    HOLDOUT = 1
    RELEASE_NOISE = 2
    COARSE_INIT = 3
    FINE_INIT = 4
    COARSE_TRAINING = 5
    FINE_TRAINING = 6
    SAMPLING = 7
    EVALUATION = 8
    CLIENT_SELECTION = 9
    SERVER_TRAINING = 10
    MIXTURE_POINTS = 11
    ROUNDING = 12
    FEATURE_NETWORK = 13
    DOWNSTREAM = 14
    CHOICE = 15
    COMPONENTS = 16
    GRADIENT_NOISE = 17
    GRADIENT_SAMPLES = 18
    GRADIENT_DRAWS = 19


def seed_sequence(
    seed: int, purpose: Purpose, *, client: int = 0, round: int = 0, chunk: int = 0
) -> np.random.SeedSequence:
    """The `SeedSequence` of one stream. `ValueError` for a negative component."""
    for name, value in (("seed", seed), ("client", client), ("round", round), ("chunk", chunk)):
        if value < 0:
            raise ValueError(f"{name} must be at least 0, got {value}")
    return np.random.SeedSequence(seed, spawn_key=(int(purpose), client, round, chunk))


def numpy_rng(
    seed: int, purpose: Purpose, *, client: int = 0, round: int = 0, chunk: int = 0
) -> np.random.Generator:
    """A numpy generator for the stream."""
    return np.random.default_rng(
        seed_sequence(seed, purpose, client=client, round=round, chunk=chunk)
    )


def torch_generator(
    seed: int,
    purpose: Purpose,
    *,
    client: int = 0,
    round: int = 0,
    chunk: int = 0,
    device: torch.device | str = "cpu",
) -> torch.Generator:
    """A torch generator for the stream, seeded with 64 bits of its `SeedSequence`."""
    sequence = seed_sequence(seed, purpose, client=client, round=round, chunk=chunk)
    state = sequence.generate_state(1, np.uint64)[0]
    return torch.Generator(device=device).manual_seed(int(state) & 0x7FFF_FFFF_FFFF_FFFF)
