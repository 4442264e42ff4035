"""What a coarse model knows, against models of which that is known."""

from __future__ import annotations

import pytest
import torch

from fedpdm.diffusion.combined import Watched
from fedpdm.diffusion.knowledge import Knowledge, release_given
from fedpdm.diffusion.objectives import NOISE_TO_NOISE, TRUNCATED, CoarseObjective
from fedpdm.diffusion.schedule import make_schedule, q_sample

CHAINS = {"truncated": TRUNCATED, "noise_to_noise": NOISE_TO_NOISE}
SCHEDULE, T0, NORM = make_schedule("linear"), 642, 8.0


def releases(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (count, 1, 4, 4) of norm `NORM`, and their releases."""
    generator = torch.Generator().manual_seed(5)
    x_0 = torch.randn(count, 1, 4, 4, generator=generator)
    x_0 *= NORM / x_0.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    z = torch.randn(x_0.shape, generator=generator)
    return x_0, q_sample(SCHEDULE, x_0, torch.full((count,), T0), noise=z)


def share(objective: CoarseObjective, clean: torch.Tensor, x_tilde: torch.Tensor) -> float:
    """Of a model that takes `clean` for the images of `x_tilde`."""
    known = Knowledge(SCHEDULE, t0=T0, clip_norm=NORM, chain=objective.chain)

    def model(x_t: torch.Tensor, t: torch.Tensor, **_: object) -> torch.Tensor:
        if objective.chain == "truncated":
            return clean
        a, b, _v = release_given(
            SCHEDULE.gather(t, x_t), SCHEDULE.alpha_bar(T0), chain=objective.chain
        )
        return a.float() * clean + b.float() * x_t

    objective.loss(
        Watched(model, lambda *seen: known.add(x_tilde, *seen)),
        SCHEDULE,
        x_tilde,
        labels=torch.zeros(len(x_tilde), dtype=torch.long),
        t0=T0,
        weighting="snr",
        timesteps="uniform",
        generator=torch.Generator().manual_seed(6),
    )
    assert known.share is not None
    return known.share


@pytest.mark.parametrize("chain", CHAINS)
def test_a_model_knows_nothing_half_or_all(chain: str) -> None:
    """Half of each image gains 1 - (1/2)^2 of what there is; the wrong image costs 3 times that."""
    x_0, x_tilde = releases(20_000)
    for factor, wanted in ((0.0, 0.0), (1.0, 1.0), (0.5, 0.75), (-1.0, -3.0)):
        got = share(CHAINS[chain], factor * x_0, x_tilde)
        assert got == pytest.approx(wanted, abs=0.06), factor
    others = share(CHAINS[chain], x_0.roll(1, 0), x_tilde)  # as wrong as can be
    assert others == pytest.approx(-1.0, abs=0.1)


def test_a_truncated_model_is_not_judged_at_t0_and_below() -> None:
    known = Knowledge(SCHEDULE, t0=T0, clip_norm=NORM, chain="truncated")
    x_0, x_tilde = releases(2)
    known.add(x_tilde, x_tilde, torch.tensor([T0, 5]), x_0)
    assert known.share is None
    known.add(x_tilde, x_tilde, torch.tensor([T0 + 100, 5]), torch.zeros_like(x_0))
    assert known.share == 0.0


def test_nothing_seen_and_unknown_chain() -> None:
    assert Knowledge(SCHEDULE, t0=T0, clip_norm=NORM, chain="truncated").share is None
    with pytest.raises(ValueError, match="chain must be one of truncated, noise_to_noise"):
        release_given(torch.tensor([0.1]), 0.3, chain="sideways")
