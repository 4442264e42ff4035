"""Denoisers made of denoisers, against rows asked one by one and a sampler written out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedpdm.diffusion.combined import (
    Guided,
    HandOver,
    ImagesFromReleases,
    Mixed,
    Unclipped,
    Unlabelled,
    Watched,
)
from fedpdm.diffusion.denoisers import NO_LABEL, Denoiser, DenoiserSpec, DenoisingFunction
from fedpdm.diffusion.gmm import GaussianMixture, MixtureDenoiser
from fedpdm.diffusion.presets import PRESETS
from fedpdm.diffusion.sampling import sample
from fedpdm.diffusion.schedule import make_schedule
from fedpdm.diffusion.twostage import SamplerSettings, refine, sample_two_stage, stages
from tests.support.toys import seeded

# diffusers' solver under numpy 2.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

T, T0, K = 40, 24, 3
SCHEDULE = make_schedule("linear", num_steps=T, beta_start=0.004, beta_end=0.3)
ABAR = SCHEDULE.alphas_cumprod
LABELS = torch.tensor([0, 2, NO_LABEL, 1, 1])
SHARE = torch.tensor([1.0, 0.3, 0.0, 0.65], dtype=torch.float64)


def network(role: str) -> Denoiser:
    spec = DenoiserSpec(
        preset=PRESETS["nano"], resolution=8, channels=1, num_classes=K, prediction="v",
        knows_clipping=role == "fine",
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7 if role == "coarse" else 8)
        return Denoiser(spec, SCHEDULE).eval()


@pytest.fixture(scope="module")
def networks() -> tuple[Denoiser, Denoiser]:
    return network("coarse"), network("fine")


def by_hand(
    coarse: Denoiser, fine: Denoiser, share: torch.Tensor | None, guidance: float
) -> Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]:
    """x0_hat of one image at a time, every case an `if`."""

    def one(model: Denoiser, x: torch.Tensor, t: int, label: torch.Tensor) -> torch.Tensor:
        flag = torch.tensor([False]) if model is fine else None
        level = torch.tensor([t])
        answer = model(x, level, labels=label, clipped=flag)
        if guidance == 1.0:
            return answer
        null = model(x, level, labels=torch.tensor([NO_LABEL]), clipped=flag)
        return guidance * answer + (1.0 - guidance) * null

    def ask(x: torch.Tensor, t: int, labels: torch.Tensor) -> torch.Tensor:
        answers = []
        for row, label in enumerate(labels.tolist()):
            given = x[row : row + 1], t, labels[row : row + 1]
            if t <= T0:
                answers.append(one(fine, *given))
            elif share is None:
                answers.append(one(coarse, *given))
            else:
                w = float(share[K if label == NO_LABEL else label])
                answers.append(w * one(coarse, *given) + (1.0 - w) * one(fine, *given))
        return torch.cat(answers)

    return ask


def ancestral(
    ask: Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    labels: torch.Tensor,
    start: int,
    generator: torch.Generator,
) -> torch.Tensor:
    """DDPM's sampler (Ho et al. 2020, Eq. 7), every level from `start` on."""
    for t in range(start, 0, -1):
        beta, abar, before = SCHEDULE.betas[t - 1], ABAR[t], ABAR[t - 1]
        mean = (
            before**0.5 * beta * ask(x, t, labels) + (1.0 - beta) ** 0.5 * (1.0 - before) * x
        ) / (1.0 - abar)
        x = mean
        if t > 1:
            noise = torch.randn(x.shape, generator=generator)
            x = mean + ((1.0 - before) / (1.0 - abar) * beta) ** 0.5 * noise
    return x


def straight(
    ask: Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    labels: torch.Tensor,
    start: int,
) -> torch.Tensor:
    """DDIM (Song et al. 2021, Eq. 12 with no noise), every level from `start` on."""
    for t in range(start, 0, -1):
        x0_hat = ask(x, t, labels)
        noise = (x - ABAR[t] ** 0.5 * x0_hat) / (1.0 - ABAR[t]) ** 0.5
        x = ABAR[t - 1] ** 0.5 * x0_hat + (1.0 - ABAR[t - 1]) ** 0.5 * noise
    return x


# --- The sampler against one written out ----------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("share", [None, SHARE], ids=["handed over", "mixed"])
@torch.no_grad()
def test_samples_are_those_of_a_loop_written_out(
    networks: tuple[Denoiser, Denoiser], share: torch.Tensor | None, guidance: float
) -> None:
    x_T = torch.randn((5, 1, 8, 8), generator=seeded(1))
    ask = by_hand(*networks, share, guidance)
    settings: dict[str, Any] = {"schedule": SCHEDULE, "t0": T0, "num_steps": T}
    settings |= {"guidance": guidance, "coarse_share": share}

    def drawn(scheduler: str, **other: Any) -> torch.Tensor:
        given = SamplerSettings(**{**settings, "scheduler": scheduler, **other})
        return sample_two_stage(*networks, x_T, given, labels=LABELS, generator=seeded(2)).images

    expected = straight(ask, x_T, LABELS, T)
    torch.testing.assert_close(drawn("ddim"), expected, rtol=1e-3, atol=1e-3)
    expected = ancestral(ask, x_T, LABELS, T, seeded(2))
    torch.testing.assert_close(drawn("ddpm"), expected, rtol=1e-3, atol=1e-3)
    for fault in ({"t0": T0 - 4}, {"guidance": guidance + 0.5}):
        assert not torch.allclose(drawn("ddpm", **fault), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.slow
@torch.no_grad()
def test_two_chains_are_two_loops_written_out(networks: tuple[Denoiser, Denoiser]) -> None:
    coarse, fine = networks
    x_T, generator = torch.randn((5, 1, 8, 8), generator=seeded(1)), seeded(2)
    settings = SamplerSettings(
        schedule=SCHEDULE, t0=T0, chain="noise_to_noise", num_steps=T + T0, scheduler="ddpm"
    )

    def only(model: Denoiser) -> Callable[[torch.Tensor, int, torch.Tensor], torch.Tensor]:
        return lambda x, t, y: model(x, torch.full((len(x),), t), labels=y)

    x_tilde = ancestral(only(coarse), x_T, LABELS, T, generator)
    expected = ancestral(only(fine), x_tilde, LABELS, T0, generator)
    output = sample_two_stage(coarse, fine, x_T, settings, labels=LABELS, generator=seeded(2))
    torch.testing.assert_close(output.images, expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(output.images, x_tilde, rtol=1e-2, atol=1e-2)
    refined = refine(fine, x_tilde, settings, t=T0, labels=LABELS, generator=seeded(3))
    expected = ancestral(only(fine), x_tilde, LABELS, T0, seeded(3))
    torch.testing.assert_close(refined, expected, rtol=1e-3, atol=1e-3)


# --- Who is asked what ----------------------------------------------------------------------


class Recorder:
    """Answers `value`, plus the label where it is told one; keeps what it was asked."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.asked: list[tuple[list[int], list[int], list[bool] | None]] = []

    def __call__(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        *,
        labels: torch.Tensor,
        clipped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        flags = None if clipped is None else clipped.tolist()
        self.asked.append((t.tolist(), labels.tolist(), flags))
        told = self.value + torch.where(labels == NO_LABEL, 0, labels)
        return told.view(-1, 1).expand_as(x_t).to(x_t.dtype)


def answers(denoiser: DenoisingFunction, levels: list[int], labels: list[int]) -> list[float]:
    x_t = torch.zeros(len(levels), 2)
    answer = denoiser(x_t, torch.tensor(levels), labels=torch.tensor(labels))
    assert answer.shape == x_t.shape
    assert torch.equal(answer[:, 0], answer[:, 1])
    return answer[:, 0].tolist()


def test_a_model_is_asked_about_its_own_rows_only() -> None:
    above, below = Recorder(10.0), Recorder(-10.0)
    both = HandOver(above, below, 5)
    assert answers(both, [6, 5, 9, 1], [0, 1, 2, NO_LABEL]) == [10.0, -9.0, 12.0, -10.0]
    assert above.asked == [([6, 9], [0, 2], None)]
    assert below.asked == [([5, 1], [1, NO_LABEL], None)]
    above.asked.clear()
    assert answers(both, [6, 7], [0, 0]) == [10.0, 10.0]
    assert answers(both, [4, 5], [0, 0]) == [-10.0, -10.0]
    assert (len(above.asked), len(below.asked)) == (1, 2)
    flags = torch.tensor([True, False, True])
    both(torch.zeros(3, 2), torch.tensor([9, 1, 2]), labels=torch.zeros(3).long(), clipped=flags)
    assert (above.asked[-1][2], below.asked[-1][2]) == ([True], [False, True])


def test_each_class_has_its_own_level() -> None:
    level = torch.tensor([3, 6, 0, 9])  # the last is for no label
    both = HandOver(Recorder(10.0), Recorder(-10.0), level)
    labels = [0, 1, 2, NO_LABEL]
    assert answers(both, [5] * 4, labels) == [10.0, -9.0, 12.0, -10.0]
    assert answers(both, [3] * 4, labels) == [-10.0, -9.0, 12.0, -10.0]
    assert answers(both, [10] * 4, labels) == [10.0, 11.0, 12.0, 10.0]


def test_labels_are_passed_or_not() -> None:
    fine = Recorder(0.0)
    both = HandOver(Recorder(100.0), Unlabelled(fine), 5)
    assert answers(both, [9, 1], [2, 2]) == [102.0, 0.0]
    assert fine.asked == [([1], [NO_LABEL], None)]
    assert answers(HandOver(Unlabelled(fine), fine, 5), [9, 1], [2, 2]) == [0.0, 2.0]


def test_shares_guidance_and_flags() -> None:
    first, second = Recorder(8.0), Recorder(-2.0)
    shares = torch.tensor([1.0, 0.5, 0.0, 0.25])
    mixed = answers(Mixed(first, second, shares), [7] * 4, [0, 1, 2, NO_LABEL])
    assert mixed == [8.0, 0.5 * 9.0 + 0.5 * -1.0, 0.0, 0.25 * 8.0 + 0.75 * -2.0]
    first.asked.clear()
    assert answers(Guided(first, 2.5), [7, 7], [2, NO_LABEL]) == [8.0 + 2.5 * 2.0, 8.0]
    assert first.asked == [([7] * 4, [2, NO_LABEL, NO_LABEL, NO_LABEL], None)]
    assert answers(Guided(first, 1.0), [7], [2]) == [10.0]
    assert len(first.asked[-1][0]) == 1
    answers(Guided(Unclipped(first), 2.0), [7, 7], [0, 1])
    assert first.asked[-1][2] == [False] * 4
    seen: list[tuple[float, int, float]] = []
    watched = Watched(
        first, lambda x, t, a: seen.append((float(x[0, 0]), int(t[0]), float(a[0, 0])))
    )
    assert answers(watched, [7], [2]) == [10.0]
    assert seen == [(0.0, 7, 10.0)]


def test_a_client_without_a_model_has_one_stage() -> None:
    one, two = Recorder(0.0), Recorder(1.0)
    for chain in ("truncated", "noise_to_noise"):
        settings = SamplerSettings(schedule=SCHEDULE, t0=T0, chain=chain, num_steps=16)
        (alone,) = stages(None, one, settings)
        assert (alone.denoiser, alone.start, alone.num_steps, alone.scale) == (one, T, 16, 1.0)
        (shared,) = stages(two, None, settings)
        assert (shared.denoiser, shared.start) == (two, T)
        with pytest.raises(ValueError, match="sample needs a coarse or a fine denoiser"):
            stages(None, None, settings)
    first, second = stages(two, one, settings)
    assert (first.start, first.num_steps, second.start, second.num_steps) == (T, 10, T0, 6)
    assert first.scale == pytest.approx(ABAR[T0] ** 0.5)


# --- Closed forms in a model's place --------------------------------------------------------


@pytest.mark.slow
def test_a_gaussian_above_and_another_below_take_their_places() -> None:
    """Exact denoisers of one distribution, wherever handed over, draw that distribution."""
    schedule = make_schedule("linear")
    mixture = GaussianMixture(
        means=torch.tensor([[2.0, 0.0], [-2.0, 1.0]], dtype=torch.float64),
        variances=torch.tensor([[0.3, 1.0], [0.5, 0.2]], dtype=torch.float64),
    )
    exact, n = MixtureDenoiser(mixture, schedule), 4000
    labels = torch.arange(2).repeat_interleave(n)
    x_T = torch.randn((2 * n, 2), generator=seeded(3))

    def drawn(denoiser: DenoisingFunction) -> torch.Tensor:
        return sample(
            denoiser, x_T, labels=labels, schedule=schedule, generator=seeded(4), num_steps=100
        )

    whole = drawn(exact)
    torch.testing.assert_close(drawn(HandOver(exact, exact, torch.tensor([150, 400, 1]))), whole)
    for label in range(2):
        points = whole[labels == label].double()
        assert torch.allclose(points.mean(0), mixture.means[label], atol=0.08)
        assert torch.allclose(points.var(0), mixture.variances[label], rtol=0.12, atol=0)
    # Below t = 150 the label hardly matters to what is near one of the components.
    unlabelled = drawn(HandOver(exact, Unlabelled(exact), 150))
    assert float((unlabelled - whole).abs().max()) > 1e-3
    for label in range(2):
        points = unlabelled[labels == label].double()
        assert torch.allclose(points.mean(0), mixture.means[label], atol=0.1)
    # A planted fault: labels dropped everywhere, and both classes are the mixture.
    lost = drawn(Unlabelled(exact))
    assert not torch.allclose(lost[labels == 0].double().mean(0), mixture.means[0], atol=0.5)


def test_images_from_releases_passes_labels_on() -> None:
    coarse = Recorder(0.0)
    x_t = torch.randn((3, 2), generator=seeded(0))
    t = torch.tensor([30, 35, 40])
    answer = ImagesFromReleases(coarse, SCHEDULE, T0)(x_t, t, labels=torch.tensor([2, 0, -1]))
    assert coarse.asked[0][1] == [2, 0, -1]
    levels = [int(np.abs(ABAR[1:] - ABAR[k] / ABAR[T0]).argmin()) + 1 for k in (30, 35, 40)]
    assert coarse.asked[0][0] == levels
    assert answer.dtype == torch.float32
