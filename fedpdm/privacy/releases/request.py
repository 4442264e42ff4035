"""What a client asks to be released, what that would do, and what is refused.

Everything here reads the ledger and the digests of released images; nothing is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fedpdm.privacy.accountant import epsilon_spent
from fedpdm.privacy.ledger import Ledger, ReleaseRecord
from fedpdm.privacy.mechanism import NoiseSource, event_of, mechanism_of
from fedpdm.privacy.types import Parameters
from fedpdm.storage.files import StoreError

__all__ = [
    "ImageKey",
    "ReleaseIndex",
    "ReleasePreview",
    "ReleaseRequest",
    "Rows",
    "cannot_tell",
    "examine",
    "matching_releases",
]

Shape = tuple[int, int, int]
_FILE_KEYS = ("background", "black", "white")


class ImageKey(NamedTuple):
    """What an image is known by: `identity`, the digest of its pixels as they came in, under which
    it pays, and `pixels`, the digest of what was made of them, which is noised. `altered` says
    whether earlier versions read other pixels of its file."""

    identity: bytes
    pixels: bytes
    altered: bool = False


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Which images a release holds, in the order of its rows: `pixels` maps what was noised to its
    row, `identities` are those of the images; empty in files of versions that knew none."""

    pixels: Mapping[bytes, int]
    identities: Mapping[bytes, int]


ReleaseIndex = Mapping[int, Rows]


@dataclass(frozen=True, kw_only=True)
class ReleaseRequest:
    """What a client wants released, and what it allows.

    `parameters` are those of the round that is asked for, `planned` those of all rounds of its
    plan (default: of this one); an image takes part in each once. `public` is what the server made
    of earlier rounds. `preparation` says what was done to the images since they came in. `noise`
    makes the noise source of the release with a given number; `delta` is for messages and the
    ledger; `allow_new_release` allows to release images once more that were released outside the
    plan or prepared otherwise, or to add images to a store that knows none of them.
    """

    client_id: int
    parameters: Parameters
    delta: float
    noise: Callable[[int], NoiseSource]
    simulation: bool
    allow_new_release: bool = False
    planned: tuple[Parameters, ...] = ()
    public: Mapping[str, torch.Tensor] = field(default_factory=dict)
    preparation: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rounds(self) -> tuple[Parameters, ...]:
        """The parameters of all rounds of the plan."""
        return self.planned or (self.parameters,)


@dataclass(frozen=True, kw_only=True)
class ReleasePreview:
    """What a request would do: images `known` as wanted, `fresh` ones, `again` released otherwise
    (or, in a store of an earlier version, maybe released otherwise).

    `epsilon_before` and `epsilon_after` (the whole plan) are of the image that would have paid
    most.
    """

    known: int
    fresh: int
    again: int
    epsilon_before: float
    epsilon_after: float


def matching_releases(ledger: Ledger, parameters: Parameters, shape: Shape) -> list[int]:
    """Numbers of the releases of such images by the same mechanism with these settings."""
    mechanism = mechanism_of(parameters)
    return [
        record.release
        for record in ledger.releases()
        if record.parameters.mechanism == parameters.mechanism
        and tuple(record.image_shape) == shape
        and mechanism.same(record.parameters, parameters)
    ]


def cannot_tell(record: ReleaseRecord, shape: Shape, preparation: Mapping[str, Any]) -> bool:
    """Whether images that a release does not know may be among those that it holds.

    Versions before identities knew images by what was noised, and drew colours by place. The
    release of one may hold an image that is of another shape or colour now.
    """
    drawn = preparation.get("colors_from") == "image"
    return record.preparation is None and (tuple(record.image_shape) != tuple(shape) or drawn)


def examine(
    root: Path,
    ledger: Ledger,
    index: ReleaseIndex,
    keys: Sequence[ImageKey],
    shape: Shape,
    request: ReleaseRequest,
) -> ReleasePreview:
    """Sort images into known, fresh and again; `StoreError` for what the request may not do."""
    _check_owner(root, ledger, request)
    records = {record.release: record for record in ledger.releases()}
    wanted = set(matching_releases(ledger, request.parameters, shape))
    planned = {p: set(matching_releases(ledger, p, shape)) for p in request.rounds}
    inside = set().union(*planned.values())
    doubtful = [n for n, r in records.items() if cannot_tell(r, shape, request.preparation)]
    known, past = 0, Counter[tuple[tuple[int, ...], tuple[int, ...]]]()
    for key in set(keys):
        same = tuple(n for n, rows in index.items() if key.pixels in rows.pixels)
        if wanted & set(same):
            known += 1
        else:
            held = (
                n
                for n, rows in index.items()
                if key.identity in rows.identities
                or (key.altered and records[n].preparation is None)  # it may be in there
            )
            past[tuple(sorted({*same, *held})), same] += 1
    events = {p: event_of(p) for p in request.rounds}
    costs = [(0.0, epsilon_spent(list(events.values()), delta=request.delta))]
    again, touched = 0, set[int]()
    for (numbers, same), count in past.items():
        before = [records[number].event for number in numbers or doubtful]
        if before:
            spent = epsilon_spent(before, delta=request.delta)
            to_come = [events[p] for p in planned if planned[p].isdisjoint(same)]
            costs.append((spent, epsilon_spent([*before, *to_come], delta=request.delta)))
        if before and (not numbers or numbers != same or not inside.issuperset(numbers)):
            again += count
            touched.update(numbers or doubtful)
    before_it, after_it = max(costs, key=lambda cost: cost[1])
    preview = ReleasePreview(
        known=known,
        fresh=past.total() - again,
        again=again,
        epsilon_before=before_it,
        epsilon_after=after_it,
    )
    _check_allowed(
        root,
        ledger,
        preview,
        request,
        strangers=past[(), ()],
        unsure=past[(), ()] if doubtful else 0,
        differences=_differences(records[max(touched)], request, shape) if touched else "",
    )
    return preview


def _check_owner(root: Path, ledger: Ledger, request: ReleaseRequest) -> None:
    """Refuse the store of another client, or of a simulation."""
    if ledger.client_id not in (None, request.client_id):
        raise StoreError(
            f"{root}: is the store of client {ledger.client_id}, not of client "
            f"{request.client_id}; use a directory of its own"
        )
    for record in ledger.releases():
        if record.seeded and not request.simulation:
            raise StoreError(
                f"{root}: release {record.release} was made with seeded noise in a simulation and "
                "protects from nobody who knows the seed; use another directory"
            )


def _check_allowed(
    root: Path,
    ledger: Ledger,
    preview: ReleasePreview,
    request: ReleaseRequest,
    *,
    strangers: int,
    unsure: int,
    differences: str,
) -> None:
    """Refuse a new release of known images, or images of which the store knows none.

    `strangers` are those that it does not know at all, `unsure` those of them that a release of an
    earlier version may hold, `differences` is how those `again` were released.
    """
    records, total = ledger.releases(), preview.known + preview.fresh + preview.again
    if preview.known < total and request.simulation and not all(r.seeded for r in records):
        raise StoreError(
            f"{root}: is a deployed client's store; a simulation's seeded noise may not be added "
            "to it; use another directory"
        )
    if request.allow_new_release or not records:
        return
    if preview.again:
        were = "may have been" if unsure == preview.again else "were"
        raise StoreError(
            f"{root}: {preview.again} of {total} images {were} released before with "
            f"{differences}; releasing them again is "
            f"a new release and takes their epsilon from {preview.epsilon_before:.4g} to "
            f"{preview.epsilon_after:.4g} at delta {request.delta:g}: restore the old setting, or "
            "allow it (--allow-new-release)"
        )
    if strangers == total:
        raise StoreError(
            f"{root}: holds releases of {sum(r.images for r in records)} images and none of these "
            f"{total}: a store of another data set; use another directory, or add them to it "
            "(--allow-new-release)"
        )


def _differences(record: ReleaseRecord, request: ReleaseRequest, shape: Shape) -> str:
    """`t0 = 642 (now 675), data.coloring = none (now by_label), ...` for what differs."""
    old, new = record.parameters, request.parameters
    if old.mechanism != new.mechanism:
        return f"mechanism = {old.mechanism} (now {new.mechanism})"
    changed = [*_changed(vars(old), vars(new))]
    made = record.preparation or {}
    if record.preparation is not None:  # keys of files are recorded where they are set
        made = {key: None for key in _FILE_KEYS if key in request.preparation} | dict(made)
    changed += [f"data.{each}" for each in _changed(made, request.preparation)]
    if tuple(record.image_shape) != shape:
        old_shape, new_shape = ("x".join(map(str, each)) for each in (record.image_shape, shape))
        changed.append(f"shape = {old_shape} (now {new_shape})")
    drawn = request.preparation.get("colors_from") == "image"
    if not changed and record.preparation is None and drawn:
        changed.append("colours by place, as earlier versions drew them (now by image)")
    elif not changed and "files" in request.preparation and "files" not in made:
        changed.append("orientation and transparency left aside, as earlier versions did (now not)")
    return ", ".join(changed) or "other pixels or settings in between"


def _changed(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterable[str]:
    return (f"{k} = {old[k]} (now {new.get(k)})" for k in old if old[k] != new.get(k))
