"""What an export says of how many images of each class the client holds."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedpdm
from fedpdm.privacy import counts as counts_module
from fedpdm.privacy.counts import noised_counts
from fedpdm.publishing.export import export_pipeline
from fedpdm.storage.client_store import ClientStore
from fedpdm.storage.files import read_json
from tests.publishing.test_export import FakeRun
from tests.support.command_line import call

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)

COUNTS = [40, 3, 0, 7, 5, 1, 2, 9, 8, 25]


@pytest.fixture(scope="module")
def fake(tmp_path_factory: pytest.TempPathFactory) -> FakeRun:
    made = FakeRun(tmp_path_factory.mktemp("worth") / "run", sampling={"coarse_worth": 10.0})
    ClientStore(made.run.client_path(0)).save_class_counts(np.array(COUNTS))
    return made


def counts_of(folder: Path) -> list[float]:
    """The numbers of images per class that anybody can read off an export."""
    share = json.loads((folder / "model_index.json").read_text())["coarse_share"]
    return [10 / s - 10 for s in share[:-1]]


def test_without_noise_an_export_holds_the_counts_and_says_so(
    fake: FakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("export", fake.run.root, "--client", 0, "--out", tmp_path / "out") == 0
    assert "holds the exact numbers of its images per class" in capsys.readouterr().out
    assert counts_of(tmp_path / "out") == pytest.approx(COUNTS, abs=1e-3)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "**This export holds how many images of each class client 0 has**" in card
    assert "--counts-epsilon" in card


@pytest.mark.slow
def test_with_noise_it_holds_other_counts_and_the_same_ones_every_time(
    fake: FakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ("export", fake.run.root, "--client", 0, "--counts-epsilon")
    found = []
    for name, epsilon in (("a", 0.05), ("b", 0.05), ("c", 0.06)):
        assert call(*command, epsilon, "--out", tmp_path / name) == 0
        found.append(counts_of(tmp_path / name))
    assert "exact numbers" not in capsys.readouterr().out
    assert found[0] == found[1]  # else the mean of many exports would be the counts
    assert found[2] != found[0]
    assert sum(abs(a - b) > 0.5 for a, b in zip(found[0], COUNTS, strict=True)) >= 5
    assert all(abs(value - round(value)) < 0.01 and value > -0.01 for value in found[0])
    card = (tmp_path / "a" / "README.md").read_text()
    assert "with discrete Laplace noise: epsilon 0.05 per image for all classes" in card
    assert "This export holds" not in card
    # Other counts are drawn for anew.
    store = ClientStore(fake.run.client_path(0))
    store.save_class_counts(np.array([41, *COUNTS[1:]]))
    fedpdm.export_client(fake.run, tmp_path / "d", client=0, counts_epsilon=0.05)
    store.save_class_counts(np.array(COUNTS))
    assert counts_of(tmp_path / "d") != found[0]
    assert len(read_json(store.root / "classes-noised.json")["draws"]) == 3


def test_an_export_without_a_share_says_nothing_of_counts(tmp_path: Path) -> None:
    plain = FakeRun(tmp_path / "run")
    out = export_pipeline(plain.run, client_id=0, out=tmp_path / "out")
    assert json.loads((out / "model_index.json").read_text())["coarse_share"] is None
    assert "how many images of each class" not in (out / "README.md").read_text()
    with pytest.raises(ValueError, match=r"counts_epsilon: sampling\.coarse_worth is not set"):
        export_pipeline(plain.run, client_id=0, out=tmp_path / "b", counts_epsilon=1.0)
    assert not (tmp_path / "b").exists()


def test_an_export_does_not_carry_how_many_images_paid_what(tmp_path: Path) -> None:
    """A simulation's statement has the number of all clients' images, and places on the disk."""
    run = FakeRun(tmp_path / "run").run
    statement = run.read_json("privacy.json")
    statement |= {"epsilon_distribution": [[9.956, 36197]], "unreadable_stores": ["/home/x: gone"]}
    run.write_json("privacy.json", statement)
    out = export_pipeline(run, client_id=0, out=tmp_path / "out")
    texts = [p.read_text() for p in out.rglob("*") if p.suffix in (".json", ".md")]
    assert not [text for text in texts if "36197" in text or "/home/x" in text]
    assert len(texts) >= 5


@pytest.mark.parametrize("epsilon", [0.0, -1.0, 0.001, 21.0, math.nan, math.inf])
def test_other_epsilons_are_refused(fake: FakeRun, tmp_path: Path, epsilon: float) -> None:
    with pytest.raises(ValueError, match=r"epsilon of class counts must be in \[0\.01, 20\], got"):
        export_pipeline(fake.run, client_id=0, out=tmp_path / "out", counts_epsilon=epsilon)
    assert not (tmp_path / "out").exists()


def test_damaged_counts_are_named(fake: FakeRun, tmp_path: Path) -> None:
    shutil.copytree(fake.run.root, tmp_path / "run")
    path = tmp_path / "run" / "clients" / "0" / "classes.json"
    path.write_text(path.read_text().replace("40", "41"))
    with pytest.raises(ValueError, match=r"classes\.json: is not as it was written"):
        fedpdm.export_client(tmp_path / "run", tmp_path / "out", client=0)
    assert not (tmp_path / "out").exists()


# --- The noise ------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("epsilon", [0.5, 2.0, 5.0])
def test_noise_has_the_stated_law(epsilon: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """P(k) = (1 - p) / (1 + p) p^|k| with p = exp(-epsilon / 2), by chi-squared."""
    rng = np.random.default_rng(3)
    monkeypatch.setattr(counts_module.secrets, "randbelow", lambda n: int(rng.integers(n)))
    draws = 20_000
    found = Counter(n - 1000 for n in noised_counts([1000] * draws, epsilon=epsilon))
    p = math.exp(-epsilon / 2)
    wide = next(k for k in range(200) if 2 * p**k / (1 + p) * draws < 20)
    cells = {k: (1 - p) / (1 + p) * p ** abs(k) * draws for k in range(-wide + 1, wide)}
    rest = draws - sum(cells.values())
    chi = sum((found[k] - wanted) ** 2 / wanted for k, wanted in cells.items())
    chi += (draws - sum(found[k] for k in cells) - rest) ** 2 / rest
    degrees = len(cells)
    assert abs(chi - degrees) < 5 * math.sqrt(2 * degrees)


def test_counts_are_private_for_one_image_replaced() -> None:
    """The law's ratio for neighbours: one count less by one, another more; exp(epsilon) at most."""
    epsilon = 1.3
    p = math.exp(-epsilon / 2)
    law: Callable[[int], float] = lambda k: (1 - p) / (1 + p) * p ** abs(k)  # noqa: E731
    worst = max(
        law(a - 3) * law(b - 8) / (law(a - 4) * law(b - 7)) for a in range(20) for b in range(20)
    )
    assert worst == pytest.approx(math.exp(epsilon))


def test_no_count_is_below_zero_and_no_float_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    real = counts_module.secrets.randbelow

    def seen(n: int) -> int:
        asked.append(n)
        return real(n)

    monkeypatch.setattr(counts_module.secrets, "randbelow", seen)
    noised = noised_counts([0] * 200, epsilon=0.3)
    assert min(noised) == 0 < max(noised)
    assert all(type(n) is int for n in (*noised, *asked))
    assert {Fraction(3, 20).denominator * k for k in (1, 2)} <= set(asked)  # of 0.3 / 2, exactly
