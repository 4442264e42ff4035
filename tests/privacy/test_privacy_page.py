"""The figures of docs/privacy.md, against the formulas."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
from scipy import optimize, stats

PAGE = Path(__file__).resolve().parents[2] / "docs" / "privacy.md"


def delta_of(epsilon: float, mu: float) -> float:
    """The analytic Gaussian mechanism (Balle and Wang 2018, Theorem 8)."""
    normal = stats.norm
    tail = math.exp(normal.logcdf(-mu / 2 - epsilon / mu) + epsilon)
    return float(normal.cdf(mu / 2 - epsilon / mu)) - tail


def mu_of(epsilon: float, delta: float = 1e-5) -> float:
    if epsilon == 0:
        return 0.0
    return float(optimize.brentq(lambda mu: delta_of(epsilon, mu) - delta, 1e-2, 50.0))


def epsilon_of(mu: float, delta: float = 1e-5) -> float:
    return float(optimize.brentq(lambda e: delta_of(e, mu) - delta, 1e-3, 200.0))


def rows() -> list[tuple[str, ...]]:
    found = re.findall(
        r"^\| (\d+) \| ([\d.]+)% \| ([\d.]+) \| ([\d.]+)% \|$", PAGE.read_text(), flags=re.M
    )
    assert len(found) == 4
    return found


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"epsilon {row[0]}")
def test_what_an_observer_can_do(row: tuple[str, ...]) -> None:
    epsilon, right, auc, found = (float(cell) for cell in row)
    mu = mu_of(epsilon)
    assert right == pytest.approx(100 * stats.norm.cdf(mu / 2), abs=0.05)
    assert auc == pytest.approx(stats.norm.cdf(mu / math.sqrt(2)), abs=5e-4)
    assert found == pytest.approx(100 * stats.norm.cdf(stats.norm.ppf(0.01) + mu), abs=0.05)


def test_several_releases_and_several_images() -> None:
    text = " ".join(PAGE.read_text().split())
    mu = mu_of(10.0)
    assert epsilon_of(mu * math.sqrt(2)) == pytest.approx(15.5, abs=0.05)
    assert epsilon_of(mu * math.sqrt(10)) == pytest.approx(46.2, abs=0.05)
    assert "two images of a person have epsilon 15.5, ten have 46.2" in text
    assert "two releases at epsilon 10 cost 15.5 together, ten cost 46.2" in text


def test_what_the_sampler_adds_to_delta() -> None:
    assert (1 + math.exp(10)) * 1e4 * 2.0**-110 < 1e-24
    assert "below 1e-24 at epsilon 10" in PAGE.read_text()
