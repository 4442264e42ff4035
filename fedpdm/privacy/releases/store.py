"""Every image is released once, for ever; by a plan of several rounds once in each.

An image is known by the SHA-256 of its pixels as they came in, whatever its file's name, place or
label, and whatever a config makes of it. What the store has released is handed out again; only
images that it does not know are noised, in one more release. Another mechanism, other settings or
other pixels made of images that were released are refused: a second noising adds to what they have
spent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedpdm.data import ImageSet
from fedpdm.privacy.accountant import compose, epsilon_spent, worst
from fedpdm.privacy.ledger import START, Ledger, append
from fedpdm.privacy.mechanism import ReleaseSource, group_event_of
from fedpdm.privacy.mechanism.gradients import (
    GradientParameters,
    NoisedGradients,
    ReleasedGradient,
)
from fedpdm.privacy.releases.archive import Progress, ReleaseArchive
from fedpdm.privacy.releases.request import (
    ImageKey,
    ReleasePreview,
    ReleaseRequest,
    examine,
    matching_releases,
)
from fedpdm.privacy.releases.rounds import LastRound
from fedpdm.privacy.releases.spending import releases_of_images
from fedpdm.privacy.releases.traces import check_traces
from fedpdm.privacy.types import Parameters, PrivacyEvent, Release
from fedpdm.storage.files import StoreError, locked

__all__ = ["ReleaseStore", "SpentBudget"]


@dataclass(frozen=True, kw_only=True)
class SpentBudget:
    """Epsilon per image at `delta`: (epsilon, number of images), largest first.

    `event` is all that was done to the image that paid most (None if nothing was released),
    `releases_per_image` how often the image that was noised most often was noised. `together` has,
    for each set of releases that some image is in, what each was made with and what it cost.
    """

    delta: float
    distribution: tuple[tuple[float, int], ...]
    event: PrivacyEvent | None
    releases_per_image: int
    together: tuple[tuple[tuple[Parameters, PrivacyEvent], ...], ...]

    def group_event(self, count: int) -> PrivacyEvent | None:
        """At most what `count` images cost that are replaced together; None if nothing was
        released."""
        found = [group_event_of(each, count) for each in self.together]
        return worst(found, delta=self.delta) if found else None

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
            check_traces(self.root, ledger)
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

    def check_traces(self) -> None:
        """`StoreError` if a run in this store was answered with a ledger that is not this one."""
        check_traces(self.root, self.ledger())

    def spent(self, *, delta: float) -> SpentBudget:
        """What each image has spent so far, all its releases composed."""
        ledger = self.ledger()
        made = {each.release: (each.parameters, each.event) for each in ledger.releases()}
        touched = releases_of_images(ledger, self._archive.index(ledger))
        counts, paid = Counter[float](), []
        for numbers, count in touched.items():
            paid.append(compose([made[number][1] for number in numbers]))
            counts[epsilon_spent(paid[-1:], delta=delta)] += count
        return SpentBudget(
            delta=delta,
            distribution=tuple(sorted(counts.items(), reverse=True)),
            event=worst(paid, delta=delta) if paid else None,
            releases_per_image=max(map(len, touched), default=0),
            together=tuple(tuple(made[number] for number in numbers) for numbers in touched),
        )

    def preview(self, images: ImageSet, request: ReleaseRequest) -> ReleasePreview:
        """What `obtain` would do; `StoreError` if it would refuse. Writes nothing."""
        ledger = self.ledger()
        check_traces(self.root, ledger)
        index = self._archive.index(ledger)
        return examine(self.root, ledger, index, _keys(images), _shape(images), request)

    def obtain(
        self, images: ImageSet, request: ReleaseRequest, *, progress: Progress | None = None
    ) -> Release:
        """The release of these images, in their order, noised now where they never were.

        `StoreError` (one line, the store as it was) if that needs what the request does not allow,
        or the store is another client's, damaged, full or cannot be written.
        """
        with locked(self.root / ".release-lock"):
            ledger = self._archive.recover()
            check_traces(self.root, ledger)
            index = self._archive.index(ledger)
            keys, shape = _keys(images), _shape(images)
            examine(self.root, ledger, index, keys, shape, request)
            if not ledger.records:
                ledger = append(ledger, "opened", {"client_id": request.client_id})
            numbers = matching_releases(ledger, request.parameters, shape)
            known = {pixels for number in numbers for pixels in index[number].pixels}
            fresh = []
            for position, key in enumerate(keys):
                if key.pixels not in known:
                    fresh.append(position)
                    known.add(key.pixels)
            if fresh:
                chosen = images if len(fresh) == len(images) else images.subset(np.array(fresh))
                source = ReleaseSource(
                    images=chosen.images, labels=chosen.labels, public=request.public
                )
                new = [keys[position] for position in fresh]
                ledger = self._archive.make(ledger, source, new, request, progress)
                index = self._archive.index(ledger)
                numbers = matching_releases(ledger, request.parameters, shape)
            digests = [key.pixels for key in keys]
            return self._archive.assemble(ledger, index, numbers, digests, images.labels)

    def round(
        self,
        images: ImageSet,
        request: ReleaseRequest,
        number: int,
        make: Callable[[], ReleasedGradient],
    ) -> ReleasedGradient:
        """The message of round `number` of a plan of noised gradients, by `make` the first time.

        All rounds are paid for by all images before the first is made. Errors as of `obtain`; for
        a round that is over, or beyond the plan; and what `make` raises, when nothing was released.
        """
        plan = request.parameters
        assert isinstance(plan, GradientParameters)
        rounds = LastRound(self.root, plan)
        with locked(self.root / ".round-lock"):
            self.preview(images, request)  # refuses what `obtain` would, before anything is written
            blank = NoisedGradients().blank(plan, request.noise(0))
            recorded = matching_releases(self.ledger(), plan, _shape(images))
            rounds.begin(blank, recorded=bool(recorded))
            if not 1 <= number <= plan.rounds:
                return rounds.answer(number, make)  # refuses it
            self.obtain(images, request)
            return rounds.answer(number, make)


def _keys(images: ImageSet) -> list[ImageKey]:
    """What each image is known by; of those that came in alike the first one's pixels count."""
    first: dict[bytes, bytes] = {}
    altered = images.altered or (False,) * len(images)
    each = zip(images.image_identities(), images.image_digests(), altered, strict=True)
    return [
        ImageKey(came.tobytes(), first.setdefault(came.tobytes(), pixels.tobytes()), other)
        for came, pixels, other in each
    ]


def _shape(images: ImageSet) -> tuple[int, int, int]:
    channels, height, width = images.images.shape[1:]
    return channels, height, width
