"""What is said of the shared model: what it knows, with a line that explains it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedpdm.engines.deployed.status import describe
from fedpdm.reporting.page.reading import read_run
from fedpdm.reporting.page.tables import comparison_charts, run_charts, summary_rows
from fedpdm.reporting.run_files import summarise
from fedpdm.reporting.shared_words import EXPLANATION, percent, shared_words
from fedpdm.storage.run_directory import RunDirectory
from strategies.answers import ClientAnswer, heldout_metrics, mean_metrics, round_line
from strategies.roster import ServerSettings
from strategies.rounds import RoundBook
from tests.support.reports import made_run, records
from tests.support.strategy_fakes import evaluation

KNOWN = {"coarse_known": 0.3125, "heldout_coarse_known": -0.2}
LOSSES = {"coarse_loss": 1.00049, "heldout_coarse_loss": 0.9998}
TRAFFIC = {"images_per_second": 9.0, "bytes_down": 1_000_000, "bytes_up": 2_000_000}


def known_run(folder: Path) -> RunDirectory:
    """A finished run whose rounds say what the model knows."""
    run = RunDirectory(made_run(folder))
    rounds = [{**record, **KNOWN} for record in records(3)]
    run.write_json("metrics.json", {"rounds": rounds, "final": {"clients": [], **LOSSES, **KNOWN}})
    return run


def test_a_round_says_what_is_known_instead_of_a_loss_that_does_not_move() -> None:
    assert shared_words({**LOSSES, **KNOWN}) == ["shared model knows 31.2%", "held-out -20.0%"]
    assert shared_words(LOSSES) == ["coarse loss 1.0005", "held-out 0.9998"]  # of raw images
    assert shared_words({"fine_loss": 1.0}) == []
    record = {"round": 2, **LOSSES, **KNOWN, **TRAFFIC, "fine_loss": 0.5}
    line = round_line(record, rounds=3, seconds_left=7.0)
    assert line.startswith("round 2/3  shared model knows 31.2%  held-out -20.0%  fine loss 0.5000")


def test_it_is_explained_once() -> None:
    said: list[str] = []
    settings = ServerSettings(
        rounds=2,
        min_clients=1,
        fraction_fit=1.0,
        on_failure="raise",
        evaluate_every=1,
        ema_decay=0.9,
        seed=0,
    )
    book = RoundBook(settings, said.append)
    for round in (1, 2):
        book.begin(round)
        answer = ClientAnswer(client_id=0, num_examples=10, metrics={**LOSSES, **KNOWN})
        book.close(round, [answer], [], {})
        book.tell()
    assert [line.split("  ")[0] for line in said] == ["round 1/2", EXPLANATION, "round 2/2"]


def test_clients_count_by_their_images_and_one_may_say_nothing() -> None:
    metrics: list[dict[str, Any]] = [{"coarse_known": 0.1}, {"coarse_known": 0.4}, {}]
    answers = [
        ClientAnswer(client_id=k, num_examples=10 * (k + 1), metrics=m)
        for k, m in enumerate(metrics)
    ]
    assert mean_metrics(answers, seconds=1.0)["coarse_known"] == pytest.approx(0.3)
    results = [evaluation(k, 1.0 + k, 10 * (k + 1)) for k in range(3)]
    said = [{"heldout_coarse_known": 0.1}, {"heldout_coarse_known": 0.4}, {}]
    means = heldout_metrics(list(zip(results, said, strict=True)))
    assert means["heldout_coarse_known"] == pytest.approx(0.3)
    assert means["heldout_coarse_loss"] == pytest.approx((10 + 40 + 90) / 60)
    assert heldout_metrics([(results[0], {})]) == {"heldout_coarse_loss": 1.0}


def test_the_summary_and_the_report_say_it_too(tmp_path: Path) -> None:
    run = known_run(tmp_path / "run")
    run.write_json("privacy.json", {"baseline": "x", "guarantee": "none", "words": "w"})
    told = summarise(run)
    assert "Shared model  knows -20.0% of held-out images" in told
    assert EXPLANATION in told
    assert "1.0005" not in told
    facts = read_run(run.root)
    assert ("the shared model knows of held-out images", "-20.0%") in summary_rows(facts)
    charts = {chart.title: chart for chart in run_charts(facts)}
    assert charts["Losses"].columns == ["round", "fine models, training"]
    known = charts["What the shared model knows of images"]
    assert known.note == EXPLANATION
    assert known.rows[0] == ["1", "31.25", "-20"]
    titles = [chart.title for chart in comparison_charts([facts, facts], ["a", "b"])]
    assert titles == [
        "What the shared model knows of noised training images",
        "What the shared model knows of noised held-out images",
        "Fine models, training",
        "Sent so far",
    ]


def test_the_coordinators_status_says_it() -> None:
    progress = {"rounds_done": 1, "rounds": 2, "seconds": 3.0, "failed": [], "finished": False}
    progress |= {**TRAFFIC, **LOSSES, **KNOWN}
    run = {"run_id": "7", "status": "running", "out": "x", "progress": progress}
    status = {"running": False, "fleet": "f", "control": "c", "nodes": [], "runs": [run]}
    assert "round 1 of 2, shared model knows 31.2%, held-out -20.0%, 1.0 MB" in describe(status)


@pytest.mark.parametrize(
    ("share", "words"),
    [(0.157, "15.7%"), (-0.02, "-2.0%"), (1.0, "100.0%"), (1.616, "unclear"), (-3.0, "unclear")],
)
def test_what_no_model_can_know_is_not_shown_as_a_share(share: float, words: str) -> None:
    assert percent(share).startswith(words)
