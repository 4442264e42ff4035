"""Which releases each image has paid for."""

from __future__ import annotations

from collections import Counter

from fedpdm.privacy.ledger import Ledger
from fedpdm.privacy.releases.request import ReleaseIndex, cannot_tell

__all__ = ["releases_of_images"]


def releases_of_images(ledger: Ledger, index: ReleaseIndex) -> Counter[tuple[int, ...]]:
    """How many images are in exactly these releases, by their numbers.

    Rows are one image that came in alike, or of which the same pixels were noised. A release of an
    earlier version counts for an image that cannot be told from those in it.
    """
    groups = _Groups()
    for rows in index.values():
        for pixels, identity in zip(rows.pixels, rows.identities, strict=False):
            groups.join(b"pixels" + pixels, b"came in" + identity)
    held: dict[bytes, set[int]] = {}
    for number, rows in index.items():
        for pixels in rows.pixels:
            held.setdefault(groups.of(b"pixels" + pixels), set()).add(number)
    found = Counter[tuple[int, ...]]()
    for numbers, count in Counter(map(frozenset, held.values())).items():
        found[tuple(sorted(numbers | _doubtful(ledger, numbers)))] += count
    return found


def _doubtful(ledger: Ledger, numbers: frozenset[int]) -> set[int]:
    """The releases of earlier versions that may hold an image that is in releases `numbers`."""
    made = [record for record in ledger.releases() if record.release in numbers]
    return {
        old.release
        for old in ledger.releases()
        for new in made
        if new.preparation is not None and cannot_tell(old, new.image_shape, new.preparation)
    }


class _Groups:
    """Keys that belong together."""

    def __init__(self) -> None:
        self._parents: dict[bytes, bytes] = {}

    def of(self, key: bytes) -> bytes:
        """The key that stands for this one's group."""
        while (parent := self._parents.setdefault(key, key)) != key:
            key = parent
        return key

    def join(self, one: bytes, other: bytes) -> None:
        self._parents[self.of(one)] = self.of(other)
