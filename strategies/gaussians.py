"""Class statistics: rounds of noised sums, and the Gaussians that the server makes of them.

The sums are kept in the run directory, a folder for each round. What clients need of earlier
rounds is computed from there when a round is asked for, so a run that goes on after a crash says
what it said before. Rounds after those of sums train fine models alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import numpy as np
from flwr.common import NDArrays, Parameters, ndarrays_to_parameters
from numpy.typing import NDArray

from fedpdm import wire
from fedpdm.privacy.components import class_mixtures, place_components, told_before
from fedpdm.privacy.estimation import (
    ClassMixtures,
    class_gaussians,
    class_means,
    pooled_directions,
)
from fedpdm.privacy.mechanism import (
    ReleasedStatistics,
    StatisticsParameters,
    mechanism_of,
    restore_release,
)
from fedpdm.privacy.mechanism.sums import STAGES
from fedpdm.setup.run_setup import RunSetup
from fedpdm.wire.totals import MOST_SUMS
from fedpdm.wire.types import Phase
from strategies.answers import ClientAnswer, encode_arrays
from strategies.coarse import CoarseStrategy, Weights
from strategies.server_training import keep_release

__all__ = ["CoarseGaussians"]


class CoarseGaussians(CoarseStrategy):
    """Its `weights` are the tensors of `ClassGaussians`; none before the sums are in."""

    has_model = False  # whose loss on held-out images could be reported

    def __init__(self, *, setup: RunSetup, announce: Callable[[str], None], **options: Any) -> None:
        super().__init__(announce=announce, **options)
        self._setup, self._announce = setup, announce
        self._planned = setup.release_plan.sums
        self._accepted: list[int] = []
        self._asked: StatisticsParameters | None = None

    def phase(self, round: int) -> Phase:
        return Phase.RELEASE if round <= len(self._planned) else Phase.FINE

    def _stage(self, round: int) -> StatisticsParameters:
        """What is asked for in this round."""
        return self._planned[round - 1]

    def _sums(self, stage: str) -> list[ReleasedStatistics]:
        """What clients have sent, in the order of their ids."""
        kept = [restore_release(*upload) for upload in self._run.load_uploads(part=stage)]
        return [each for each in kept if isinstance(each, ReleasedStatistics)]

    def fit_message(self, round: int) -> Parameters:
        """What the server has made of earlier rounds."""
        if not 2 <= round <= len(self._planned):
            return ndarrays_to_parameters(wire.encode_nothing())
        return encode_arrays(wire.encode_model(told_before(self._stage(round), self._sums)))

    def evaluation_message(self) -> Parameters:
        """The shared model after the last round; before, clients measure nothing with it."""
        last = self.rounds_done == self.settings.rounds
        return encode_arrays(wire.encode_model(self.ema) if last else wire.encode_nothing())

    def begin(self, round: int, clients: Collection[int]) -> None:
        self._accepted = []
        self._asked = self._stage(round) if self.phase(round) is Phase.RELEASE else None

    def largest_message(self, num_examples: int) -> int:
        """The tensors of at most `MOST_SUMS` sums; a sum has at least one image."""
        if self._asked is None:
            return 0
        mechanism = mechanism_of(self._asked)
        size: int = mechanism.num_bytes(self._asked, num_examples, self._setup.spec.shape)
        return size * max(0, min(num_examples, MOST_SUMS))

    def accept(self, round: int, answer: ClientAnswer, message: NDArrays) -> None:
        """Sums go to disk at once."""
        if self.phase(round) is not Phase.RELEASE:
            super().accept(round, answer, message)
            return
        client, wanted = answer.client_id, self._stage(round)
        who = f"client {client}"
        released = wire.decode_release(
            message, who=who, client_id=client, mechanism=StatisticsParameters.mechanism
        )
        if not isinstance(released, ReleasedStatistics):
            raise wire.WireError(f"release of {who}: expected class statistics")
        got, p = released.parameters, min(wanted.dimensions, math.prod(self._setup.spec.shape))
        if not mechanism_of(wanted).same(got, wanted) or released.directions.shape[2] != p:
            raise wire.WireError(f"release of {who}: made with {got}, expected {wanted}")
        if released.seeded and not self.settings.simulation:
            raise wire.WireError(f"release of {who}: its noise is seeded, outside simulation")
        images, most = int(released.counts.sum()), self.settings.max_examples
        if images < 1 or (most is not None and images > most):
            raise wire.WireError(
                f"release of {who}: sums of {images} images; must be at least 1 and at most {most}"
            )
        keep_release(self._run, client, released, part=wanted.stage)
        self._accepted.append(client)

    def abandon(self) -> None:
        if self._asked is not None:
            for client_id in self._accepted:
                self._run.drop_upload(client_id, part=self._asked.stage)

    def merge(self, round: int) -> dict[str, float]:
        """After the last round of sums: the Gaussians, of all sums that came."""
        if round != len(self._planned):
            return {}
        means, pooled = class_means(self._sums("means")), pooled_directions(self._sums("pooled"))
        if not len(pooled.directions):
            self._announce(
                "class statistics: no direction stands out of the noise at this epsilon; classes "
                "have their means and one variance"
            )
        mixtures, more = self._mixtures(self._stage(round), means.counts)
        gaussians = class_gaussians(
            means,
            pooled,
            self._sums("classes"),
            image_shape=self._setup.spec.shape,
            mixtures=mixtures,
        )
        self.weights = gaussians.tensors()
        return {
            "classes": len(gaussians.classes.unique()),
            "images": int(means.counts.sum()),
            "directions": len(pooled.directions),
            "edge": pooled.edge,
            **more,
        }

    def _mixtures(
        self, last: StatisticsParameters, counts: NDArray[np.int64]
    ) -> tuple[ClassMixtures | None, dict[str, float]]:
        """Where components lie after the `last` round of sums, and how many of those of classes
        with images stand out of the noise; nothing where a class is one Gaussian."""
        if not last.moves:
            return None, {}
        moved = place_components(last, self._sums, rounds=len(self._planned) - len(STAGES))
        seen = moved.seen[counts > 0]
        if not seen.all():
            self._announce(
                f"class statistics: {int((~seen).sum())} of {seen.size} components have fewer "
                "images than noise may show, and stay at their class's mean; fewer "
                "statistics.components, or a larger components_share, would do more"
            )
        return class_mixtures(moved), {"components": int(seen.sum())}

    def average(self, round: int) -> None:
        """There is nothing to average."""
        self.ema = dict(self.weights)

    def _restore(self, tensors: Weights) -> None:
        """All names of the checkpoint: the Gaussians' shapes depend on the sums."""
        for prefix, target in (("weights.", self.weights), ("ema.", self.ema)):
            target |= {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
