"""Results and their tables: means and spreads, rows, the floor, gaps, ablations, Markdown."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from fedpdm.cli import main
from fedpdm.commands.terminal import show
from fedpdm.config import ConfigError, load_suite
from fedpdm.config.suite import numbered
from fedpdm.reporting.provenance import describe_machine
from fedpdm.reporting.results import (
    Column,
    cell_text,
    gap_closed,
    load_results,
    rows,
)
from fedpdm.reporting.suite_tables import suite_tables
from tests.support.command_line import without_advice

FID = "inception-2048"
DISTANCE = Column(title="distance", path=("clients", "groups", "minority", "scores", "d"))
METHODS = {
    "centralised": {"title": "central", "trust": "one party sees all", "paper": "centralised"},
    "alone": {"title": "solo", "trust": "nothing is sent", "paper": "alone"},
    "ours": {"title": "our own", "trust": "noised images", "shared": 0.25},
}
SUITE = {
    "title": "Toy",
    "paper": "toys",
    "table": ["centralised", "alone", "ours"],
    "profiles": {"cpu": {"seeds": 3, "description": "small"}, "paper": {}},
    "ablations": {
        "epsilon": {
            "title": "privacy",
            "gaps": True,
            "methods": ["alone", "ours"],
            "variants": {"1": {}, "10": {"privacy": {"epsilon": 10}}},
        }
    },
}
PAPER = {"toys": {"centralised": [1.5, 2.5, 2], "alone": [3, 4, 3.5]}}


def scores_of(group: str, value: float, features: str) -> dict[str, float]:
    """Scores of one group in which each number is another multiple of `value`."""
    distance = "fid" if features == FID else f"frechet[{features}]"
    return {
        f"{group}_{distance}": value,
        f"{group}_recall[{features}]": value / 100,
        f"{group}_coverage[{features}]": value / 200,
        f"{group}_near_copies": value / 1000,
        f"{group}_class_fidelity[{features}]": value / 400,
    }


def result(
    method: str,
    seed: int,
    majority: list[float],
    minority: list[float],
    *,
    floor: float = 1.0,
    epsilon: float | None = 10.0,
    features: str = "trained-64",
) -> dict[str, Any]:
    """A result as `fedpdm experiment` writes it, with one value per client and group."""
    clients = [
        {
            "groups": {
                group: {
                    "scores": scores_of(group, value, features),
                    "floor": scores_of(group, floor, features),
                }
                for group, value in (("majority", first), ("minority", second))
            },
            "downstream": {
                "synthetic_downstream_accuracy": first / 100,
                "synthetic_downstream_worst_group": second / 100,
            },
        }
        for first, second in zip(majority, minority, strict=True)
    ]
    return {
        "method": method,
        "seed": seed,
        "extractor": features,
        "privacy": {"guarantee": "words", "epsilon": epsilon, "delta": 1e-5},
        "megabytes_per_client": 2.5,
        "seconds": {"training": 90.0, "scoring": 5.0},
        "clients": clients,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An experiments folder with one suite, three methods and published values."""
    (tmp_path / "methods").mkdir()
    (tmp_path / "expected").mkdir()
    (tmp_path / "results").mkdir()
    for name, method in METHODS.items():
        (tmp_path / "methods" / f"{name}.yaml").write_text(yaml.safe_dump(method))
    (tmp_path / "toy.yaml").write_text(yaml.safe_dump(SUITE, sort_keys=False))
    (tmp_path / "expected" / "paper.yaml").write_text(yaml.safe_dump(PAPER))
    return tmp_path


def put(folder: Path, record: dict[str, Any], *below: str) -> Path:
    where = folder.joinpath("results", "toy-cpu", *below)
    where.mkdir(parents=True, exist_ok=True)
    number = numbered(record["seed"], record.get("draw", 0))
    path = where / f"{record['method']}-{number}.json"
    path.write_text(json.dumps(record))
    return path


def fill(folder: Path) -> None:
    """Centralised and alone at seeds 0 to 2, ours at seed 0 alone, of two clients each."""
    for seed in range(3):
        spread = float(seed)
        put(folder, result("centralised", seed, [4 + spread, 6 + spread], [8, 12], epsilon=None))
        put(folder, result("alone", seed, [9, 11], [20 + spread, 20 + spread], epsilon=0.0))
    put(folder, result("ours", 0, [7, 8], [15, 18]))


# Numbers.


@pytest.mark.parametrize("values", [[1.0, 2.0, 4.0], [31.06, 36.4], [0.1, 0.1, 0.1, 0.7, 3.0]])
def test_mean_and_spread_are_those_of_statistics(values: list[float]) -> None:
    mean, spread = statistics.mean(values), statistics.stdev(values)  # divisor n - 1
    assert cell_text(values, 3) == f"{mean:.3f} ± {spread:.3f}"
    assert f"{statistics.pstdev(values):.3f}" != f"{spread:.3f}"  # the other divisor would show


def test_one_value_has_no_spread_and_none_is_a_dash() -> None:
    assert cell_text([2.346], 2) == "2.35"
    assert cell_text([], 2) == "-"
    assert cell_text([0.0], 1) == "0.0"


def test_gap_closed() -> None:
    assert gap_closed([10.0], [7.0], [4.0]) == pytest.approx(0.5)
    assert gap_closed([10.0], [4.0], [4.0]) == pytest.approx(1.0)
    assert gap_closed([10.0], [10.0], [4.0]) == pytest.approx(0.0)
    assert gap_closed([10.0], [13.0], [4.0]) == pytest.approx(-0.5)  # worse than training alone
    # Of the means over seeds, however many there are.
    assert gap_closed([9.0, 11.0], [6.0, 7.0, 8.0], [4.0]) == pytest.approx(0.5)
    assert gap_closed([10.0], [7.0], [10.0]) is None
    for missing in (([], [7.0], [4.0]), ([10.0], [], [4.0]), ([10.0], [7.0], [])):
        assert gap_closed(*missing) is None


def test_rows_are_means_over_clients_in_the_order_of_seeds() -> None:
    def made(method: str, seed: int, values: list[Any]) -> dict[str, Any]:
        groups = [{"groups": {"minority": {"scores": {"d": v}}}} for v in values]
        return {"method": method, "seed": seed, "clients": groups}

    found = [
        made("a", 2, [1.0, 2.0, 6.0]),
        made("a", 0, [10.0]),
        made("b", 0, [5.0, None]),  # one client without this value
        made("c", 0, [None]),
        {"method": "c", "seed": 1},
    ]
    table = rows(found, ["c", "a", "nobody", "b"], [DISTANCE])
    assert [row.method for row in table] == ["c", "a", "nobody", "b"]
    assert [row.seeds for row in table] == [(0, 1), (0, 2), (), (0,)]
    assert [row.cells for row in table] == [((),), ((10.0, 3.0),), ((),), ((5.0,),)]
    scaled = Column(title="d", path=DISTANCE.path, scale=100)
    assert rows(found, ["a"], [scaled])[0].cells == ((1000.0, 300.0),)


def test_load_results_reads_a_folder_and_names_a_damaged_file(tmp_path: Path) -> None:
    for seed in (10, 2):
        (tmp_path / f"alone-seed{seed}.json").write_text(json.dumps({"seed": seed}))
    (tmp_path / "notes.json").write_text("{}")
    assert sorted(found["seed"] for found in load_results(tmp_path)) == [2, 10]
    (tmp_path / "ours-seed0.json").write_text('{"seed": ')
    with pytest.raises(ValueError, match=r"ours-seed0\.json: cannot be read: not ") as caught:
        load_results(tmp_path)
    assert "\n" not in str(caught.value)


def test_machine_is_named_without_its_paths() -> None:
    machine = describe_machine()
    assert set(machine) == {"versions", "python", "cpu", "cores", "gpu"}
    assert {"torch", "flwr", "numpy"} <= set(machine["versions"])
    assert machine["cores"] >= 1
    assert not re.search(r"(^|[\s\"])/", json.dumps(machine))


# A suite's table as text.


def cells_of(text: str, method: str) -> list[str]:
    """The cells of a row: they stand two blanks apart."""
    line = next(line for line in text.splitlines() if line.startswith(method))
    return re.split(r"\s{2,}", line.strip())


def test_table(folder: Path) -> None:
    fill(folder)
    text = suite_tables(load_suite(folder / "toy.yaml"), "cpu", folder / "results")
    lines = text.splitlines()
    assert lines[0] == "Toy, profile cpu"
    assert "small." in lines
    assert re.split(r"\s{2,}", next(line for line in lines if line.startswith("method"))) == [
        "method", "seeds",
        "majority recall", "coverage", "copies %", "fidelity", "majority distance",
        "minority recall", "coverage", "copies %", "fidelity", "minority distance",
        "accuracy", "worst class", "epsilon", "MB / client", "minutes",
        "paper: FID maj / min / avg",
    ]  # fmt: skip
    spread = [5.0, 6.0, 7.0]  # centralised, majority: means over two clients
    mean, std = statistics.mean(spread), statistics.stdev(spread)
    central = cells_of(text, "central")
    assert (central[1], central[6]) == ("3", f"{mean:.2f} ± {std:.2f}")
    assert central[2:5] == ["0.06 ± 0.01", "0.03 ± 0.01", "0.6 ± 0.1"]
    assert central[11] == "10.00 ± 0.00"
    assert central[12:] == [
        "0.06 ± 0.01", "0.10 ± 0.00", "-", "2.5 ± 0.0", "1.5 ± 0.0", "1.50 / 2.50 / 2.00",
    ]  # fmt: skip
    assert cells_of(text, "solo")[14] == "0.00 ± 0.00"
    own = cells_of(text, "our own")
    assert (own[1], own[6], own[11]) == ("1", "7.50", "16.50")
    assert own[14:] == ["10.00", "2.5", "1.5", "-"]  # epsilon, traffic, minutes, no published row
    assert [line.split("  ")[0] for line in lines if "  " in line] == [
        "method", "central", "solo", "our own", "real images of other clients",
    ]  # fmt: skip


def test_floor_row_is_of_real_images_once_per_seed(folder: Path) -> None:
    for method in ("centralised", "alone", "ours"):
        for seed, floor in ((0, 1.0), (1, 3.0)):
            put(folder, result(method, seed, [9, 9], [9, 9], floor=floor))
    text = suite_tables(load_suite(folder / "toy.yaml"), "cpu", folder / "results")
    floor = cells_of(text, "real images of other clients")
    assert (floor[1], floor[6]) == ("2", f"2.00 ± {statistics.stdev([1.0, 3.0]):.2f}")
    assert floor[11] == floor[6]
    assert floor[12:] == ["-"] * 6  # nothing was trained: no accuracy, no epsilon, no traffic


def test_gaps_closed(folder: Path) -> None:
    fill(folder)
    text = suite_tables(load_suite(folder / "toy.yaml"), "cpu", folder / "results")
    gaps = [line for line in text.splitlines() if line.startswith("Gap closed")]
    majority, minority = (10 - 7.5) / (10 - 5), (20 - 16.5) / (20 - 10)  # at seed 0
    assert gaps == [
        f"Gap closed, majority distance: our own {majority:.2f}.",
        f"Gap closed, minority distance: our own {minority:.2f}.",
    ]
    for path in (folder / "results" / "toy-cpu").glob("alone-*"):
        path.unlink()
    text = suite_tables(load_suite(folder / "toy.yaml"), "cpu", folder / "results")
    assert "Gap closed" not in text


def test_nothing_was_run(folder: Path) -> None:
    text = suite_tables(load_suite(folder / "toy.yaml"), "cpu", folder / "results")
    for method in ("central", "solo", "our own"):
        cells = cells_of(text, method)
        assert cells[1] == "0"
        assert set(cells[2:-1]) == {"-"}
    assert cells_of(text, "central")[-1] == "1.50 / 2.50 / 2.00"
    assert "real images" not in text
    assert "Ablation" not in text


def test_a_distance_is_called_fid_for_fids_features_alone(folder: Path) -> None:
    put(folder, result("ours", 0, [7], [15], features=FID))
    text = suite_tables(load_suite(folder / "toy.yaml"), "cpu", folder / "results")
    assert "majority FID" in text
    assert "distance" not in text
    assert cells_of(text, "our own")[6] == "7.00"


def test_gaps_are_of_the_seeds_that_all_three_have(folder: Path) -> None:
    """An easy seed that only two methods ran would otherwise count as a gap closed."""
    for seed, levels in ((0, {"alone": 10, "ours": 10, "centralised": 6}), (1, {"alone": 30})):
        for method, level in levels.items():
            put(folder, result(method, seed, [level], [level]))
    text = suite_tables(load_suite(folder / "toy.yaml"), "cpu", folder / "results")
    gaps = [line for line in text.splitlines() if line.startswith("Gap closed")]
    assert gaps == [f"Gap closed, {g} distance: our own 0.00." for g in ("majority", "minority")]


def test_features_are_not_mixed(folder: Path) -> None:
    put(folder, result("ours", 0, [7], [15]))
    put(folder, result("alone", 0, [7], [15], features="pixels-32"))
    suite = load_suite(folder / "toy.yaml")
    words = "results of one table are scored with different features: pixels-32, trained-64$"
    with pytest.raises(ValueError, match=words):
        suite_tables(suite, "cpu", folder / "results")


def test_ablation_section(folder: Path) -> None:
    fill(folder)
    for seed in (0, 1):
        put(folder, result("ours", seed, [5 + seed], [6], epsilon=10), "epsilon", "10")
    suite = load_suite(folder / "toy.yaml")
    text = suite_tables(suite, "cpu", folder / "results")
    section = text[text.index("Ablation: privacy") :].splitlines()
    table = [re.split(r"\s{2,}", line) for line in section[2:6]]
    assert [*table[0][:3], table[0][7]] == ["epsilon", "method", "seeds", "majority distance"]
    assert "minutes" not in table[0]
    shown = [[*row[:3], row[7]] for row in table[1:]]
    assert shown == [
        ["1", "solo", "3", "10.00 ± 0.00"],  # changes nothing: the table's own
        ["1", "our own", "1", "7.50"],
        ["10", "our own", "2", f"5.50 ± {statistics.stdev([5, 6]):.2f}"],
    ]
    assert [line for line in section[6:] if line] == [
        "Gap closed, majority distance: our own, 1: 0.50; our own, 10: 1.00.",
        f"Gap closed, minority distance: our own, 1: 0.35; our own, 10: {14.5 / 10.5:.2f}.",
        "Not run: alone 10.",
    ]
    assert {len(row) for row in table} == {len(table[0])}


def test_draws_of_the_noise_have_a_standard_error(folder: Path) -> None:
    """On one seed; draws of what changes nothing lie beside the table, which does not show them."""
    suite = {**SUITE, "profiles": {"cpu": {"seeds": 3, "draws": 3}, "paper": {}}}
    (folder / "toy.yaml").write_text(yaml.safe_dump(suite, sort_keys=False))
    fill(folder)
    for draw, (plain, changed) in enumerate([(7.5, 5), (8, 6), (10, 10)]):
        for value, below in ((plain, ["draws"]), (changed, ["epsilon", "10"])):
            if draw or below != ["draws"]:
                put(folder, result("ours", 0, [value], [6]) | {"draw": draw}, *below)
    text = suite_tables(load_suite(folder / "toy.yaml"), "cpu", folder / "results")
    section = text[text.index("Ablation: privacy") :].splitlines()
    table = [re.split(r"\s{2,}", line) for line in section[2:6]]
    errors = [statistics.stdev(values) / 3**0.5 for values in ([7.5, 8, 10], [5, 6, 10])]
    assert [[*row[:3], row[7]] for row in table] == [
        ["epsilon", "method", "draws", "majority distance"],
        ["1", "solo", "1", "10.00"],  # of the first seed alone
        ["1", "our own", "3", f"8.50 ± {errors[0]:.2f}"],
        ["10", "our own", "3", f"7.00 ± {errors[1]:.2f}"],
    ]
    assert "Seed 0; mean ± standard error over draws of the releases' noise." in section
    own = text[: text.index("Ablation")].splitlines()
    assert re.split(r"\s{2,}", next(o for o in own if o.startswith("our own")))[1] == "1"


def test_ablation_names_its_features_whatever_variant_was_run(folder: Path) -> None:
    """The first variant has no results: its columns are those of the others all the same."""
    put(folder, result("ours", 0, [5], [6], features=FID), "epsilon", "10")
    suite = load_suite(folder / "toy.yaml")
    text = suite_tables(suite, "cpu", folder / "results")
    assert "majority FID" in text[text.index("Ablation: privacy") :]
    put(folder, result("alone", 0, [5], [6]), "epsilon", "10")
    with pytest.raises(ValueError, match=f"different features: {FID}, trained-64"):
        suite_tables(suite, "cpu", folder / "results")


# The page.


def pictures(folder: Path, method: str, *, minority: int = 20) -> None:
    """Samples beside a result: grey levels tell groups apart."""
    arrays = {
        f"{kind}{group}": np.full((count, 3, 8, 8), level, dtype=np.uint8)
        for group, count, level in (("majority", 20, 50), ("minority", minority, 120))
        for kind in ("", "real_")
    }
    np.savez_compressed(folder / "results" / "toy-cpu" / f"{method}-seed0.npz", **arrays)


def table_rows(page: str) -> list[list[list[str]]]:
    """Each Markdown table of a page as rows of cells."""
    tables: list[list[list[str]]] = [[]]
    for line in page.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")
            tables[-1].append([cell.strip() for cell in line[1:-1].split("|")])
        elif tables[-1]:
            tables.append([])
    return [table for table in tables if table]


def test_page(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(folder)
    put(folder, result("ours", 0, [5], [6]), "epsilon", "10")
    pictures(folder, "ours")
    pictures(folder, "alone", minority=13)  # fewer: the rest of the row is black
    (folder / "single.yaml").write_text("run: {rounds: 2}\n")  # a run, not a suite
    out = folder / "docs" / "results.md"
    out.parent.mkdir()
    assert main(["tables", "--experiments", str(folder), "--out", str(out)]) == 0
    assert capsys.readouterr().out == f"written to {out}\n"
    page = out.read_text()
    assert page.startswith("# Results\n")
    assert "## Toy, profile cpu" in page
    assert "profile paper" not in page  # nothing was run
    assert "### Ablation: privacy" in page
    assert "Trust: *central*: one party sees all; *solo*: nothing is sent;" in page
    assert re.search(r"\| our own \| 1 \|( [\d.]+ \|){4} 7\.50 \|", page)
    tables = table_rows(page)
    assert len(tables) == 2
    for table in tables:  # rectangular, with a rule below the head
        assert {len(row) for row in table} == {len(table[0])}
        assert set(table[1]) == {"---"}
    assert len(tables[0]) == 2 + 3 + 1
    assert len(tables[1]) == 2 + 3  # of which two are the table's own; the rest is named below
    assert "Not run: alone 10." in page
    assert str(folder) not in page
    picture = re.search(r"!\[samples\]\((results/toy-cpu\.png)\)", page)
    assert picture is not None
    with Image.open(out.parent / picture[1]) as image:
        assert min(image.size) >= 200
        seen = set(np.unique(np.asarray(image.convert("L"))).tolist())
    assert {0, 50, 120} <= seen  # both groups, and the black that fills the short row


def test_page_without_pictures(folder: Path) -> None:
    fill(folder)
    out = folder / "results.md"
    assert main(["tables", "--experiments", str(folder), "--out", str(out)]) == 0
    assert "![" not in out.read_text()
    assert not list(folder.glob("**/*.png"))


def test_no_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tables", "--experiments", str(tmp_path), "--out", str(tmp_path / "x.md")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    words = r"fedpdm: .*results: there are no results; run fedpdm experiment first\n"
    assert re.fullmatch(words, without_advice(printed.err))
    assert not (tmp_path / "x.md").exists()


@pytest.mark.parametrize("broken", ["toy.yaml", "methods/ours.yaml"])
def test_a_suite_with_a_typing_error_is_not_left_out(
    folder: Path, broken: str, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(folder)
    with open(folder / broken, "a") as file:
        file.write("titel: Toy\n")
    out = folder / "results.md"
    assert main(["tables", "--experiments", str(folder), "--out", str(out)]) == 2
    assert "titel: unknown key" in capsys.readouterr().err
    assert not out.exists()


def test_damaged_result(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(folder)
    path = folder / "results" / "toy-cpu" / "ours-seed0.json"
    path.write_text(path.read_text()[:50])
    arguments = ["tables", "--experiments", str(folder), "--out", str(folder / "x.md")]
    assert main(arguments) == 2
    assert "ours-seed0.json: cannot be read: not valid JSON" in capsys.readouterr().err


def test_missing_paper_values(folder: Path) -> None:
    (folder / "expected" / "paper.yaml").write_text("{}")
    with pytest.raises(ConfigError, match=r"paper\.yaml: has no table toys"):
        suite_tables(load_suite(folder / "toy.yaml"), "cpu", folder / "results")


def test_words_of_a_suite_are_shown_not_obeyed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In Markdown its titles are text, in a terminal nothing of them is hidden."""
    words = "x | *y* [z](http://w) <b>\u202e"
    changed = {**SUITE, "title": f"{words}\x1b[2K", "profiles": {"cpu": {"description": words}}}
    (folder / "toy.yaml").write_text(yaml.safe_dump(changed, sort_keys=False))
    ours = {"title": words, "trust": words, "shared": 0.25}
    (folder / "methods" / "ours.yaml").write_text(yaml.safe_dump(ours))
    fill(folder)
    suite = load_suite(folder / "toy.yaml")
    page = suite_tables(suite, "cpu", folder / "results", page=True)
    shown = r"x \| \*y\* \[z\](http&#58;//w) &lt;b&gt;\\u202e"
    assert page.splitlines()[0] == rf"## {shown}\\x1b\[2K, profile cpu"
    assert f"| {shown} | " in page
    assert f"*{shown}*: {shown}" in page
    plain = suite_tables(suite, "cpu", folder / "results")
    assert plain.splitlines()[0] == r"x | *y* [z](http://w) <b>\u202e\x1b[2K, profile cpu"
    show(plain)
    assert "\u202e" not in (printed := capsys.readouterr().out)
    assert "\x1b" not in printed


def test_a_suites_name_is_a_name(folder: Path) -> None:
    (folder / "toy.yaml").write_text(yaml.safe_dump({**SUITE, "name": "a/../b"}))
    with pytest.raises(ConfigError, match=r"toy\.yaml: name: must be 1 to 128 letters"):
        load_suite(folder / "toy.yaml")
