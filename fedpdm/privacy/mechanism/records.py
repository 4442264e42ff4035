"""Releases as records: written beside the values in files and messages, and read back with care."""

from __future__ import annotations

import dataclasses
import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from fedpdm.privacy.composition import compose
from fedpdm.privacy.mechanism.door import mechanism_of, recorded_mechanism
from fedpdm.privacy.noise import SeededNoise
from fedpdm.privacy.types import (
    Parameters,
    PrivacyEvent,
    Release,
    ReleasedDataset,
    ReleaseParameters,
)

__all__ = [
    "IMAGES",
    "event_of",
    "join",
    "mechanism_field",
    "parameter_fields",
    "read_release_metadata",
    "recorded_event",
    "release_metadata",
    "released_images",
    "restore_release",
    "select",
]

IMAGES = ReleaseParameters.mechanism


def select(released: ReleasedDataset, indices: torch.Tensor) -> ReleasedDataset:
    """The released images at `indices` (int64 (n,)): the same release, fewer rows."""
    return replace(released, x_tilde=released.x_tilde[indices], labels=released.labels[indices])


def released_images(released: Release) -> ReleasedDataset:
    """A release that must be one of images; `ValueError` for any other."""
    if not isinstance(released, ReleasedDataset):
        raise ValueError(
            f"release mechanism {released.parameters.mechanism} releases no images to train on"
        )
    return released


def join(parts: Sequence[ReleasedDataset]) -> ReleasedDataset:
    """Several clients' releases as one data set, for training; parameters are the first's."""
    return replace(
        parts[0],
        x_tilde=torch.cat([part.x_tilde for part in parts]),
        labels=torch.cat([part.labels for part in parts]),
    )


def event_of(parameters: Parameters) -> PrivacyEvent:
    """What a release with these parameters costs each image in it."""
    event: PrivacyEvent = mechanism_of(parameters).event(parameters)
    return event


def group_event_of(releases: Iterable[tuple[Parameters, PrivacyEvent]], count: int) -> PrivacyEvent:
    """At most what these releases cost `count` of a client's images that are in all of them and
    are replaced together."""
    return compose([mechanism_of(p).group_event(event, count) for p, event in releases])


def mechanism_field(parameters: Parameters) -> dict[str, str]:
    """What records say of the mechanism: nothing where it is `images`, else its name."""
    name = parameters.mechanism
    return {} if name == IMAGES else {"mechanism": name}


def parameter_fields(parameters: Parameters) -> dict[str, Any]:
    """What records say of the parameters: all fields but those that are marked `younger` (than
    records without them) and at their default."""
    return {
        each.name: getattr(parameters, each.name)
        for each in dataclasses.fields(parameters)
        if not (each.metadata.get("younger") and getattr(parameters, each.name) == each.default)
    }


def recorded_event(parameters: Parameters, record: Mapping[str, Any]) -> PrivacyEvent:
    """The event in a record of these parameters.

    `ValueError` unless it is what the parameters imply, so that a file or message cannot claim
    less privacy loss; `KeyError` for a field that is missing.
    """
    mechanism = mechanism_of(parameters)
    mechanism.check(parameters)
    implied: PrivacyEvent = mechanism.event(parameters)
    recorded = _fields_of(type(implied), record)
    for name, value in dataclasses.asdict(implied).items():
        if not math.isclose(value, recorded[name], rel_tol=1e-12):
            raise ValueError(
                f"{name.replace('_', ' ')} {recorded[name]} does not follow from its parameters "
                f"({value})"
            )
    return type(implied)(**recorded)


def _fields_of(kind: type[Any], record: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass in a record, each converted to its type; a younger one may be
    missing."""
    hints = typing.get_type_hints(kind)
    return {
        each.name: hints[each.name](record[each.name])
        for each in dataclasses.fields(kind)
        if each.name in record or not each.metadata.get("younger")
    }


def release_metadata(
    parameters: Parameters, event: PrivacyEvent, *, noise_source: str, seeded: bool
) -> dict[str, str]:
    """What a release was made with as strings, exact to the bit (`restore_release` reads them)."""
    fields = parameter_fields(parameters) | dataclasses.asdict(event)
    return {
        **mechanism_field(parameters),
        **{name: v if isinstance(v, str) else repr(v) for name, v in fields.items()},
        "noise_source": noise_source,
        "seeded": "true" if seeded else "false",
    }


def read_release_metadata(metadata: Mapping[str, str]) -> tuple[Parameters, PrivacyEvent]:
    """Inverse of `release_metadata`; `ValueError` if it contradicts itself (`recorded_event`)."""
    mechanism = recorded_mechanism(metadata.get("mechanism", IMAGES))
    try:
        parameters = mechanism.parameters(**_fields_of(mechanism.parameters, metadata))
        seeded = {"true": True, "false": False}[metadata["seeded"]]
        source = metadata["noise_source"]
    except (KeyError, ValueError) as error:
        raise ValueError(f"release record is incomplete or malformed: {error}") from None
    try:
        event = recorded_event(parameters, metadata)
    except KeyError as error:
        raise ValueError(f"release record is incomplete or malformed: {error}") from None
    except ValueError as error:
        raise ValueError(f"release record: {error}") from None
    if seeded != (source == SeededNoise.description):
        raise ValueError(f"release record: seeded is {seeded}, but the noise is {source!r}")
    return parameters, event


def restore_release(
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    *,
    check_values: bool = True,
) -> Release:
    """A release read back from disk or wire; `ValueError` if it is malformed.

    `check_values=False` leaves out the pass over all values, for files whose checksum is known.
    """
    parameters, event = read_release_metadata(metadata)
    released: Release = mechanism_of(parameters).restore(
        tensors,
        parameters=parameters,
        event=event,
        noise_source=metadata["noise_source"],
        seeded=metadata["seeded"] == "true",
        check_values=check_values,
    )
    return released
