"""Releases as records: written beside the values in files and messages, and read back with care."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, replace

import torch

from fedpdm.privacy.mechanism.events import implied_event
from fedpdm.privacy.noise import SeededNoise
from fedpdm.privacy.types import GaussianEvent, ReleasedDataset, ReleaseParameters

__all__ = ["read_release_metadata", "release_metadata", "restore_release", "select"]


def select(released: ReleasedDataset, indices: torch.Tensor) -> ReleasedDataset:
    """The released images at `indices` (int64 (n,)): the same release, fewer rows."""
    return replace(released, x_tilde=released.x_tilde[indices], labels=released.labels[indices])


def release_metadata(
    parameters: ReleaseParameters, event: GaussianEvent, *, noise_source: str, seeded: bool
) -> dict[str, str]:
    """What a release was made with as strings, exact to the bit (`restore_release` reads them)."""
    fields = {name: repr(value) for name, value in asdict(parameters).items()}
    fields["schedule"] = parameters.schedule
    fields["noise_multiplier"] = repr(event.noise_multiplier)
    fields["noise_source"] = noise_source
    fields["seeded"] = "true" if seeded else "false"
    return fields


def read_release_metadata(
    metadata: Mapping[str, str],
) -> tuple[ReleaseParameters, GaussianEvent]:
    """Inverse of `release_metadata`; `ValueError` if it contradicts itself.

    The event is recomputed from the parameters and must equal the recorded one, so that a file
    or message cannot claim less privacy loss than its parameters imply.
    """
    try:
        parameters = ReleaseParameters(
            t0=int(metadata["t0"]),
            clip_norm=float(metadata["clip_norm"]),
            shift=float(metadata["shift"]),
            schedule=metadata["schedule"],
            num_steps=int(metadata["num_steps"]),
            alpha_bar=float(metadata["alpha_bar"]),
            grid=int(metadata["grid"]),
        )
        recorded = float(metadata["noise_multiplier"])
        seeded = {"true": True, "false": False}[metadata["seeded"]]
        source = metadata["noise_source"]
    except (KeyError, ValueError) as error:
        raise ValueError(f"release record is incomplete or malformed: {error}") from None
    abar = parameters.alpha_bar
    if not 0.0 < abar < 1.0 or not 0.0 < parameters.clip_norm < math.inf:
        raise ValueError(
            f"release record: alpha_bar must be in (0, 1) and clip_norm positive, "
            f"got {abar} and {parameters.clip_norm}"
        )
    if not 1 <= parameters.t0 <= parameters.num_steps or not math.isfinite(parameters.shift):
        raise ValueError(
            f"release record: t0 must be in [1, {parameters.num_steps}] and shift finite, "
            f"got {parameters.t0} and {parameters.shift}"
        )
    if parameters.grid < 1:
        raise ValueError(f"release record: grid must be at least 1, got {parameters.grid}")
    implied = implied_event(parameters).noise_multiplier
    if not math.isclose(implied, recorded, rel_tol=1e-12):
        raise ValueError(
            f"release record: noise multiplier {recorded} does not follow from its "
            f"parameters ({implied})"
        )
    if seeded != (source == SeededNoise.description):
        raise ValueError(f"release record: seeded is {seeded}, but the noise is {source!r}")
    return parameters, GaussianEvent(noise_multiplier=recorded)


def restore_release(
    x_tilde: torch.Tensor,
    labels: torch.Tensor,
    metadata: Mapping[str, str],
    *,
    check_values: bool = True,
) -> ReleasedDataset:
    """A release read back from disk or wire; `ValueError` if it is malformed.

    `check_values=False` leaves out the pass over all values, for files whose checksum is known.
    """
    parameters, event = read_release_metadata(metadata)
    images_fit = x_tilde.ndim == 4 and x_tilde.dtype == torch.float32
    if not images_fit or labels.dtype != torch.int64 or labels.shape != (len(x_tilde),):
        raise ValueError(
            f"release: expected float32 (N, C, H, W) and int64 labels (N,), got {x_tilde.dtype} "
            f"{tuple(x_tilde.shape)} and {labels.dtype} {tuple(labels.shape)}"
        )
    if check_values and not all(
        bool(torch.isfinite(part).all()) for part in x_tilde.flatten().split(1 << 20)
    ):
        raise ValueError("release: values that are not finite")
    return ReleasedDataset(
        x_tilde=x_tilde,
        labels=labels,
        parameters=parameters,
        event=event,
        noise_source=metadata["noise_source"],
        seeded=metadata["seeded"] == "true",
    )
