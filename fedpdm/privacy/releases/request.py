"""What a client asks to be released, what that would do, and what is refused.

Everything here reads the ledger and the digests of released images; nothing is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fedpdm.privacy.accountant import epsilon_spent
from fedpdm.privacy.ledger import Ledger
from fedpdm.privacy.mechanism import NoiseSource, event_of, mechanism_of
from fedpdm.privacy.types import Parameters
from fedpdm.storage.files import StoreError

__all__ = ["DigestIndex", "ReleasePreview", "ReleaseRequest", "examine", "matching_releases"]

# Release number -> image digest -> row in the release's file.
DigestIndex = Mapping[int, Mapping[bytes, int]]


@dataclass(frozen=True, kw_only=True)
class ReleaseRequest:
    """What a client wants released, and what it allows.

    `parameters` are those of the round that is asked for, `planned` those of all rounds of its
    plan (default: of this one); an image takes part in each once. `public` is what the server made
    of earlier rounds. `noise` makes the noise source of the release with a given number; `delta` is
    for messages and the ledger; `allow_new_release` allows to release images once more that were
    released outside the plan, or to add images to a store that knows none of them.
    """

    client_id: int
    parameters: Parameters
    delta: float
    noise: Callable[[int], NoiseSource]
    simulation: bool
    allow_new_release: bool = False
    planned: tuple[Parameters, ...] = ()
    public: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def rounds(self) -> tuple[Parameters, ...]:
        """The parameters of all rounds of the plan."""
        return self.planned or (self.parameters,)


@dataclass(frozen=True, kw_only=True)
class ReleasePreview:
    """What a request would do: images `known` as wanted, `fresh` ones, `again` released otherwise.

    `epsilon_before` and `epsilon_after` (the whole plan) are of the image that would have paid
    most.
    """

    known: int
    fresh: int
    again: int
    epsilon_before: float
    epsilon_after: float


def matching_releases(ledger: Ledger, parameters: Parameters) -> list[int]:
    """Numbers of the releases by the same mechanism with these settings."""
    mechanism = mechanism_of(parameters)
    return [
        record.release
        for record in ledger.releases()
        if record.parameters.mechanism == parameters.mechanism
        and mechanism.same(record.parameters, parameters)
    ]


def examine(
    root: Path,
    ledger: Ledger,
    index: DigestIndex,
    digests: Sequence[bytes],
    shape: tuple[int, int, int],
    request: ReleaseRequest,
) -> ReleasePreview:
    """Sort images into known, fresh and again; `StoreError` for what the request may not do."""
    _check_owner(root, ledger, shape, request)
    records = {record.release: record for record in ledger.releases()}
    wanted = set(matching_releases(ledger, request.parameters))
    planned = {p: set(matching_releases(ledger, p)) for p in request.rounds}
    inside = set().union(*planned.values())
    known, past = 0, Counter[tuple[int, ...]]()
    for digest in set(digests):
        numbers = tuple(number for number in index if digest in index[number])
        if wanted & set(numbers):
            known += 1
        else:
            past[numbers] += 1
    events = {p: event_of(p) for p in request.rounds}
    costs = [(0.0, epsilon_spent(list(events.values()), delta=request.delta))]
    again = 0
    for numbers, count in past.items():
        before = [records[number].event for number in numbers]
        if before:
            spent = epsilon_spent(before, delta=request.delta)
            to_come = [events[p] for p in planned if planned[p].isdisjoint(numbers)]
            costs.append((spent, epsilon_spent([*before, *to_come], delta=request.delta)))
        if not inside.issuperset(numbers):
            again += count
    before_it, after_it = max(costs, key=lambda cost: cost[1])
    preview = ReleasePreview(
        known=known,
        fresh=past.total() - again,
        again=again,
        epsilon_before=before_it,
        epsilon_after=after_it,
    )
    _check_allowed(root, ledger, preview, request, strangers=past[()])
    return preview


def _check_owner(
    root: Path, ledger: Ledger, shape: tuple[int, int, int], request: ReleaseRequest
) -> None:
    """Refuse the store of another client, of images of another shape, or of a simulation."""
    if ledger.client_id not in (None, request.client_id):
        raise StoreError(
            f"{root}: is the store of client {ledger.client_id}, not of client "
            f"{request.client_id}; use a directory of its own"
        )
    for record in ledger.releases():
        if tuple(record.image_shape) != shape:
            raise StoreError(
                f"{root}: holds releases of images {tuple(record.image_shape)}, these are {shape}: "
                "a store of another data set; use another directory"
            )
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
) -> None:
    """Refuse a new release of known images, or images of which the store knows none.

    `strangers` are those that it does not know at all.
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
        raise StoreError(
            f"{root}: {preview.again} of {total} images were released before with "
            f"{_differences(records[-1].parameters, request.parameters)}; releasing them again is "
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


def _differences(old: Parameters, new: Parameters) -> str:
    """`t0 = 642 (now 675), ...` for what differs."""
    if old.mechanism != new.mechanism:
        return f"mechanism = {old.mechanism} (now {new.mechanism})"
    before, after = vars(old), vars(new)
    changed = [f"{k} = {before[k]} (now {after[k]})" for k in before if before[k] != after[k]]
    return ", ".join(changed) or "other settings in between"
