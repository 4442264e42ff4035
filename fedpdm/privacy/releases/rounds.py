"""The rounds of a plan whose release is paid for once: each is noised once, the last is kept.

    releases/network-RUN.last     the round's number and what was sent for it

The file is there before the ledger records the plan, with round 0. A round's message is in it
before it is sent: asked for the same round again, after a crash or by a server that starts anew,
the client sends the same numbers. Earlier rounds are refused, and those that a client missed stay
missed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from fedpdm.privacy.mechanism import release_metadata, restore_release
from fedpdm.privacy.mechanism.gradients import GradientParameters, ReleasedGradient
from fedpdm.storage.files import StoreError, read_tensors, write_tensors

__all__ = ["LastRound"]


class LastRound:
    """The last noised round of a plan, in a client's store. Use under the store's lock."""

    def __init__(self, root: Path, plan: GradientParameters) -> None:
        self._path = root / "releases" / f"network-{plan.run}.last"
        self._plan = plan

    def begin(self, blank: ReleasedGradient, *, recorded: bool) -> None:
        """Before the plan is recorded: there is no round yet.

        `StoreError` if the plan is recorded already and its rounds are not known.
        """
        if self._path.exists():
            return
        if recorded:
            raise StoreError(
                f"{self._path}: is gone; rounds of this plan were noised, and noising one again "
                "would be a second release: restore it"
            )
        self._write(blank)

    def answer(self, number: int, make: Callable[[], ReleasedGradient]) -> ReleasedGradient:
        """The message of round `number` of the plan, made now if it is the first time.

        `StoreError` for a round before the last one, or beyond the plan.
        """
        if not 1 <= number <= self._plan.rounds:
            raise StoreError(
                f"{self._path}: the plan has {self._plan.rounds} rounds, all images have paid for "
                f"these and no more; asked for round {number}"
            )
        last = self._read()
        done = int(last.round)
        if number < done:
            raise StoreError(
                f"{self._path}: round {number} of the plan is over, the last was {done}; noising "
                "it again would be a second release"
            )
        if number > done:
            last = make()
            self._write(last)
        return last

    def _write(self, released: ReleasedGradient) -> None:
        metadata = release_metadata(
            released.parameters,
            released.event,
            noise_source=released.noise_source,
            seeded=released.seeded,
        )
        write_tensors(self._path, released.tensors(), metadata)

    def _read(self) -> ReleasedGradient:
        tensors, metadata = read_tensors(self._path)
        try:
            released = restore_release(tensors, metadata, check_values=False)
        except (KeyError, ValueError) as error:
            raise StoreError(f"{self._path}: {error}") from None
        if not isinstance(released, ReleasedGradient) or released.parameters.run != self._plan.run:
            raise StoreError(f"{self._path}: is of another plan; restore it")
        return released
