"""The HTML page: complete, true to the run's files, self-contained, readable by machines."""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import json
import math
import platform
import re
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedpdm.config import ConfigError
from fedpdm.evaluation.synthesis import open_synthesizer
from fedpdm.reporting.page import read_run
from fedpdm.reporting.page.charts import Series, line_chart
from fedpdm.reporting.page.pictures import embed_file
from fedpdm.storage.files import StoreError
from tests.support.command_line import CONFIG, call, without_advice
from tests.support.reports import PRIVACY, Page, made_attacks, made_run, page_of, records

HOSTILE = "\"><script>alert(1)<img src=x onerror=alert(2)> '`{{ 7*7 }}"


def picture_of(uri: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.split(",", 1)[1]))))


@pytest.fixture(scope="module")
def trained(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with models, and attacks in it."""
    out = tmp_path_factory.mktemp("report") / "trained"
    shutil.copytree(finished_run, out)
    made_attacks(out / "attacks")
    return out


@pytest.fixture(scope="module")
def page(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    """It and another one, side by side."""
    other = made_run(tmp_path_factory.mktemp("report") / "other", name="other")
    return page_of(trained, other)


# Self-contained and readable.


@pytest.mark.slow
def test_nothing_is_fetched(page: Page) -> None:
    for tag, attributes, _ in page.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster", "xlink:href"):
            if (value := attributes.get(name)) is not None:
                assert value.startswith(("data:", "#")), (tag, value[:80])
    assert "@import" not in page.html
    assert "url(" not in page.html
    assert not re.search(r"https?://", page.html)


def test_only_this_script_may_run(page: Page) -> None:
    (policy,) = [a["content"] for t, a, _ in page.elements if a.get("http-equiv")]
    assert "default-src 'none'" in policy
    (script,) = [text for tag, _, text in page.elements if tag == "script"]
    digest = base64.b64encode(hashlib.sha256("".join(script).encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in policy


def test_every_picture_has_words_and_a_size(page: Page) -> None:
    pictures = page.all("img")
    assert len(pictures) > 10
    for _, attributes, _ in pictures:
        assert len(attributes["alt"]) > 10
        shape = picture_of(attributes["src"]).shape
        assert (str(shape[1]), str(shape[0])) == (attributes["width"], attributes["height"])
    for tag, attributes, _ in page.all("svg"):
        labelled = attributes.get("role") == "img" and len(attributes.get("aria-label", "")) > 10
        assert labelled or attributes.get("aria-hidden") == "true", tag


def test_headings_and_anchors_are_in_order(page: Page) -> None:
    levels = [int(tag[1]) for tag, _, _ in page.all("h1", "h2", "h3", "h4", "h5", "h6")]
    assert levels.count(1) == 1
    assert levels[0] == 1
    assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
    ids = [a["id"] for _, a, _ in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    links = [a["href"] for t, a, _ in page.elements if t == "a"]
    assert links
    assert {link.removeprefix("#") for link in links} <= set(ids)
    named = [a["aria-labelledby"] for _, a, _ in page.elements if "aria-labelledby" in a]
    assert named
    assert set(named) <= set(ids)


def test_tables_and_controls_say_what_they_are(page: Page) -> None:
    assert all(attributes.get("scope") for _, attributes, _ in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    for _, attributes, _ in page.elements:
        if "scroll" in attributes.get("class", "").split():  # reachable by keyboard
            assert attributes["tabindex"] == "0"
            assert attributes["aria-label"]
    labels = [text for tag, _, text in page.all("label")]
    assert len(labels) == len(page.all("input")) == 1
    assert labels == ["Step"]
    assert all(text for _, _, text in page.all("button"))
    html = next(a for t, a, _ in page.elements if t == "html")
    assert html["lang"] == "en"
    assert page.all("title")[0][2]


# True to the run.


def test_a_page_of_one_run_has_every_part(trained: Path) -> None:
    page = page_of(trained, films=False)
    privacy = json.loads((trained / "privacy.json").read_text())
    assert f"epsilon = {privacy['epsilon']:.4g} at delta = 1e-05" in page.text
    assert "THIS IS A SIMULATION." in page.text
    ledger = page.table("Ledgers")
    assert [row[0] for row in ledger[1:]] == ["0", "1"]
    split = page.table("Images per client and class")
    recorded = json.loads((trained / "partition.json").read_text())["clients"]
    assert [row[1:-1] for row in split[1:]] == [[str(n) for n in c["per_class"]] for c in recorded]
    metrics = json.loads((trained / "metrics.json").read_text())
    released = [str(c["num_released"]) for c in metrics["rounds"][0]["clients"]]
    assert [row[2] for row in ledger[1:]] == released
    known = page.table("What the shared model knows of images")
    assert known[1][1] == f"{100 * metrics['rounds'][0]['coarse_known']:.5g}"
    losses = page.table("Losses")
    assert losses[1][1] == f"{metrics['rounds'][0]['fine_loss']:.5g}"
    final = metrics["final"]["clients"][0]
    distances = page.table("Distances and class fidelity")
    at = distances[0].index("distance, coarse, then fine")
    row = next(row for row in distances if row[0] == "client 0, majority")
    assert row[at] == f"{final['majority_pfdm_frechet']:.4g}"
    assert ["privacy.clip_norm", "8.0"] in page.table("config.yaml; in bold")
    assert f"The run was made with python {platform.python_version()}, fedpdm" in page.text


def test_the_film_ends_with_what_the_client_samples(trained: Path) -> None:
    page = page_of(trained, client=1, seed=4)
    frames = [a for t, a, _ in page.elements if t == "li" and "data-words" in a]
    words = [a["data-words"] for a in frames]
    assert words[0].startswith("Step 0 of 2, t = 1000: the coarse model works")
    assert words[-1] == "Step 2 of 2, t = 0: finished"
    assert any("the fine model works" in text for text in words)
    finished = next(a for _, a, _ in page.all("img") if a["alt"].startswith("Finished: 8 images"))
    pixels = picture_of(finished["src"])
    labels = np.linspace(0, 9, 8).round().astype(np.int64)
    wanted = open_synthesizer(read_run(trained).run, 1).sample(labels, seed=4)
    tiles = [pixels[:, 9 * k : 9 * k + 8] for k in range(8)]
    assert np.array_equal(np.stack(tiles), wanted.transpose(0, 2, 3, 1))


@pytest.mark.slow
def test_attack_results(trained: Path, tmp_path: Path) -> None:
    page = page_of(trained, films=False)
    row = page.table("Membership")[1]
    assert row == ["coarse", "PIA", "51.2 (49.0 to 53.4)", "51.2 (49.0 to 53.4)", "53.0",
                   "51.2 (49.0 to 53.4)", "51.2 (49.0 to 53.4)", "321"]  # fmt: skip
    assert "copies: 0 of 1000 samples flagged" in page.text
    rows = page.table("best guess")
    assert dict(zip(*rows, strict=True)) == {
        "attacker": "global", "recovery": "0.875", "identification in class rate": "0.125",
        "identification in class chance": "0.0625",
    }  # fmt: skip
    red = [a for _, a, _ in page.all("img") if "attacks: roc coarse" in a["alt"]]
    assert picture_of(red[0]["src"]).shape == (20, 30, 3)
    elsewhere = made_attacks(tmp_path / "x", what="From elsewhere.")
    assert "From elsewhere." in page_of(trained, attacks=elsewhere, films=False).text
    none = page_of(made_run(tmp_path / "none"), films=False)
    assert "No attack results are here." in none.text
    with pytest.raises(ConfigError, match=r"holds no attacks\.json; fedpdm attack RUN makes it"):
        read_run(trained, attacks=tmp_path)


def test_pictures_of_attacks_come_from_their_folder_alone(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run")
    Image.new("RGB", (3, 3)).save(tmp_path / "outside.png")
    (tmp_path / "secret.png").write_text("no picture")
    names = ["../outside.png", str(tmp_path / "outside.png"), "secret.png", "missing.png"]
    folder = made_attacks(tmp_path / "attacks", pictures=names)
    (folder / "secret.png").write_text("no picture")
    page = page_of(run, attacks=folder, films=False)
    assert not [a for _, a, _ in page.all("img") if "attacks:" in a["alt"]]
    assert embed_file(tmp_path / "secret.png", alt="x") is None


@pytest.mark.slow
def test_runs_side_by_side(tmp_path: Path) -> None:
    one = made_run(tmp_path / "a", name="one", privacy={**PRIVACY, "epsilon": 3.125})
    two = made_run(tmp_path / "b", name="two", fine={"lr": 0.125}, sampling={"num_steps": 7})
    page = page_of(one, two, films=False)
    table = {row[0]: row[1:] for row in page.table("What the runs are")}
    assert table["epsilon"] == ["3.125", "7.25"]
    assert table["sent, MB"] == ["12.0", "12.0"]
    assert table["distance, minority, coarse, then fine"] == ["7.5", "7.5"]
    settings = {row[0]: row[1:] for row in page.table("Settings in which they differ")[1:]}
    assert settings == {
        "name": ["one", "two"],
        "fine.lr": ["0.002", "0.125"],
        "sampling.num_steps": ["3", "7"],
    }
    again = page_of(one, one, films=False)
    assert "Their settings are the same." in again.text
    labels = [text for _, _, text in again.all("h2")]
    assert len(set(labels)) == 3


def test_an_unfinished_run_and_one_that_has_hardly_begun(tmp_path: Path) -> None:
    page = page_of(made_run(tmp_path / "a", rounds=2, finished=False, samples=False))
    assert "This run has not finished: 2 of 3 rounds are done." in page.text
    assert "There is no privacy statement yet" in page.text
    assert "No samples were kept" in page.text
    assert "Nothing was sampled for this report: the run has not finished." in page.text
    bare = made_run(tmp_path / "b", finished=False, samples=False)
    for name in ("metrics.json", "partition.json"):
        (bare / name).unlink()
    text = page_of(bare).text
    assert "No round is recorded yet." in text
    assert "The split is not recorded here" in text


def test_a_finished_run_without_models_says_so(tmp_path: Path) -> None:
    page = page_of(made_run(tmp_path / "run"))
    assert "Nothing was sampled for this report: run: this run has not finished" in page.text
    assert str(tmp_path) not in page.html


@pytest.mark.slow
def test_a_baseline_and_a_deployment(tmp_path: Path) -> None:
    baseline = {"baseline": "none", "guarantee": "nothing is sent", "epsilon": 0.0, "delta": 1e-5,
                "simulation": True, "words": "Each client trains alone."}  # fmt: skip
    page = page_of(
        made_run(tmp_path / "a", privacy=baseline, coarse={"training": "none"}), films=False
    )
    assert "This run is a baseline. Each client trains alone." in page.text
    assert "Ledgers" not in page.text
    raw = {**baseline, "baseline": "raw", "epsilon": None}
    page = page_of(made_run(tmp_path / "c", privacy=raw, coarse={"images": "raw"}), films=False)
    assert "no bound" in [text for _, _, text in page.all("dd")]
    there = made_run(tmp_path / "b", run={"rounds": 3, "simulation": False}, samples=False,
                     privacy={**PRIVACY, "simulation": False, "ledger_heads": {}})  # fmt: skip
    (there / "partition.json").unlink()
    page = page_of(there, films=False)
    assert "in a deployment each client keeps its own" in page.text
    assert "THIS IS A SIMULATION" not in page.text


# Hostile words and damaged files.


@pytest.mark.slow
def test_hostile_words_stay_words(tmp_path: Path) -> None:
    run = made_run(tmp_path / "run", classes=[HOSTILE] * 10,
                   privacy={**PRIVACY, "guarantee": HOSTILE, "does_not_protect": [HOSTILE],
                            "ledger_heads": {"0": HOSTILE}})  # fmt: skip
    (run / "versions.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    folder = made_attacks(tmp_path / "attacks", what=HOSTILE)
    record = json.loads((folder / "attacks.json").read_text())
    for attack in record["attacks"]:
        attack.update(name=HOSTILE, target=HOSTILE, title=HOSTILE, group=HOSTILE)
        if "headline" in attack:
            attack["headline"] = HOSTILE
    (folder / "attacks.json").write_text(json.dumps(record))
    page = page_of(run, run, attacks=folder, films=False)
    assert len(page.all("script")) == 1
    assert not any(name.startswith("on") for _, a, _ in page.elements for name in a)
    assert not any(a.get("src") == "x" for _, a, _ in page.elements)
    assert page.text.count(" ".join(HOSTILE.split())) > 20
    assert any(HOSTILE in a.get("alt", "") for _, a, _ in page.all("img"))


def test_nothing_is_hidden_or_turned_round(tmp_path: Path) -> None:
    """What HTML's own escapes leave: text in the other direction, of no width, or of control."""
    words = "a\u202eb\u2066c\u200bd\u2028e\x1bf\ufeffg"
    told = {**PRIVACY, "guarantee": words, "does_not_protect": [words]}
    run = made_run(tmp_path / "run", classes=[words] * 10, privacy=told)
    (run / "versions.json").write_text(json.dumps({words: words}))
    folder = made_attacks(tmp_path / "attacks", what=words)
    page = page_of(run, attacks=folder, films=False)
    assert page.text.count(r"a\u202eb\u2066c\u200bd\u2028e\x1bf\ufeffg") > 10
    hidden = {c for c in page.html if unicodedata.category(c) in ("Cc", "Cf", "Zl", "Zp")}
    assert hidden <= {"\n"}


@pytest.mark.slow
def test_no_place_on_this_machine_is_told(trained: Path, tmp_path: Path) -> None:
    root = made_run(tmp_path / "run", data={"root": "/home/somebody/images"})
    (root / "clients" / "1").mkdir(parents=True)
    (root / "clients" / "1" / "ledger.jsonl").write_text("damaged")
    page = page_of(root, trained, films=False)
    assert "clients/1/ledger.jsonl" in page.text
    for words in ("/home/somebody", str(tmp_path), str(trained.parent)):
        assert words not in page.html


@pytest.mark.slow
@pytest.mark.parametrize("name", ["metrics.json", "privacy.json", "partition.json"])
@pytest.mark.parametrize("content", ["{", "[]", "[" * 100_000])
def test_damaged_files_are_named(tmp_path: Path, name: str, content: str) -> None:
    run = made_run(tmp_path / "run")
    (run / name).write_text(content)
    with pytest.raises(StoreError, match=name):
        read_run(run)


# Charts.


def line_points(svg: str, index: int) -> list[tuple[float, float]]:
    path = re.findall(r'<g class="line s\d"><path d="M ([^"]+)"', svg)[index]
    return [(float(x), float(y)) for x, y in (part.split() for part in path.split(" L "))]


def test_lines_are_drawn_to_scale() -> None:
    """One affine map takes all values of all lines to the picture, upwards for larger ones."""
    points = [(float(k), math.sin(k) * 3 + 10) for k in range(12)]
    other = [(float(k), 12.0 - 0.25 * k) for k in range(12)]
    chart = line_chart(
        [Series(name="a", points=points), Series(name="b", points=other)],
        title="T", x_label="round", y_label="loss",
    )  # fmt: skip
    assert chart is not None
    drawn = [line_points(str(chart.svg), k) for k in range(2)]
    values = np.array([y for _, y in points + other])
    places = np.array([y for _, y in drawn[0] + drawn[1]])
    slope, offset = np.polyfit(values, places, 1)
    assert slope < 0
    assert np.abs(slope * values + offset - places).max() < 0.11  # a tenth of a pixel is written
    xs = np.diff([x for x, _ in drawn[0]])
    assert xs.min() > 0
    assert np.ptp(xs) < 0.21
    assert chart.rows[3] == ["3", f"{points[3][1]:.5g}", f"{other[3][1]:.5g}"]
    box = [float(v) for v in re.search(r'viewBox="0 0 (\d+) (\d+)"', str(chart.svg)).groups()]  # type: ignore[union-attr]
    assert all(0 <= x <= box[0] and 0 <= y <= box[1] for line in drawn for x, y in line)


def test_labels_of_the_axis_are_where_their_values_are() -> None:
    series = Series(name="a", points=[(1.0, 0.0), (2.0, 50.0)])
    chart = line_chart([series], title="T", x_label="x", y_label="y")
    assert chart is not None
    svg = str(chart.svg)
    words = r'y="([\d.]+)" transform="[^"]+" style="text-anchor: end">([\d.]+)<'
    ticks = {float(text): float(y) - 5 for y, text in re.findall(words, svg)}
    lines = re.findall(r'"M 62 ([\d.]+) L 428 \1" style="[^"]*var\(--grid\)', svg)
    places = line_points(svg, 0)
    for value, (_, y) in zip((0.0, 50.0), places, strict=True):
        assert ticks[value] == pytest.approx(y, abs=0.2)
        assert min(abs(float(line) - y) for line in lines) < 0.01


def test_marks_are_on_the_points_and_charts_are_the_same_again() -> None:
    """Marks stand where they are used: charts of a page share no ids. Colours are the page's."""
    points = [(1.0, 3.0), (2.0, 5.0), (4.0, 4.0)]
    charts = [
        line_chart([Series(name="a", points=points)], title="T", x_label="x", y_label="y")
        for _ in range(2)
    ]
    svg, again = (str(chart.svg) for chart in charts if chart is not None)
    assert svg == again
    marks = re.findall(r'class="mark" d="[^"]+" transform="translate\(([\d.]+) ([\d.]+)\)"', svg)
    assert [(float(x), float(y)) for x, y in marks] == line_points(svg, 0)
    assert " id=" not in svg
    assert "#" not in svg
    assert "var(--s0)" in svg
    many = [(float(k), 1.0 + k) for k in range(100)]
    chart = line_chart([Series(name="a", points=many)], title="T", x_label="x", y_label="y")
    assert chart is not None
    assert len(line_points(str(chart.svg), 0)) == 100
    assert str(chart.svg).count('class="mark"') == 1


@pytest.mark.parametrize("value", [0.0, 1.0, -3.0, 1e-9, 1e12])
def test_one_value_is_a_mark_inside(value: float) -> None:
    chart = line_chart(
        [Series(name="a", points=[(5.0, value)])], title="T", x_label="x", y_label="y"
    )
    assert chart is not None
    ((x, y),) = line_points(str(chart.svg), 0)
    assert 60 < x < 440
    assert 10 < y < 220


def test_what_is_not_finite_is_left_out() -> None:
    bad = Series(name="a", points=[(1.0, math.nan), (2.0, math.inf)])
    assert line_chart([bad], title="T", x_label="x", y_label="y") is None
    good = Series(name="b", points=[(1.0, 2.0), (2.0, math.nan), (3.0, 4.0)])
    chart = line_chart([bad, good], title="T", x_label="x", y_label="y")
    assert chart is not None
    assert chart.columns == ["x", "b"]
    assert [row[0] for row in chart.rows] == ["1", "3"]


def test_sent_bytes_add_up_over_rounds(tmp_path: Path) -> None:
    rows = page_of(made_run(tmp_path / "run"), films=False).table("Sent so far")
    total = sum(record["bytes_down"] for record in records(3)) / 1e6
    assert float(rows[-1][2]) == total


# The command.


def test_the_command_writes_the_page(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "page.html"
    assert call("report", trained, "--out", out, "--no-film", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["out"] == str(out)
    assert told["bytes"] == len(out.read_bytes())
    assert Page(out.read_text()).all("h1")[0][2] == f"Report: {CONFIG.name}"
    beside = trained / "report.html"
    assert call("report", trained, "--no-film", "--quiet") == 0
    assert capsys.readouterr() == ("", "")
    assert beside.read_bytes() == out.read_bytes()
    beside.unlink()


def test_the_command_refuses(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.html").mkdir()
    for arguments, words in (
        ((trained, trained), "--out: is needed for a page about 2 runs"),
        ((trained, "--out", tmp_path / "page.txt"), "--out: must end in .html"),
        ((tmp_path, "--out", tmp_path / "page.html"), "is not a run directory"),
        ((trained, "--out", tmp_path / "folder.html"), "is a directory"),
        ((trained, "--out", tmp_path / "p.html", "--client", -1), "--client: must be at least 0"),
        ((trained, "--out", tmp_path / "p.html", "--attacks", "a", "--attacks", "b"),
         "--attacks: at most one for each of 1 runs, got 2"),
    ):  # fmt: skip
        assert call("report", *arguments) == 2
        line = without_advice(capsys.readouterr().err)
        assert words in line
        assert line.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["folder.html"]
