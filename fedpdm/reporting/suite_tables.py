"""Results of suites as tables: the paper's numbers beside ours, and pictures of samples."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedpdm.config import ConfigError, Suite, load_paper_values, load_suite
from fedpdm.config.reading import read_mapping
from fedpdm.config.suite import Profile
from fedpdm.evaluation.features import MapFeatures
from fedpdm.reporting.method_samples import draw_method_samples
from fedpdm.reporting.results import (
    Column,
    Row,
    cell_text,
    gap_closed,
    load_results,
    load_variants,
    rows,
)
from fedpdm.reporting.use_table import draw_lengths, use_table
from fedpdm.storage.files import write_atomic
from fedpdm.text import markdown, table_lines, visible

__all__ = ["suite_tables", "write_results_page"]

HEAD = """\
# Results

Made by `make tables` from `experiments/results/`; every file there says with which config, versions
and machine. [experiments.md](experiments.md) says what was measured and how. Values are mean ±
standard deviation over seeds, a single value where one seed was run, `-` where none was. Lower
distances are better. **A distance is no FID unless the column says so, and does not compare with
the paper's.**
"""


def write_results_page(experiments: Path, out: Path) -> list[str]:
    """Write the Markdown page of all results, and a picture per experiment beside it.

    Returns the tables on it, by suite and profile. `ConfigError` where there are no results.
    """
    folder = experiments / "results"
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there are no results; run fedpdm experiment first")
    parts, shown = [HEAD], []
    for path in sorted(experiments.glob("*.yaml")):
        if "profiles" not in read_mapping(path):
            continue  # the configuration of a single run
        suite = load_suite(path)
        for profile in suite.profiles:
            own = folder / f"{suite.name}-{profile}"
            if not own.is_dir():
                continue
            parts.append(suite_tables(suite, profile, folder, page=True))
            shown.append(f"{suite.name}-{profile}")
            picture = out.parent / "results" / f"{suite.name}-{profile}.png"
            seed = draw_method_samples(suite, profile, own, picture)
            if seed is not None:
                parts.append(
                    f"![samples](results/{picture.name})\n\nSamples of client 0, seed {seed}: "
                    "majority and minority classes; last, real images.\n"
                )
            curve = picture.with_name(f"{picture.stem}-lengths")
            if draw_lengths(suite, suite.methods_of(profile), load_results(own), curve):
                parts.append(
                    f"![precision and recall](results/{curve.name}.png)\n\nMinority classes: "
                    "precision and recall of each method, the own models trained for an eighth, a "
                    "quarter, a half and all of their steps.\n"
                )
    write_atomic(out, "\n".join(parts).encode())
    return shown


def _columns(results: Sequence[dict[str, Any]]) -> list[Column]:
    """The table's columns in the features that the results were scored with."""
    names = {result["extractor"] for result in results}
    if len(names) > 1:
        raise ValueError(
            f"results of one table are scored with different features: {', '.join(sorted(names))}"
        )
    name = names.pop() if names else "none"
    is_fid = name == "inception-2048"
    distance = "fid" if is_fid else f"frechet[{name}]"
    columns = []
    for group in ("majority", "minority"):
        at = ("clients", "groups", group, "scores")
        columns += [  # what copying cannot win stands first
            Column(title=f"{group} recall", path=(*at, f"{group}_recall[{name}]")),
            Column(title="coverage", path=(*at, f"{group}_coverage[{name}]")),
            Column(title="copies %", path=(*at, f"{group}_near_copies"), scale=100, digits=1),
            Column(title="fidelity", path=(*at, f"{group}_class_fidelity[{name}]")),
            Column(
                title=f"{group} {'FID' if is_fid else 'distance'}",
                path=(*at, f"{group}_{distance}"),
            ),
        ]
        larger = f"{group}_frechet[{MapFeatures.name}]"
        if any(
            larger in g["scores"]
            for r in results
            for c in r["clients"]
            for g in c["groups"].values()
        ):
            columns.append(Column(title=f"distance of {MapFeatures.width}", path=(*at, larger)))
    use = ("clients", "downstream")
    columns += [
        Column(title="accuracy", path=(*use, "synthetic_downstream_accuracy")),
        Column(title="worst class", path=(*use, "synthetic_downstream_worst_group")),
        Column(title="epsilon", path=("privacy", "epsilon")),
        Column(title="MB / client", path=("megabytes_per_client",), digits=1),
        Column(title="minutes", path=("seconds", "training"), scale=1 / 60, digits=1),
    ]
    return columns


def suite_tables(
    suite: Suite, profile: str, results: Path, *, page: bool = False, width: int | None = None
) -> str:
    """All tables of a suite at one profile: methods, the floor, gaps closed, ablations; as plain
    text of at most `width` columns, or as Markdown for a `page`."""
    folder = results / f"{suite.name}-{profile}"
    found = load_results(folder) if folder.is_dir() else []
    columns = _columns(found)
    methods = suite.methods_of(profile)
    table = rows(found, methods, columns)
    paper = load_paper_values(suite.folder / "expected" / "paper.yaml", suite.paper)
    head = ["method", "seeds", *[column.title for column in columns], "paper: FID maj / min / avg"]
    body = []
    for row in table:
        method = suite.method(row.method)
        published = paper.get(method.paper or "")
        values = [cell_text(v, c.digits) for v, c in zip(row.cells, columns, strict=True)]
        body.append(
            [
                method.title,
                str(len(row.seeds)),
                *values,
                " / ".join(f"{v:.2f}" for v in published) if published else "-",
            ]
        )
    if found:
        floor = _floor(found, columns)
        body.append(["real images of other clients", str(len(floor.seeds)),
                     *[cell_text(v, c.digits) for v, c in zip(floor.cells, columns, strict=True)],
                     "-"])  # fmt: skip
    write = _paragraph if page else visible
    title = write(f"{suite.title}, profile {profile}")
    lines = [f"## {title}" if page else title, ""]
    if description := suite.profile(profile).description:
        lines += [f"{write(description)}.", ""]
    lines += _layout(head, body, page=page, width=width)
    compared = [
        (suite.method(method).title, method, [r for r in found if r["method"] == method])
        for method in methods
    ]
    lines += ["", *map(write, _gaps(found, compared, columns)), ""]
    if use := use_table(suite, methods, found):
        title = "Accuracy of the client's own classifier"
        lines += [f"### {title}" if page else title, "", *_layout(*use, page=page, width=width), ""]
    for name in suite.ablations:
        size = suite.profile(profile)
        lines += _ablation(suite, size, name, folder, page=page, width=width)
    seen = [(write(suite.method(m).title), write(suite.method(m).trust)) for m in methods]
    if page:
        lines += ["Trust: " + "; ".join(f"*{title}*: {words}" for title, words in seen) + ".", ""]
    return "\n".join(lines)


def _paragraph(text: str) -> str:
    return markdown(text, limit=10_000)


def _floor(found: Sequence[dict[str, Any]], columns: Sequence[Column]) -> Row:
    """The same columns of real images, one value per seed."""
    seeds = {result["seed"]: result for result in found}
    floors = [
        {
            "method": "floor",
            "seed": seed,
            "clients": [
                {"groups": {g: {"scores": r["floor"]} for g, r in client["groups"].items()}}
                for client in result["clients"]
            ],
        }
        for seed, result in seeds.items()
    ]
    return rows(floors, ["floor"], columns)[0]


def _gaps(
    found: Sequence[dict[str, Any]],
    compared: Sequence[tuple[str, str, Sequence[dict[str, Any]]]],
    columns: Sequence[Column],
) -> list[str]:
    """Share of the gap between training alone and centralised training that is closed.

    `found` holds these two, `compared` (name, method, results) each. Seeds differ by more than
    methods do: of each method, those that all three have are compared.
    """
    pair = ("alone", "centralised")
    ends = [{r["seed"] for r in found if r["method"] == method} for method in pair]
    lines = []
    for index, column in enumerate(columns):
        if not column.title.endswith(("distance", "FID")):
            continue
        parts = []
        for name, method, results in compared:
            if method in pair:
                continue
            common = {r["seed"] for r in results}.intersection(*ends)
            own = rows([r for r in results if r["seed"] in common], [method], columns)[0]
            alone, central = rows([r for r in found if r["seed"] in common], pair, columns)
            gap = gap_closed(alone.cells[index], own.cells[index], central.cells[index])
            if gap is not None:
                parts.append(f"{name} {gap:.2f}")
        if parts:
            lines.append(f"Gap closed, {column.title}: {'; '.join(parts)}.")
            lines.append("")
    return lines


def _ablation(
    suite: Suite, size: Profile, name: str, folder: Path, *, page: bool, width: int | None
) -> list[str]:
    ablation, draws = suite.ablation(name), size.draws > 1
    if not (folder / name).is_dir():
        return []
    found = load_variants(folder, name, ablation, size)
    every = [result for results in found.values() for result in results]
    columns = [c for c in _columns(every) if c.title not in ("minutes",)]
    head = [name, "method", "draws" if draws else "seeds", *[column.title for column in columns]]
    body: list[list[str]] = []
    missing, compared = [], []
    for variant, results in found.items():
        for row in rows(results, ablation.methods, columns):
            cells = zip(row.cells, columns, strict=True)
            values = [cell_text(v, c.digits, error=draws) for v, c in cells]
            if row.seeds:
                title = suite.method(row.method).title
                body.append([variant, title, str(len(row.seeds)), *values])
                own = [r for r in results if r["method"] == row.method]
                compared.append((f"{title}, {variant}:", row.method, own))
            else:
                missing.append(f"{row.method} {variant}")
    write = _paragraph if page else visible
    title = write(f"Ablation: {ablation.title}")
    lines = [
        f"### {title}" if page else title,
        "",
        *_layout(head, body, page=page, width=width),
        "",
    ]
    if draws:
        words = f"Seed {size.first_seed}; mean ± standard error over draws of the releases' noise."
        lines += [write(words), ""]
    if ablation.gaps:
        lines += map(write, _gaps(load_results(folder), compared, columns))
    return [*lines, write(f"Not run: {', '.join(missing)}."), ""] if missing else lines


def _layout(
    head: Sequence[str], body: Sequence[Sequence[str]], *, page: bool, width: int | None
) -> list[str]:
    if page:
        lines = ["| " + " | ".join(map(markdown, head)) + " |", "|" + "---|" * len(head)]
        return lines + ["| " + " | ".join(map(markdown, row)) + " |" for row in body]
    return table_lines(head, body, width=width)
