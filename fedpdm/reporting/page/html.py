"""The page: what was read and drawn, in a template that escapes all of it.

Nothing is fetched: pictures are data URIs, style and script are inline, and a content security
policy forbids the rest. Only the one script of this package may run.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

import fedpdm.reporting.page.tables as tables
from fedpdm.config import RunConfig
from fedpdm.reporting.attack_words import verdicts
from fedpdm.reporting.page.attacks import attack_groups
from fedpdm.reporting.page.cells import number
from fedpdm.reporting.page.pictures import (
    ClientSamples,
    Picture,
    draw_film,
    draw_samples,
    embed_file,
)
from fedpdm.reporting.page.reading import RunFacts, flat_config, statement_blocks
from fedpdm.reporting.provenance import software_versions
from fedpdm.storage.files import StoreError, write_atomic
from fedpdm.text import visible

__all__ = ["render_report", "write_report"]

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """One run as the template wants it; `anchor` is unique on the page."""

    anchor: str
    label: str
    facts: RunFacts
    summary: Sequence[tuple[str, str]]
    statement: Sequence[tuple[str, Sequence[str]]]
    charts: Sequence[Any]
    distances: Any
    split: Any
    split_picture: Picture | None
    samples: Sequence[Any]
    samples_left_out: int
    samples_picture: Picture | None
    samples_problem: str
    choices: Any
    film: Any
    film_problem: str
    attack_verdicts: Sequence[str]
    attacks: Sequence[Any]
    attack_pictures: Sequence[Picture]
    config: Sequence[tuple[str, str, bool]]


def write_report(
    runs: Sequence[RunFacts],
    out: Path,
    *,
    client: int = 0,
    seed: int = 0,
    films: bool = True,
    say: Say = print,
) -> Path:
    """Write the page and return its path; `ValueError`, one line, if it cannot be written.

    In a simulation, the models of `client` draw the way from noise to image. `seed` gives its
    noise, the same for all runs. Without `films` nothing is sampled.
    """
    page = render_report(runs, client=client, seed=seed, films=films, say=say)
    write_atomic(out, page.encode())
    return out


def render_report(
    runs: Sequence[RunFacts],
    *,
    client: int = 0,
    seed: int = 0,
    films: bool = True,
    say: Say = print,
) -> str:
    """The page's HTML; arguments as of `write_report`. `ValueError` without a run."""
    if not runs:
        raise ValueError("a report needs a run")
    labels = _labels(runs)
    sections = [
        _section(facts, label, index, client=client, seed=seed, films=films, say=say)
        for index, (facts, label) in enumerate(zip(runs, labels, strict=True))
    ]
    comparison = None
    if len(runs) > 1:
        comparison = {
            "table": tables.comparison_table(runs, labels),
            "settings": tables.differing_settings(runs, labels),
            "charts": tables.comparison_charts(runs, labels),
        }
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_asset),
        autoescape=True,
        finalize=_visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    title = f"Report: {labels[0]}" if len(runs) == 1 else f"{len(runs)} runs: {', '.join(labels)}"
    return environment.get_template("page.html.jinja").render(
        title=title,
        made=now,
        versions=software_versions(),
        sections=sections,
        comparison=comparison,
        style=Markup(_asset("page.css")),  # both are files of this package
        script=Markup(script),
        script_digest=digest,
        number=number,
    )


def _visible(value: Any) -> Any:
    """Text as a page shows it: what escaping leaves and nobody sees becomes an escape."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _asset(name: str) -> str:
    return resources.files("fedpdm.reporting.page").joinpath(name).read_text(encoding="utf-8")


def _labels(runs: Sequence[RunFacts]) -> list[str]:
    """A name for each run, none twice."""
    labels: list[str] = []
    for facts in runs:
        names = (facts.name, f"{facts.name} ({facts.folder})")
        unique = [n for n in names if [f.name for f in runs].count(n) <= 1 and n not in labels]
        label = unique[0] if unique else f"{names[1]} {len(labels) + 1}"
        labels.append(label)
    return labels


def _section(
    facts: RunFacts, label: str, index: int, *, client: int, seed: int, films: bool, say: Say
) -> RunSection:
    film: Any = "left out on request" if not films else "the run has not finished"
    if films and facts.finished:
        chosen = min(client, facts.config.partition.num_clients - 1)
        film = draw_film(facts, client=chosen, seed=seed, say=say)
    problem, left_out = "", 0
    samples: Sequence[ClientSamples] = ()
    try:
        samples, left_out = draw_samples(facts)
    except StoreError as error:
        problem = str(error).replace(str(facts.run.root), facts.folder)
    split = tables.split_of(facts)
    return RunSection(
        anchor=f"run{index + 1}",
        label=label,
        facts=facts,
        summary=tables.summary_rows(facts),
        statement=statement_blocks(facts.statement),
        charts=tables.run_charts(facts),
        distances=tables.distance_table(facts),
        split=split,
        split_picture=None
        if split
        else embed_file(
            facts.run.root / "partition.png", alt=f"{label}: images per client and class"
        ),
        samples=samples,
        samples_left_out=left_out,
        samples_picture=None
        if samples
        else embed_file(
            facts.run.root / "samples.png",
            alt=f"{label}: samples of each class, rows by client and method",
        ),
        samples_problem=problem,
        choices=tables.choice_table(facts),
        film=None if isinstance(film, str) else film,
        film_problem=film if isinstance(film, str) else "",
        attack_verdicts=verdicts((facts.attacks or {}).get("attacks", ())),
        attacks=attack_groups(facts.attacks or {}),
        attack_pictures=_attack_pictures(facts, label),
        config=_config_rows(facts.config),
    )


def _attack_pictures(facts: RunFacts, label: str) -> list[Picture]:
    """The PNG files that `attacks.json` names, in its own folder only."""
    if facts.attacks is None or facts.attacks_folder is None:
        return []
    names = [str(name) for name in facts.attacks.get("pictures", ())]
    names += [str(a["picture"]) for a in facts.attacks.get("attacks", ()) if a.get("picture")]
    found = []
    for name in dict.fromkeys(names):
        if Path(name).name != name:
            continue
        alt = f"{label}, attacks: {Path(name).stem.replace('-', ' ')}"
        if picture := embed_file(facts.attacks_folder / name, alt=alt):
            found.append(picture)
    return found


def _config_rows(config: RunConfig) -> list[tuple[str, str, bool]]:
    """(key, value, whether it is not the default)."""
    default = flat_config(dataclasses.replace(RunConfig(), name=config.name))
    return [
        (key, tables.setting(value), value != default.get(key))
        for key, value in flat_config(config).items()
    ]
