"""Every image is released once, for ever; by a plan of several rounds once in each.

An image is known by the SHA-256 of its pixels, whatever its file's name, place or label. What the
store has released is handed out again; only images that it does not know are noised, in one more
release. Another mechanism or other settings for images that were released are refused: a second
noising adds to what they have spent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedpdm.data import ImageSet
from fedpdm.privacy.accountant import compose, epsilon_spent, worst
from fedpdm.privacy.ledger import START, Ledger, append
from fedpdm.privacy.mechanism import ReleaseSource
from fedpdm.privacy.releases.archive import Progress, ReleaseArchive
from fedpdm.privacy.releases.request import (
    ReleasePreview,
    ReleaseRequest,
    examine,
    matching_releases,
)
from fedpdm.privacy.types import PrivacyEvent, Release
from fedpdm.storage.files import StoreError, locked

__all__ = ["ReleaseStore", "SpentBudget"]


@dataclass(frozen=True, kw_only=True)
class SpentBudget:
    """Epsilon per image at `delta`: (epsilon, number of images), largest first.

    `event` is all that was done to the image that paid most (None if nothing was released),
    `releases_per_image` how often the image that was noised most often was noised.
    """

    delta: float
    distribution: tuple[tuple[float, int], ...]
    event: PrivacyEvent | None
    releases_per_image: int

    @property
    def largest(self) -> float:
        """Epsilon of the image that paid most; 0 if nothing was released."""
        return self.distribution[0][0] if self.distribution else 0.0

    @property
    def images(self) -> int:
        """Number of images that were released."""
        return sum(count for _, count in self.distribution)


class ReleaseStore:
    """The releases and the ledger in one client's directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._archive = ReleaseArchive(root)

    def ledger(self) -> Ledger:
        """The ledger, checked against itself and against the files that it names; reads only."""
        return self._archive.ledger()

    def note(self, kind: str, fields: Mapping[str, Any], *, client_id: int) -> Ledger:
        """Append a record that is no release; `StoreError` if the store is another client's."""
        with locked(self.root / ".release-lock"):
            ledger = self._archive.recover()
            if ledger.client_id not in (None, client_id):
                raise StoreError(
                    f"{self.root}: is the store of client {ledger.client_id}, not of client "
                    f"{client_id}; use a directory of its own"
                )
            if not ledger.records:
                ledger = append(ledger, "opened", {"client_id": client_id})
            return append(ledger, kind, fields)

    def check_history(self, heads: Sequence[str]) -> None:
        """`StoreError` unless the ledger once ended in each of these heads."""
        ledger = self.ledger()
        known = {START, *(record.chain for record in ledger.records)}
        if any(head not in known for head in heads):
            raise StoreError(
                f"{ledger.path}: is not the ledger that earlier rounds were answered with, or was "
                "cut; noising the same images again would be a second release: restore it"
            )

    def spent(self, *, delta: float) -> SpentBudget:
        """What each image has spent so far, all its releases composed."""
        ledger = self.ledger()
        events = {record.release: record.event for record in ledger.releases()}
        touched: dict[bytes, tuple[int, ...]] = {}
        for number, known in self._archive.index(ledger).items():
            for digest in known:
                touched[digest] = (*touched.get(digest, ()), number)
        counts, paid = Counter[float](), []
        for numbers, count in Counter(touched.values()).items():
            paid.append(compose([events[number] for number in numbers]))
            counts[epsilon_spent(paid[-1:], delta=delta)] += count
        return SpentBudget(
            delta=delta,
            distribution=tuple(sorted(counts.items(), reverse=True)),
            event=worst(paid) if paid else None,
            releases_per_image=max(map(len, touched.values()), default=0),
        )

    def preview(self, images: ImageSet, request: ReleaseRequest) -> ReleasePreview:
        """What `obtain` would do; `StoreError` if it would refuse. Writes nothing."""
        ledger = self.ledger()
        index = self._archive.index(ledger)
        return examine(self.root, ledger, index, _digests(images), _shape(images), request)

    def obtain(
        self, images: ImageSet, request: ReleaseRequest, *, progress: Progress | None = None
    ) -> Release:
        """The release of these images, in their order, noised now where they never were.

        `StoreError` (one line, the store as it was) if that needs what the request does not allow,
        or the store is another client's, damaged, full or cannot be written.
        """
        with locked(self.root / ".release-lock"):
            ledger = self._archive.recover()
            index = self._archive.index(ledger)
            digests = _digests(images)
            examine(self.root, ledger, index, digests, _shape(images), request)
            if not ledger.records:
                ledger = append(ledger, "opened", {"client_id": request.client_id})
            numbers = matching_releases(ledger, request.parameters)
            known = {digest for number in numbers for digest in index[number]}
            fresh = []
            for position, digest in enumerate(digests):
                if digest not in known:
                    fresh.append(position)
                    known.add(digest)
            if fresh:
                chosen = images if len(fresh) == len(images) else images.subset(np.array(fresh))
                source = ReleaseSource(
                    images=chosen.images, labels=chosen.labels, public=request.public
                )
                new = [digests[position] for position in fresh]
                ledger = self._archive.make(ledger, source, new, request, progress)
                index = self._archive.index(ledger)
                numbers = matching_releases(ledger, request.parameters)
            return self._archive.assemble(ledger, index, numbers, digests, images.labels)


def _digests(images: ImageSet) -> list[bytes]:
    return [bytes(row) for row in images.image_digests()]


def _shape(images: ImageSet) -> tuple[int, int, int]:
    channels, height, width = images.images.shape[1:]
    return channels, height, width
