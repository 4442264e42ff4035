"""`fedpdm privacy`: what it answers, in a terminal and as JSON, and what it refuses."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from fedpdm.diffusion.names import SCHEDULE_KINDS
from fedpdm.diffusion.schedule import make_schedule
from fedpdm.privacy.accountant import delta_spent, epsilon_bound, epsilon_spent
from fedpdm.privacy.events import release_event
from tests.support.cases import every
from tests.support.command_line import call, forget_surroundings, without_advice

LINEAR = make_schedule("linear")
USUAL = ("--epsilon", 10, "--delta", "1e-5", "--clip-norm", 10)


@pytest.fixture(autouse=True)
def _plain_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    forget_surroundings(monkeypatch, tmp_path)


class Asker:
    """Asks `fedpdm privacy`, which must answer, and say nothing on standard error."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def text(self, *arguments: Any) -> str:
        assert call("privacy", *arguments) == 0
        printed = self._capsys.readouterr()
        assert printed.err == ""
        return printed.out

    def json(self, *arguments: Any) -> dict[str, Any]:
        answer = json.loads(self.text(*arguments, "--json"))
        assert isinstance(answer, dict)
        return answer

    def refusal(self, *arguments: Any) -> str:
        assert call("privacy", *arguments) == 2
        printed = self._capsys.readouterr()
        assert printed.out == ""
        said = without_advice(printed.err)
        assert re.fullmatch(r"fedpdm: [^\n]+\n", said)
        return said


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str]) -> Asker:
    return Asker(capsys)


def test_the_papers_setting(ask: Asker) -> None:
    answer = ask.json(*USUAL)
    assert (answer["exact"]["t0"], answer["paper"]["t0"]) == (675, 693)
    assert set(answer) == {"exact", "paper", "schedule"}
    assert '"t0": 675' in ask.text(*USUAL, "--json")
    for accounting in ("exact", "paper"):
        assert answer[accounting]["epsilon"] <= 10
        assert answer[accounting]["accounting"] == accounting
        assert set(answer[accounting]) == {
            "accounting", "epsilon", "exact_epsilon", "delta", "t0", "clip_norm", "releases",
            "sigma", "signal_to_noise", "noise_multiplier", "linkage_auc", "linkage_tpr",
            "group_epsilon", "release_epsilon",
        }  # fmt: skip
    lines = ask.text(*USUAL).splitlines()
    assert any(re.fullmatch(r"t0 of 1000 +675 +693", line) for line in lines)
    assert any(re.fullmatch(r"  k = 10 +46\.058 +42\.204", line) for line in lines)
    assert any(re.fullmatch(r"  K = 4 +24\.307 +23\.091", line) for line in lines)


def test_the_third_of_any_two(ask: Asker) -> None:
    at_690 = ask.json("--t0", 690, "--clip-norm", 10)
    assert at_690["exact"]["epsilon"] == pytest.approx(8.77, abs=5e-3)
    assert at_690["paper"]["epsilon"] == pytest.approx(10.24, abs=5e-3)
    clip = ask.json("--epsilon", 10, "--t0", 690)
    for accounting, t0 in (("exact", 690), ("paper", 690)):
        found = clip[accounting]["clip_norm"]
        assert ask.json("--epsilon", 10, "--clip-norm", found)[accounting]["t0"] == t0
    assert clip["paper"]["clip_norm"] < 10 < clip["exact"]["clip_norm"]


def test_what_is_printed_can_be_used(ask: Asker) -> None:
    """A printed clip norm keeps to epsilon, and a printed epsilon is not less than is spent."""
    lines = ask.text("--epsilon", 3, "--t0", 800).splitlines()
    printed = next(line for line in lines if line.startswith("clip norm C")).split()
    exact, paper = map(float, printed[-2:])
    one = release_event(LINEAR, t0=800, clip_norm=exact)
    assert epsilon_spent([one], delta=1e-5) <= 3
    assert epsilon_spent([one], delta=1e-5) > 3 * (1 - 1e-4)
    assert epsilon_bound(release_event(LINEAR, t0=800, clip_norm=paper), delta=1e-5) <= 3
    lines = ask.text("--t0", 690, "--clip-norm", 10).splitlines()
    printed = next(line for line in lines if line.startswith("epsilon at delta")).split()
    spent = epsilon_spent([release_event(LINEAR, t0=690, clip_norm=10)], delta=1e-5)
    assert spent <= float(printed[-2]) < spent * (1 + 1e-4)


@pytest.mark.parametrize("kind", SCHEDULE_KINDS)
def test_every_schedule(kind: str, ask: Asker) -> None:
    answer = ask.json("--t0", 300, "--clip-norm", 2, "--schedule", kind, "--steps", 400)
    schedule = make_schedule(kind, num_steps=400)
    one = release_event(schedule, t0=300, clip_norm=2)
    assert answer["exact"]["epsilon"] == epsilon_spent([one], delta=1e-5)
    assert answer["exact"]["sigma"] == schedule.noise_to_signal(300)
    assert answer["schedule"] == {"kind": kind, "num_steps": 400}


def test_betas_of_the_linear_schedule(ask: Asker) -> None:
    answer = ask.json("--t0", 300, "--clip-norm", 2, "--beta-start", 1e-3, "--beta-end", 0.03)
    schedule = make_schedule("linear", beta_start=1e-3, beta_end=0.03)
    assert answer["exact"]["sigma"] == schedule.noise_to_signal(300)


def test_many_releases_and_groups_of_ones_own(ask: Asker) -> None:
    options = ("--releases", 3, "--group-sizes", "1,25")
    answer = ask.json(*USUAL, *options)
    exact = answer["exact"]
    one = release_event(LINEAR, t0=exact["t0"], clip_norm=10)
    assert epsilon_spent([one] * 3, delta=1e-5) <= 10
    assert exact["release_epsilon"].keys() == {"1", "2", "3", "4", "10"}
    assert exact["release_epsilon"]["1"] == pytest.approx(epsilon_spent([one], delta=1e-5))
    assert exact["group_epsilon"].keys() == {"1", "25"}
    wanted = epsilon_spent([one] * 75, delta=1e-5)
    assert exact["group_epsilon"]["25"] == pytest.approx(wanted)
    told = ask.text(*USUAL, *options)
    assert "3 releases of it" in told
    assert "k images in one client, replaced together, each released 3 times" in told
    assert "  k = 25 " in told


def test_the_curve(ask: Asker) -> None:
    answer = ask.json(*USUAL, "--curve", "--delta", "3e-6")
    exact = answer["exact"]
    one = release_event(LINEAR, t0=exact["t0"], clip_norm=10)
    by_delta = exact["curve"]["epsilon_at_delta"]
    deltas = [point["delta"] for point in by_delta]
    assert 3e-6 in deltas
    assert deltas == sorted(deltas, reverse=True)
    for point in by_delta:
        wanted = epsilon_spent([one], delta=point["delta"])
        assert point["epsilon"] == pytest.approx(wanted, rel=1e-12)
    by_epsilon = exact["curve"]["delta_at_epsilon"]
    assert [point["epsilon"] for point in by_epsilon] == [2.5, 5, 7.5, 10, 12.5, 15, 20]
    for point in by_epsilon:
        wanted = delta_spent([one], epsilon=point["epsilon"])
        assert point["delta"] == pytest.approx(wanted, rel=1e-12)
    at_ten = [answer[name]["curve"]["delta_at_epsilon"][3]["delta"] for name in ("exact", "paper")]
    assert max(at_ten) <= 3e-6
    told = ask.text("--t0", 690, "--clip-norm", 10, "--curve")
    assert re.search(r"^  delta 1e-05 +8\.774 +10\.243$", told, flags=re.MULTILINE)
    assert re.search(r"^  epsilon 2.1925 ", told, flags=re.MULTILINE)  # a quarter of 8.77


def test_out_of_reach_by_the_bound_alone(ask: Asker) -> None:
    """The exact accounting still has an answer, and it is given."""
    limits = ("--epsilon", 1, "--clip-norm", 20)
    answer = ask.json(*limits)
    assert answer["exact"]["t0"] == 995
    assert set(answer["paper"]) == {"accounting", "error"}
    assert "lower clip_norm to 16.06 (paper accounting)" in answer["paper"]["error"]
    told = ask.text(*limits, "--curve")
    assert f"paper bound: {answer['paper']['error']}\n" in told
    assert "995" in told


REFUSED = [
    (("--epsilon", 10), "give exactly two of epsilon, t0 and clip_norm, got epsilon"),
    ((), "give exactly two of epsilon, t0 and clip_norm, got none"),
    ((*USUAL, "--t0", 5), "got epsilon, t0, clip_norm"),
    (("--epsilon", 0.5, "--clip-norm", 30), "t0 = 1000, raise epsilon to 1.475 or lower clip_norm"),
    (("--t0", 1001, "--clip-norm", 1), "t0 must be in [1, 1000], got 1001"),
    ((*USUAL, "--steps", 1), "schedule.num_steps must be at least 2, got 1"),
    ((*USUAL, "--steps", 10**12), "schedule.num_steps must be at most 1000000"),
    ((*USUAL, "--beta-end", 2), "0 < start <= end < 1, got 0.0001 and 2.0"),
    ((*USUAL, "--delta", 0), "delta must be in (0, 1), got 0.0"),
    ((*USUAL, "--delta", "nan"), "delta must be in (0, 1), got nan"),
    (("--epsilon", "nan", "--t0", 3), "epsilon must be positive and finite, got nan"),
    ((*USUAL, "--releases", 0), "releases must be in [1, 1000000], got 0"),
    ((*USUAL, "--releases", 10**400), "releases must be in [1, 1000000], got 1000"),
    ((*USUAL, "--group-sizes", "1,two"), "--group-sizes: must be whole numbers separated by"),
    ((*USUAL, "--group-sizes", "0"), "group size must be in [1, 1000000], got 0"),
    ((*USUAL, "--shift", 0), "--shift: needs --public-sample or --picture"),
    ((*USUAL, "--resolution", 8), "--resolution: needs --public-sample or --picture"),
    ((*USUAL, "--data", "mnist"), "--data: needs --picture"),
    ((*USUAL, "--epsilons", "1"), "--epsilons: needs --picture"),
    ((*USUAL, "--num", 3), "--num: needs --picture"),
    ((*USUAL, "--clip-quantile", 0.5), "--clip-quantile: needs --public-sample"),
    ((*USUAL, "--clip-quantile", 0.5, "--public-sample", "digits"), "it or --clip-norm, not both"),
    (("--public-sample", "digits", "--clip-quantile", 2), "must be in [0, 1], got 2.0"),
    ((*USUAL, "--picture", "a.jpg"), "--picture: must end in .png, got a.jpg"),
    ((*USUAL, "--picture", "a.png", "--epsilons", "1;2"), "--epsilons: must be numbers separated"),
    ((*USUAL, "--picture", "a.png", "--num", 0), "--num: must be in [1, 64], got 0"),
    ((*USUAL, "--picture", "a.png", "--seed", -1), "--seed: must be at least 0, got -1"),
    (
        (*USUAL, "--picture", "a.png", "--resolution", 0),
        "--resolution: must be in [1, 1024], got 0",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_bad_input(arguments: tuple[Any, ...], message: str, ask: Asker) -> None:
    assert message in ask.refusal(*arguments)


@pytest.mark.parametrize("arguments", [("--schedule", "squared"), ("--epsilon", "ten")])
def test_what_the_parser_refuses(arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as caught:
        call("privacy", *arguments)
    assert caught.value.code == 2


WARNED = [
    (("--delta", 0.999), "for a client with more than 1: whoever published each image as it is"),
    (("--delta", 0.002), "for a client with more than 500: whoever"),
    (("--images", 200_000), "delta 1e-05 is above 1 / 200,000 images of a client: whoever"),
]


@every("arguments, words", WARNED)
def test_a_delta_beyond_one_image_gets_a_warning_with_the_reason(
    arguments: tuple[Any, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert call("privacy", "--epsilon", 10, "--clip-norm", 10, *arguments, "--json") == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("WARNING: --delta: delta ")
    assert words in printed.err
    assert words in json.loads(printed.out)["delta_warning"]


FINE = [(), ("--images", 100_000), ("--delta", 0.001), ("--delta", 0.1, "--images", 10)]


@every("arguments", FINE)
def test_a_delta_of_one_image_at_most_gets_none(
    arguments: tuple[Any, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert call("privacy", "--t0", 690, "--clip-norm", 10, *arguments) == 0
    assert capsys.readouterr().err == ""


def test_a_number_of_images_below_one(ask: Asker) -> None:
    assert "--images: must be at least 1, got 0" in ask.refusal(*USUAL, "--images", 0)
