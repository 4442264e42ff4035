"""Class statistics whose sums the server never sees: only the total of all clients."""

from __future__ import annotations

import math

import torch

from fedpdm import wire
from fedpdm.config import AggregationConfig
from fedpdm.privacy.estimation import pooled_directions
from fedpdm.wire.summands import SumError, SumTerms
from fedpdm.wire.totals import sum_terms, total_from, total_shapes
from fedpdm.wire.types import Phase
from strategies.gaussians import CoarseGaussians
from strategies.secure_aggregation import SecureRounds
from strategies.server_training import keep_release

__all__ = ["SecureGaussians"]


class SecureGaussians(SecureRounds, CoarseGaussians):
    """Keeps one total for each round of sums, in the place of client 0's sums."""

    @property
    def section(self) -> AggregationConfig:
        return self._setup.config.aggregation

    def is_secure(self, round: int) -> bool:
        return self.phase(round) is Phase.RELEASE

    def terms(self, num_clients: int) -> SumTerms:
        return sum_terms(num_clients)

    def shapes(self) -> list[tuple[int, ...]]:
        assert self._asked is not None
        return total_shapes(
            self._asked,
            self.section,
            image_dimensions=math.prod(self._setup.spec.shape),
            num_clients=self.num_asked,
        )

    def merge(self, round: int) -> dict[str, float]:
        """The round's total goes to disk first."""
        if self._asked is None:
            return super().merge(round)
        stage = self._asked
        p = min(stage.dimensions, math.prod(self._setup.spec.shape))
        directions = torch.zeros((0, p))
        if stage.projected:
            directions = torch.zeros((min(stage.directions, p), p))
            known = pooled_directions(self._sums("pooled")).public(stage.directions)["directions"]
            directions[: len(known)] = known
        try:
            if not self.sum:
                raise SumError("no sums to add up")
            total = total_from(
                self.sum,
                stage,
                directions,
                self.section,
                num_clients=self.num_asked,
                num_sent=len(self.counts),
                seeded=self.settings.simulation,
            )
        except SumError as error:
            raise wire.WireError(f"round {round}: {error}") from None
        self.sum = []
        keep_release(self._run, 0, total, part=stage.stage)
        return super().merge(round)
