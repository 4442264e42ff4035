"""The split of points over clients, and the pairs of denoisers that sample together."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedpdm.diffusion.denoisers import DenoisingFunction
from fedpdm.diffusion.gmm import GaussianMixture
from fedpdm.diffusion.schedule import NoiseSchedule
from fedpdm.diffusion.twostage import CHAINS
from fedpdm.rng import Purpose, torch_generator
from fedpdm.toy.theory import sigma2_at

__all__ = ["METHODS", "Models", "Problem", "client_counts", "draw_clients"]

METHODS = ("alone", "pfdm", "central", "coarse")


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """A mixture, who holds how much of it, and how it is released.

    `counts` is int64 (M, K): client m's points of class k. `chain` is one of
    `fedpdm.diffusion.sampling.CHAINS`, `clip_norm` the L2 bound on a point (no shift).
    """

    mixture: GaussianMixture
    counts: torch.Tensor
    schedule: NoiseSchedule
    t0: int
    clip_norm: float
    chain: str = "truncated"

    def __post_init__(self) -> None:
        if self.counts.ndim != 2 or self.counts.shape[1] != self.mixture.num_classes:
            raise ValueError(
                f"counts must be (M, {self.mixture.num_classes}), got {tuple(self.counts.shape)}"
            )
        if bool((self.counts < 1).any()):
            raise ValueError("counts: every client needs at least one point of every class")
        if not 1 <= self.t0 < self.schedule.num_steps:
            raise ValueError(f"t0 must be in [1, {self.schedule.num_steps - 1}], got {self.t0}")
        if self.chain not in CHAINS:
            raise ValueError(f"chain must be one of {', '.join(CHAINS)}, got {self.chain!r}")

    @property
    def sigma2(self) -> float:
        """Variance of a release's noise, in units of the clean points."""
        return sigma2_at(self.schedule.alpha_bar(self.t0))


@dataclass(frozen=True, kw_only=True)
class Models:
    """The denoisers of one client's methods; see `pair`."""

    coarse: DenoisingFunction
    fine: DenoisingFunction
    central: DenoisingFunction

    def pair(self, method: str) -> tuple[DenoisingFunction | None, DenoisingFunction | None]:
        """(coarse, fine) to sample with: `alone` non-collaborative, `pfdm` coarse then fine,
        `central` one model of everybody's raw points, `coarse` the shared model to the end."""
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        return {
            "alone": (None, self.fine),
            "pfdm": (self.coarse, self.fine),
            "central": (None, self.central),
            "coarse": (self.coarse, None),
        }[method]


def client_counts(
    *, num_clients: int, num_classes: int, num_minority: int, num_all: int
) -> torch.Tensor:
    """Points per client and class, int64 (M, K): few of some classes, many of the others.

    Class k is a majority class at the clients m with m = k modulo min(M, K), which share
    what `num_minority` points at each other client leave of `num_all`. One client holds all.
    """
    if num_clients < 1 or num_minority < 1:
        raise ValueError(
            f"num_clients and num_minority must be at least 1, got {num_clients}, {num_minority}"
        )
    period = min(num_clients, num_classes)
    client = torch.arange(num_clients)[:, None] % period
    majority = client == torch.arange(num_classes)[None] % period
    holders = majority.sum(dim=0)
    left = num_all - num_minority * (num_clients - holders)
    if bool((left < holders).any()):
        raise ValueError(
            f"num_all must leave a point for each majority client, got {num_all} with "
            f"{num_clients} clients and {num_minority} minority points"
        )
    share = left // holders
    counts = torch.where(majority, share[None], num_minority)
    first = majority.to(torch.int64).argmax(dim=0)  # the remainder goes to the first holder
    counts[first, torch.arange(num_classes)] += left - share * holders
    return counts


def draw_clients(
    problem: Problem, *, replicates: int, seed: int
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(points float32 (N, 1, 1, d), labels int64 (N,)) per client, for independent replicates.

    Class k of replicate r has the label r K + k: replicates share nothing but the code's loops.
    """
    num_classes = problem.mixture.num_classes
    mixture = problem.mixture.repeated(replicates)
    clients = []
    for client, counts in enumerate(problem.counts):
        labels = torch.arange(replicates * num_classes).repeat_interleave(counts.repeat(replicates))
        generator = torch_generator(seed, Purpose.MIXTURE_POINTS, client=client)
        points = mixture.draw(labels, generator=generator)
        clients.append((points.view(-1, 1, 1, mixture.dim), labels))
    return clients
