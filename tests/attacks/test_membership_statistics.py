"""Membership statistics against their formulas, in numpy, for a linear denoiser."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

from fedpdm.attacks.membership import (
    AttackTarget,
    score_clid,
    score_loss,
    score_pia,
    score_secmi,
    secmi_errors,
    secmi_levels,
)
from tests.support.membership_toys import (
    SCHEDULE,
    SHAPE,
    LinearDenoiser,
    images,
    linear_target,
    no_labels,
)

# Betas of DDPM by hand: abar[t] after t steps.
ABAR = np.concatenate([[1.0], np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))])
MEAN, VARIANCE = 0.3, 0.5
COARSE = (691, 1000)


def noise_of(
    x: np.ndarray, t: int, *, mean: float = MEAN, variance: float = VARIANCE
) -> np.ndarray:
    """eps_hat of N(mean, variance): -s times the score of N(a mean, a^2 v + s^2) at x."""
    abar = ABAR[t]
    return np.sqrt(1 - abar) * (x - np.sqrt(abar) * mean) / (abar * variance + 1 - abar)


def mix(x_0: np.ndarray, noise: np.ndarray, t: int) -> np.ndarray:
    return np.sqrt(ABAR[t]) * x_0 + np.sqrt(1 - ABAR[t]) * noise


def draws(count: int, *shape: int, seed: int) -> np.ndarray:
    generator = torch.Generator().manual_seed(seed)
    shape = shape or SHAPE
    rows = [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]
    return torch.stack(rows).numpy()


def target(t_range: tuple[int, int] = (1, 1000)) -> AttackTarget:
    return linear_target((MEAN,), variance=VARIANCE, t_range=t_range)


def flat_norm(error: np.ndarray, p: float = 2.0) -> np.ndarray:
    return (np.abs(error) ** p).sum(axis=(1, 2, 3)) ** (1 / p)


@pytest.mark.parametrize(("t_range", "used"), [((1, 1000), 200), (COARSE, 691), ((1, 150), 150)])
def test_loss_is_the_norm_of_the_error_in_the_noise(t_range: tuple[int, int], used: int) -> None:
    x = images(7, seed=0)
    scores = score_loss(
        target(t_range), x, no_labels(7), generator=torch.Generator().manual_seed(3), batch_size=3
    )
    noise = draws(7, seed=3)
    expected = -flat_norm(noise - noise_of(mix(x.numpy(), noise, used), used))
    assert scores.dtype == np.float64
    np.testing.assert_allclose(scores, expected, rtol=1e-9)
    wrong = -flat_norm(noise - noise_of(mix(x.numpy(), noise, used + 10), used + 10))
    assert np.abs(scores - wrong).max() > 1e-3  # a level off shows


def test_loss_is_the_mean_over_draws() -> None:
    x = images(5, seed=0)
    generator = torch.Generator().manual_seed(3)
    scores = score_loss(target(), x, no_labels(5), generator=generator, num_draws=3, batch_size=2)
    noise = draws(5, 3, *SHAPE, seed=3)
    each = [
        -flat_norm(noise[:, k] - noise_of(mix(x.numpy(), noise[:, k], 200), 200)) for k in range(3)
    ]
    np.testing.assert_allclose(scores, np.mean(each, axis=0), rtol=1e-9)
    with pytest.raises(ValueError, match="num_draws must be at least 1, got 0"):
        score_loss(target(), x, no_labels(5), generator=generator, num_draws=0)


def test_loss_has_the_expectation_of_the_posterior() -> None:
    """Over images of the law itself, E error^2 = d a^2 v / (a^2 v + s^2), the DDPM minimum."""
    x = MEAN + np.sqrt(VARIANCE) * images(20_000, seed=1)
    generator = torch.Generator().manual_seed(0)
    squares = score_loss(target(), x, no_labels(len(x)), generator=generator) ** 2
    signal = ABAR[200] * VARIANCE
    expected = 16 * signal / (signal + 1 - ABAR[200])
    assert abs(squares.mean() - expected) < 4.0 * squares.std() / np.sqrt(len(x))


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize(("t_range", "first", "used"), [((1, 1000), 1, 200), (COARSE, 691, 691)])
@pytest.mark.parametrize("norm", [4.0, 2.0])
def test_pia(t_range: tuple[int, int], first: int, used: int, norm: float, rescale: bool) -> None:
    x = images(5, seed=2)
    e = noise_of(np.sqrt(ABAR[first]) * x.numpy(), first)
    if rescale:
        e = e * np.sqrt(2 / np.pi) / np.abs(e).mean(axis=(1, 2, 3), keepdims=True)
    expected = -flat_norm(e - noise_of(mix(x.numpy(), e, used), used), norm)
    found = score_pia(target(t_range), x, no_labels(5), norm=norm, rescale=rescale, batch_size=2)
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_pia_starts_where_the_literature_does() -> None:
    """At the first of 1000 levels the noiseless point is the image itself, to 5e-5."""
    x = images(5, seed=2).numpy()
    e = noise_of(x, 1)  # eps_theta(x, 0) of a network that counts from 0
    expected = -flat_norm(e - noise_of(mix(x, e, 200), 200), 4.0)
    found = score_pia(target(), torch.from_numpy(x), no_labels(5))
    np.testing.assert_allclose(found, expected, rtol=1e-3)


def test_pian_of_an_answer_without_noise_is_finite() -> None:
    """Images at the mean of the denoiser: e is exactly 0, which cannot be rescaled."""
    x = torch.zeros((2, *SHAPE), dtype=torch.float64)
    scores = score_pia(linear_target((0.0,)), x, no_labels(2), rescale=True)
    np.testing.assert_array_equal(scores, 0.0)


@pytest.mark.parametrize(
    ("t_range", "t", "step", "levels"),
    [
        ((1, 1000), 100, 10, (1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100, 110)),
        ((1, 1000), 7, 3, (1, 4, 7, 10)),
        ((691, 1000), 100, 10, (691, 701)),  # below the range: from its first level
        ((1, 100), 100, 10, (1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100)),  # room for the step on
        ((1, 5), 100, 10, (1, 5)),
        ((3, 4), 100, 10, (3, 4)),
    ],
)
def test_secmi_levels(t_range: tuple[int, int], t: int, step: int, levels: tuple[int, ...]) -> None:
    assert secmi_levels(target(t_range), t=t, step=step) == levels


@pytest.mark.parametrize("t_range", [(1, 1000), COARSE])
def test_secmi_of_a_linear_model_is_a_product_of_gains(t_range: tuple[int, int]) -> None:
    """Mean 0: each DDIM step multiplies by (a_u g + s_u (1 - a g) / s), whatever the image."""

    def gain(here: int, there: int) -> float:
        a, s = np.sqrt(ABAR[here]), np.sqrt(1 - ABAR[here])
        g = a * VARIANCE / (a**2 * VARIANCE + s**2)
        return float(np.sqrt(ABAR[there]) * g + np.sqrt(1 - ABAR[there]) * (1 - a * g) / s)

    x = images(4, seed=5)
    chain = [1, *range(10, 101, 10), 110] if t_range[0] == 1 else [691, 701]
    factor = np.sqrt(ABAR[chain[0]])
    for here, there in pairwise(chain[:-1]):
        factor *= gain(here, there)
    factor *= gain(chain[-2], chain[-1]) * gain(chain[-1], chain[-2]) - 1.0
    zero_mean = linear_target((0.0,), variance=VARIANCE, t_range=t_range)
    errors = secmi_errors(zero_mean, x, no_labels(4), batch_size=3)
    np.testing.assert_allclose(errors.numpy(), factor * x.numpy(), rtol=1e-6, atol=1e-12)
    expected = -((factor * x.numpy()) ** 2).sum(axis=(1, 2, 3))
    np.testing.assert_allclose(score_secmi(zero_mean, x, no_labels(4)), expected, rtol=1e-6)


def test_secmi_asks_no_level_outside_the_range() -> None:
    for t_range in [(1, 1000), COARSE, (1, 60)]:
        denoiser = LinearDenoiser(np.zeros(1), variance=1.0)
        asked = AttackTarget(denoiser=denoiser, schedule=SCHEDULE, t_range=t_range)
        x, y, draw = images(2, seed=0), torch.zeros(2, dtype=torch.int64), torch.Generator()
        score_loss(asked, x, y, generator=draw)
        score_pia(asked, x, y)
        score_secmi(asked, x, y)
        score_clid(asked, x, y, generator=draw)
        assert t_range[0] <= min(denoiser.asked) <= max(denoiser.asked) <= t_range[1]


@pytest.mark.parametrize(("t_range", "num_draws"), [((1, 1000), 1), (COARSE, 1), (COARSE, 2)])
def test_clid_is_what_the_label_saves(t_range: tuple[int, int], num_draws: int) -> None:
    """Classes at -1 and 2; without a label the model says 0.5. Image at 2: its label helps."""
    means = (-1.0, 2.0, 0.5)
    x, labels = images(6, seed=6) + 2.0, torch.tensor([1, 1, 1, 0, 0, 0])
    labelled = linear_target(means, variance=VARIANCE, t_range=t_range)
    found = score_clid(
        labelled,
        x,
        labels,
        generator=torch.Generator().manual_seed(8),
        num_levels=4,
        num_draws=num_draws,
        batch_size=4,
    )
    span = t_range[1] - t_range[0]
    levels = [t_range[0] + (2 * i + 1) * span // 8 for i in range(4)] * num_draws
    noise = draws(6, len(levels), *SHAPE, seed=8)
    expected = np.zeros(6)
    for i, t in enumerate(levels):
        x_t = mix(x.numpy(), noise[:, i], t)
        given = np.stack(
            [noise_of(p, t, mean=means[int(k)]) for p, k in zip(x_t, labels, strict=True)]
        )
        without = noise_of(x_t, t, mean=0.5)
        expected += flat_norm(without - noise[:, i]) ** 2 - flat_norm(given - noise[:, i]) ** 2
    np.testing.assert_allclose(found, expected / len(levels), rtol=1e-7)
    if t_range[0] == 1:
        assert found[:3].min() > 0 > found[3:].max()


def test_labels_are_hidden_where_they_are_not_known() -> None:
    means, x = (-1.0, 2.0, 0.5), images(4, seed=7)
    blind = linear_target(means, labels_known=False)
    labels = torch.tensor([0, 1, 0, 1])
    unlabelled = score_pia(linear_target(means), x, no_labels(4))
    np.testing.assert_array_equal(score_pia(blind, x, labels), unlabelled)
    assert np.abs(score_pia(linear_target(means), x, labels) - unlabelled).min() > 1e-6
    with pytest.raises(ValueError, match="labels are known"):
        score_clid(blind, x, labels, generator=torch.Generator())
    with pytest.raises(ValueError, match="got NO_LABEL"):
        score_clid(linear_target(means), x, no_labels(4), generator=torch.Generator())


def test_batches_change_nothing_and_are_reported() -> None:
    x, seen = images(10, seed=9), []
    results = [
        score_loss(
            target(),
            x,
            no_labels(10),
            generator=torch.Generator().manual_seed(1),
            batch_size=size,
            progress=lambda done, total: seen.append((done, total)),
        )
        for size in (4, 10)
    ]
    np.testing.assert_allclose(results[0], results[1], rtol=1e-12)
    assert seen == [(4, 10), (8, 10), (10, 10), (10, 10)]
    other = score_loss(target(), x, no_labels(10), generator=torch.Generator().manual_seed(2))
    assert np.abs(other - results[0]).min() > 0


def test_levels_are_the_middles_of_equal_parts() -> None:
    assert target().levels(1) == (500,)
    assert target((11, 31)).levels(2) == (16, 26)
    assert target((5, 6)).levels(10) == (5,)
    assert [target(COARSE).nearest(t) for t in (1, 700, 1000)] == [691, 700, 1000]


def test_refusals_name_the_value() -> None:
    x, y = images(2, seed=0), no_labels(2)
    for t_range in [(0, 10), (5, 4), (1, 1001)]:
        with pytest.raises(ValueError, match=f"got {t_range[0]} and {t_range[1]}"):
            target(t_range)
    with pytest.raises(ValueError, match=r"2 levels, got t_range \(4, 4\)"):
        score_secmi(target((4, 4)), x, y)
    with pytest.raises(ValueError, match=r"x_0 must be floating .*torch.int64"):
        score_pia(target(), x.long(), y)
    with pytest.raises(ValueError, match=r"integers \(2,\), got torch.int64 \(1,\)"):
        score_pia(target(), x, y[:1])
    with pytest.raises(ValueError, match=r"norm must be at least 1, got 0\.5"):
        score_pia(target(), x, y, norm=0.5)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        score_pia(target(), x, y, batch_size=0)
    with pytest.raises(ValueError, match="answered NaN for 1 images"):
        score_pia(target(), torch.stack([x[0], x[1] * np.nan]), y)
