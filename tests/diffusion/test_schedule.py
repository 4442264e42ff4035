"""Schedules against diffusers and closed forms; the forward process against its marginal."""

from __future__ import annotations

import math
import re

import diffusers
import numpy as np
import pytest
import torch

from fedpdm.diffusion.names import SCHEDULE_KINDS
from fedpdm.diffusion.schedule import make_schedule, q_sample, q_sample_from
from tests.support.oracles import moments_fault


def noise_like(x: torch.Tensor, seed: int) -> torch.Tensor:
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


# --- The tables -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "theirs", "num_steps"),
    [
        ("linear", "linear", 1000),
        ("linear", "linear", 37),
        ("squared_cosine", "squaredcos_cap_v2", 1000),
        ("squared_cosine", "squaredcos_cap_v2", 50),
    ],
)
def test_alphas_cumprod_are_those_of_diffusers(kind: str, theirs: str, num_steps: int) -> None:
    schedule = make_schedule(kind, num_steps=num_steps)
    scheduler = diffusers.DDPMScheduler(
        num_train_timesteps=num_steps, beta_schedule=theirs, beta_start=1e-4, beta_end=0.02
    )
    assert schedule.num_steps == num_steps
    assert schedule.alphas_cumprod[0] == 1.0
    # Theirs is in float32: T factors of relative error 2^-24, and a last 1 - 0.999 (cosine).
    np.testing.assert_allclose(
        schedule.alphas_cumprod[1:], scheduler.alphas_cumprod.numpy(), rtol=2e-5 + num_steps * 6e-8
    )
    np.testing.assert_allclose(schedule.betas, scheduler.betas.numpy(), rtol=1e-4)


def test_linear_is_exact_in_float64() -> None:
    schedule = make_schedule("linear", num_steps=1000, beta_start=1e-4, beta_end=0.02)
    betas = [1e-4 + (0.02 - 1e-4) * k / 999 for k in range(1000)]
    for t in (0, 1, 2, 500, 690, 1000):
        expected = math.exp(math.fsum(math.log1p(-b) for b in betas[:t]))
        assert schedule.alpha_bar(t) == pytest.approx(expected, rel=1e-12)
        sigma = math.sqrt((1 - expected) / expected)
        assert schedule.noise_to_signal(t) == pytest.approx(sigma, rel=1e-11, abs=1e-12)


@pytest.mark.parametrize("num_steps", [2, 10, 200, 1000])
@pytest.mark.parametrize(("kind", "power"), [("cosine", 1), ("squared_cosine", 2)])
def test_cosines_have_their_closed_forms(kind: str, power: int, num_steps: int) -> None:
    """Nichol and Dhariwal 2021, Eq. 17, squares the cosine; `cosine` does not."""
    schedule = make_schedule(kind, num_steps=num_steps)

    def f(t: float) -> float:
        return math.cos((t / num_steps + 0.008) / 1.008 * math.pi / 2) ** power

    for t in range(num_steps):  # at T the last beta is capped at 0.999
        assert schedule.alpha_bar(t) == pytest.approx(f(t) / f(0), rel=1e-9)
    assert schedule.betas[-1] == 0.999
    assert schedule.alpha_bar(num_steps) == pytest.approx(schedule.alpha_bar(num_steps - 1) / 1e3)


def test_the_square_of_cosine_is_squared_cosine() -> None:
    plain, squared = make_schedule("cosine"), make_schedule("squared_cosine")
    np.testing.assert_allclose(
        plain.alphas_cumprod[:-1] ** 2, squared.alphas_cumprod[:-1], rtol=1e-10
    )
    assert np.abs(plain.alphas_cumprod - squared.alphas_cumprod).max() > 0.2


@pytest.mark.parametrize("kind", ["cosine", "squared_cosine"])
@pytest.mark.parametrize("num_steps", [2, 3, 1000, 1_000_000])
def test_cosines_fit_float32_at_any_length(kind: str, num_steps: int) -> None:
    schedule = make_schedule(kind, num_steps=num_steps)
    assert np.float32(schedule.alphas_cumprod[-1]) >= np.finfo(np.float32).tiny
    assert schedule.betas.min() > 0.0
    assert schedule.betas.max() == schedule.betas[-1] == 0.999  # no other beta is capped
    assert schedule.betas[-2] < 0.999
    assert (np.diff(schedule.alphas_cumprod) < 0).all()
    assert math.isfinite(schedule.noise_to_signal(num_steps))


def test_every_kind_is_made() -> None:
    assert [make_schedule(kind).kind for kind in SCHEDULE_KINDS] == list(SCHEDULE_KINDS)


@pytest.mark.parametrize("kind", SCHEDULE_KINDS)
def test_tables_are_monotone_and_cannot_be_changed(kind: str) -> None:
    schedule = make_schedule(kind, num_steps=100)
    assert (np.diff(schedule.alphas_cumprod) < 0).all()
    assert schedule.betas.shape == (100,)
    assert schedule.alphas_cumprod.shape == (101,)
    assert schedule.betas.dtype == schedule.alphas_cumprod.dtype == np.float64
    for table in (schedule.betas, schedule.alphas_cumprod):
        with pytest.raises(ValueError, match="read-only"):
            table[0] = 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"kind": "sigmoid"},
            "schedule.kind must be linear, cosine or squared_cosine, got 'sigmoid'",
        ),
        ({"num_steps": 1_000_001}, "schedule.num_steps must be at most 1000000, got 1000001"),
        ({"num_steps": 1}, "schedule.num_steps must be at least 2, got 1"),
        ({"beta_start": 0.0}, "0 < start <= end < 1, got 0.0 and 0.02"),
        ({"beta_end": 1.0}, "0 < start <= end < 1, got 0.0001 and 1.0"),
        ({"beta_start": 0.03}, "0 < start <= end < 1, got 0.03 and 0.02"),
        ({"beta_start": float("nan")}, "0 < start <= end < 1, got nan and 0.02"),
        ({"beta_start": 0.5, "beta_end": 0.9}, "alphas_cumprod falls to 0 at the last step"),
    ],
)
def test_bad_schedules_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_schedule(**{"kind": "linear", **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("t", [-1, 1001])
def test_levels_outside_the_chain_are_refused(t: int) -> None:
    schedule = make_schedule("linear")
    message = re.escape(f"t must be in [0, 1000], got {t}")
    with pytest.raises(ValueError, match=message):
        schedule.alpha_bar(t)
    with pytest.raises(ValueError, match=message):
        schedule.noise_to_signal(t)
    x = torch.zeros(2, 1, 2, 2)
    with pytest.raises(ValueError, match=re.escape("t must be in [0, 1000], got [")):
        q_sample(schedule, x, torch.tensor([5, t]), noise=x)


# --- The forward process --------------------------------------------------------------------


def test_q_sample_has_the_coefficients_of_eq_4_per_example() -> None:
    schedule = make_schedule("linear")
    t = torch.tensor([0, 1, 500, 1000])
    one = torch.ones(4, 3, 2, 2, dtype=torch.float64)
    signal = q_sample(schedule, one, t, noise=0 * one)
    spread = q_sample(schedule, 0 * one, t, noise=one)
    for row, level in enumerate(t.tolist()):
        abar = math.prod(1 - b for b in np.linspace(1e-4, 0.02, 1000)[:level])
        assert torch.allclose(signal[row], one[row] * abar**0.5, rtol=1e-12)
        assert torch.allclose(spread[row], one[row] * (1 - abar) ** 0.5, rtol=1e-10, atol=1e-12)
    x = noise_like(one.float(), 0)
    assert q_sample(schedule, x, t, noise=x).dtype == torch.float32
    assert torch.equal(q_sample(schedule, x, t, noise=x + 9)[0], x[0])  # t = 0: no noise at all


def test_q_sample_from_adds_exactly_the_missing_noise() -> None:
    schedule = make_schedule("squared_cosine", num_steps=60)
    one = torch.ones(1, 1, dtype=torch.float64)
    for s in range(0, 61, 7):
        for t in range(s, 61, 5):
            first = q_sample(schedule, 0 * one, torch.tensor([s]), noise=one)
            level = torch.tensor([t])
            carried = q_sample_from(schedule, first, s=s, t=level, noise=0 * one)
            added = q_sample_from(schedule, 0 * one, s=s, t=level, noise=one)
            clean = q_sample(schedule, one, torch.tensor([s]), noise=0 * one)
            clean = q_sample_from(schedule, clean, s=s, t=level, noise=0 * one)
            assert float(clean) ** 2 == pytest.approx(schedule.alpha_bar(t), rel=1e-12)
            variance = float(carried) ** 2 + float(added) ** 2
            assert variance == pytest.approx(1 - schedule.alpha_bar(t), rel=1e-12, abs=1e-15)


def test_two_stages_have_the_mean_and_covariance_of_the_direct_marginal() -> None:
    schedule = make_schedule("linear")
    n, s, t = 20_000, 300, 650
    x_0 = torch.tensor([2.0, -1.0, 0.5]).repeat(n, 1)
    levels = torch.full((n,), s), torch.full((n,), t)
    x_s = q_sample(schedule, x_0, levels[0], noise=noise_like(x_0, 1))
    x_t = q_sample_from(schedule, x_s, s=levels[0], t=levels[1], noise=noise_like(x_0, 2))
    abar = schedule.alpha_bar(t)
    mean, cov = abar**0.5 * x_0[0].numpy(), (1 - abar) * np.eye(3)
    assert moments_fault(x_t, mean, cov) is None
    # Planted faults: the noise of the direct marginal again, half of the noise, another level.
    again = q_sample(schedule, x_s, levels[1], noise=noise_like(x_0, 2))
    assert moments_fault(again, mean, cov) is not None
    half = q_sample_from(schedule, x_s, s=s, t=levels[1], noise=0.5 * noise_like(x_0, 2))
    assert moments_fault(half, mean, cov) is not None
    near = q_sample_from(schedule, x_s, s=s, t=levels[1] + 30, noise=noise_like(x_0, 2))
    assert moments_fault(near, mean, cov) is not None


def test_s_may_differ_per_example_and_may_equal_t() -> None:
    schedule = make_schedule("linear", num_steps=100)
    x = noise_like(torch.empty(3, 1, 4, 4), 3)
    noise = noise_like(x, 4)
    t = torch.tensor([10, 50, 100])
    assert torch.equal(q_sample_from(schedule, x, s=t, t=t, noise=noise), x)
    s = torch.tensor([0, 20, 90])
    together = q_sample_from(schedule, x, s=s, t=t, noise=noise)
    for i in range(3):
        alone = q_sample_from(
            schedule, x[i : i + 1], s=int(s[i]), t=t[i : i + 1], noise=noise[i : i + 1]
        )
        assert torch.equal(alone[0], together[i])
    assert torch.equal(together[:1], q_sample(schedule, x[:1], t[:1], noise=noise[:1]))


def test_noise_cannot_be_taken_away() -> None:
    schedule = make_schedule("linear", num_steps=100)
    x = torch.zeros(2, 1, 2, 2)
    message = "s must be at most t, got s=60, t=59"
    with pytest.raises(ValueError, match=message):
        q_sample_from(schedule, x, s=60, t=torch.tensor([80, 59]), noise=x)
    with pytest.raises(ValueError, match="s must be at most t"):
        q_sample_from(schedule, x, s=torch.tensor([5, 9]), t=torch.tensor([9, 5]), noise=x)


@pytest.mark.parametrize("levels", [[-1, 3], [5, 101], [-101]])
def test_levels_outside_the_schedule_are_named(levels: list[int]) -> None:
    schedule = make_schedule("linear", num_steps=100)
    with pytest.raises(ValueError, match=r"t must be in \[0, 100\], got \["):
        schedule.gather(torch.tensor(levels), torch.zeros(1))


def test_levels_are_looked_up_in_a_table_that_is_made_once() -> None:
    schedule = make_schedule("linear", num_steps=100)
    t = torch.tensor([0, 7, 100], dtype=torch.int32)
    abar = schedule.gather(t, torch.zeros(3, 1, 2, 2))
    assert abar.shape == (3, 1, 1, 1)
    assert abar.dtype == torch.float64
    assert abar.flatten().tolist() == schedule.alphas_cumprod[[0, 7, 100]].tolist()
    table = schedule._table(torch.device("cpu"))
    assert schedule._table(torch.device("cpu")) is table
    assert make_schedule("linear", num_steps=100)._table(torch.device("cpu")) is not table
