"""The closed forms against METHOD's figures, limits, and exact moments of whole chains."""

from __future__ import annotations

import numpy as np
import pytest

from fedpdm.diffusion.schedule import make_schedule
from fedpdm.toy import (
    coarse_weight,
    expected_w2,
    published_ratio,
    theorem_bound,
    theorem_gain,
)
from tests.support.cases import every
from tests.support.oracles import GaussianPosterior, chain_moments, trailing_levels

LINEAR = make_schedule("linear")
ABAR = LINEAR.alphas_cumprod


@pytest.mark.parametrize(
    ("sigma2", "ratio", "digits"),
    [(0.1, 0.009, 3), (1, 0.25, 2), (2, 0.44, 2), (5, 0.69, 2), (10, 0.83, 2), (100, 0.98, 2)],
)
def test_published_ratios(sigma2: float, ratio: float, digits: int) -> None:
    found = published_ratio(sigma2, num_own=20, num_all=20_000)
    assert round(found, digits) == ratio


def ratio(sigma2: float, **options: object) -> float:
    given: dict = {
        "mean": [0.0, 0.0], "variances": [1.0, 1.0], "num_own": 20, "num_all": 20_000,
        "sigma2": sigma2, "sigma2_T": 1e12, **options,
    }  # fmt: skip
    return expected_w2("pfdm", **given) / expected_w2("alone", **given)


@pytest.mark.parametrize("sigma2", [0.1, 1.0, 5.0, 100.0])
def test_closed_form_is_the_published_one_but_for_the_clients_own_share(sigma2: float) -> None:
    own_share = 2 * sigma2 / (1 + sigma2) ** 2 / 20_000 * 20
    published = published_ratio(sigma2, num_own=20, num_all=20_000)
    assert ratio(sigma2) == pytest.approx(published + own_share, rel=1e-5)


def test_limits() -> None:
    assert ratio(0.0) == pytest.approx(20 / 20_000, rel=1e-4)  # as one model on all raw data
    assert ratio(1e9) == pytest.approx(1.0, abs=1e-6)  # as training alone
    assert ratio(1.0, num_all=20) > ratio(1.0, num_all=200) > ratio(1.0, num_all=20_000)
    given: dict = {
        "mean": [3.0], "variances": [2.0], "num_own": 5, "num_all": 50, "sigma2": 1.0,
        "sigma2_T": 1e12,
    }  # fmt: skip
    assert expected_w2("alone", **given) == pytest.approx(2.0 / 5, rel=1e-4)
    assert expected_w2("central", **given) == pytest.approx(2.0 / 50, rel=1e-4)


@every("kind", ["ancestral", "flow"])
@every("t0", [93, 259, 675])
@every("variance", [0.1, 1.0, 10.0])
def test_coarse_weight_is_that_of_the_exact_chain(kind: str, t0: int, variance: float) -> None:
    """Coarse mean 1, fine mean 0: the mean after all 1000 affine steps is the weight."""
    coarse, fine = (GaussianPosterior(ABAR, [m], [[variance]]) for m in (1.0, 0.0))
    mean, _ = chain_moments(
        ABAR, trailing_levels(1000, 1000), lambda t: coarse if t > t0 else fine,
        mean=[0.0], cov=np.eye(1), stochastic=kind == "ancestral",
    )  # fmt: skip
    sigma2, sigma2_T = LINEAR.noise_to_signal(t0) ** 2, LINEAR.noise_to_signal(1000) ** 2
    w = float(coarse_weight([variance], sigma2, kind=kind)[0])
    lost = float(coarse_weight([variance], sigma2_T, kind=kind)[0])
    assert mean[0] == pytest.approx(w - lost, rel=0.01, abs=1e-3)


def test_the_flow_keeps_more_of_the_coarse_mean() -> None:
    for sigma2 in (0.5, 5.0, 50.0):
        assert ratio(sigma2, kind="flow") < ratio(sigma2)
    many = {"num_all": 10**9}
    assert 1 - ratio(1e4, **many) == pytest.approx(2e-4, rel=0.01)  # falls like 1 / sigma^2
    assert 1 - ratio(1e4, kind="flow", **many) == pytest.approx(2e-2, rel=0.01)  # like 1 / sigma


def test_concentrated_variance_gains_more() -> None:
    few = {"variances": [1.9, 0.1]}
    for kind in ("ancestral", "flow"):
        assert ratio(10.0, kind=kind, **few) < ratio(10.0, kind=kind)


def test_theorem_has_the_closed_forms_rates() -> None:
    bound = theorem_bound(2.0, dim=3, num_own=10, num_all=1000)
    assert bound == pytest.approx(9 * (2 / 8 / 1000 + 6 / 8 / 10))
    assert theorem_bound(1.0, dim=2, num_own=10, num_all=10**9) == pytest.approx(
        2 * theorem_bound(1.0, dim=2, num_own=20, num_all=10**9), rel=1e-6
    )
    # Its gain is a lower bound: the closed form's, per d / n, is at least that per d^2 / n.
    for sigma2 in (0.1, 1.0, 10.0, 1000.0):
        gain = 1 - (sigma2 / (1 + sigma2)) ** 2
        assert gain >= theorem_gain(sigma2, dim=1, num_own=1)


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="kind must be one of ancestral, flow, got 'ode'"):
        coarse_weight([1.0], 1.0, kind="ode")
    with pytest.raises(ValueError, match="sigma2 must be at least 0, got -1"):
        coarse_weight([1.0], -1, kind="flow")
    with pytest.raises(ValueError, match="method must be alone, pfdm or central, got 'both'"):
        expected_w2("both", mean=[0.0], variances=[1.0], num_own=1, num_all=1, sigma2=1, sigma2_T=1)
