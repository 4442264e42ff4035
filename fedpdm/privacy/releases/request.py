"""What a client asks to be released, what that would do, and what is refused.

Everything here reads the ledger and the digests of released images; nothing is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedpdm.privacy.accountant import epsilon_spent
from fedpdm.privacy.ledger import Ledger
from fedpdm.privacy.mechanism import NoiseSource, implied_event, same_release
from fedpdm.privacy.types import ReleaseParameters
from fedpdm.storage.files import StoreError

__all__ = ["DigestIndex", "ReleasePreview", "ReleaseRequest", "examine", "matching_releases"]

# Release number -> image digest -> row in the release's file.
DigestIndex = Mapping[int, Mapping[bytes, int]]


@dataclass(frozen=True, kw_only=True)
class ReleaseRequest:
    """What a client wants released, and what it allows.

    `noise` makes the noise source of the release with a given number; `delta` is for messages and
    the ledger; `allow_new_release` allows to noise released images once more, or to add images to
    a store that knows none of them.
    """

    client_id: int
    parameters: ReleaseParameters
    delta: float
    noise: Callable[[int], NoiseSource]
    simulation: bool
    allow_new_release: bool = False


@dataclass(frozen=True, kw_only=True)
class ReleasePreview:
    """What a request would do: images `known` as wanted, `fresh` ones, `again` released otherwise.

    `epsilon_before` and `epsilon_after` are of the image that would have paid most.
    """

    known: int
    fresh: int
    again: int
    epsilon_before: float
    epsilon_after: float


def matching_releases(ledger: Ledger, parameters: ReleaseParameters) -> list[int]:
    """Numbers of the releases with these settings."""
    return [r.release for r in ledger.releases() if same_release(r.parameters, parameters)]


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
    known, past = 0, Counter[tuple[int, ...]]()
    for digest in set(digests):
        numbers = tuple(number for number in index if digest in index[number])
        if wanted & set(numbers):
            known += 1
        else:
            past[numbers] += 1
    event = implied_event(request.parameters)
    costs = [(0.0, epsilon_spent([event], delta=request.delta))]
    for numbers in past:
        before = [records[number].event for number in numbers]
        if before:
            spent = epsilon_spent(before, delta=request.delta)
            costs.append((spent, epsilon_spent([*before, event], delta=request.delta)))
    before_it, after_it = max(costs, key=lambda cost: cost[1])
    preview = ReleasePreview(
        known=known,
        fresh=past[()],
        again=past.total() - past[()],
        epsilon_before=before_it,
        epsilon_after=after_it,
    )
    _check_allowed(root, ledger, preview, request)
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
    root: Path, ledger: Ledger, preview: ReleasePreview, request: ReleaseRequest
) -> None:
    """Refuse a new release of known images, or images of which the store knows none."""
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
    if preview.fresh == total:
        raise StoreError(
            f"{root}: holds releases of {sum(r.images for r in records)} images and none of these "
            f"{total}: a store of another data set; use another directory, or add them to it "
            "(--allow-new-release)"
        )


def _differences(old: ReleaseParameters, new: ReleaseParameters) -> str:
    """`t0 = 642 (now 675), ...` for what differs."""
    before, after = vars(old), vars(new)
    changed = [f"{k} = {before[k]} (now {after[k]})" for k in before if before[k] != after[k]]
    return ", ".join(changed) or "other settings in between"
