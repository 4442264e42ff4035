"""The numbers of a page: curves, distances, splits, and runs beside each other."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedpdm.reporting.page.cells import Table, is_number, number
from fedpdm.reporting.page.charts import Chart, Series, line_chart
from fedpdm.reporting.page.reading import RunFacts, flat_config
from fedpdm.reporting.run_files import ROW_NAMES
from fedpdm.reporting.shared_words import EXPLANATION, percent

__all__ = [
    "Split",
    "choice_table",
    "comparison_charts",
    "comparison_table",
    "differing_settings",
    "distance_table",
    "mean_distances",
    "run_charts",
    "setting",
    "split_of",
    "summary_rows",
]

METHODS = {**ROW_NAMES, "own": "own real images"}
GROUPS = ("majority", "minority", "all")
LINES_SHOWN = 8
CELLS_SHOWN = 600
_DISTANCE = re.compile(rf"({'|'.join(GROUPS)})_({'|'.join(METHODS)})_(frechet|class_fidelity)")
_LOSSES = {
    "coarse_loss": "shared model, training",
    "heldout_coarse_loss": "shared model, held-out",
    "fine_loss": "fine models, training",
}
_KNOWN = {
    "coarse_known": "noised training images",
    "heldout_coarse_known": "noised held-out images",
}


# Runs.


def summary_rows(facts: RunFacts) -> list[tuple[str, str]]:
    """(what, value) of a run at a glance."""
    config, privacy, rounds = facts.config, facts.privacy or {}, facts.rounds
    clients = f"{config.partition.num_clients} ({config.partition.kind.replace('_', ' ')})"
    epsilon = "not finished" if not privacy else number(privacy.get("epsilon"))
    if privacy and privacy.get("epsilon") is None:
        epsilon = "no bound"
    rows = [
        ("epsilon", epsilon),
        ("delta", f"{config.privacy.delta:g}"),
        ("guarantee", str(privacy.get("guarantee", "-"))),
        ("t0", number(privacy.get("t0"))),
        ("clip norm", number(privacy.get("clip_norm"))),
        ("data", config.data.name),
        ("clients", clients),
        ("rounds", f"{len(rounds)} of {config.run.rounds}"),
        ("shared model", _shared_words(facts)),
        ("sent, MB", _sent(rounds)),
        ("time, s", f"{sum(float(r.get('seconds', 0.0)) for r in rounds):.0f}"),
        ("place", facts.place),
    ]
    last = rounds[-1] if rounds else {}
    if "heldout_coarse_known" in last:
        known = percent(last["heldout_coarse_known"])
        rows.append(("the shared model knows of held-out images", known))
    elif "heldout_coarse_loss" in last:
        rows.append(("held-out loss of the shared model", number(last["heldout_coarse_loss"])))
    rows += [(f"distance, {name}", number(v)) for name, v in mean_distances(facts).items()]
    return rows


def _shared_words(facts: RunFacts) -> str:
    coarse = facts.config.coarse
    if coarse.training == "none":
        return "none: every client alone"
    if facts.config.has_statistics:
        if facts.config.has_network:
            rounds = facts.config.network.rounds
            return f"a network, of class Gaussians and {rounds} rounds of noised gradients"
        seen = "their total" if facts.config.aggregation.secure else "each client's"
        return f"class Gaussians, computed by the server from noised sums ({seen})"
    return f"{coarse.training}, on {coarse.images.replace('_', '-')} images"


def _sent(rounds: Sequence[Mapping[str, Any]]) -> str:
    """Of all clients, in MB; a node does not know it."""
    known = any("bytes_up" in each for each in rounds)
    return f"{sum(map(_total, rounds)) / 1e6:.1f}" if known or not rounds else "-"


def _total(record: Mapping[str, Any]) -> float:
    return float(record.get("bytes_up", 0)) + float(record.get("bytes_down", 0))


def comparison_table(runs: Sequence[RunFacts], names: Sequence[str]) -> Table:
    """What the runs are and reached, a column for each."""
    by_run = [dict(summary_rows(facts)) for facts in runs]
    order = list(dict.fromkeys(key for rows in by_run for key in rows))
    rows = [[key, *[rows.get(key, "-") for rows in by_run]] for key in order]
    return Table(columns=["", *names], rows=rows)


def differing_settings(runs: Sequence[RunFacts], names: Sequence[str]) -> Table:
    """The config keys in which the runs differ."""
    flats = [flat_config(facts.config) for facts in runs]
    rows = [
        [key, *[setting(flat.get(key)) for flat in flats]]
        for key in flats[0]
        if any(flat.get(key) != flats[0][key] for flat in flats)
    ]
    return Table(columns=["key", *names], rows=rows)


def setting(value: Any) -> str:
    """A config value as YAML would show it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return ", ".join(map(str, value)) or "[]" if isinstance(value, list) else str(value)


# Curves.


def _series(rounds: Sequence[Mapping[str, Any]], key: str, name: str, scale: float = 1.0) -> Series:
    points = [(float(r["round"]), float(r[key]) * scale) for r in rounds if is_number(r.get(key))]
    return Series(name=name, points=points)


def _shown_losses(rounds: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Losses to draw: not the shared model's where what it knows is there (`shared_words`)."""
    known = {name.replace("known", "loss") for name in _KNOWN if any(name in r for r in rounds)}
    return {name: words for name, words in _LOSSES.items() if name not in known}


def _sums(series: Series) -> Series:
    """Sums so far; 0 before the first round."""
    total, points = 0.0, [(series.points[0][0] - 1, 0.0)] if series.points else []
    for x, y in series.points:
        total += y
        points.append((x, total))
    return Series(name=series.name, points=points)


def run_charts(facts: RunFacts) -> list[Chart]:
    """What the shared model knows, losses, losses by client, distances by group where rounds have
    them, and bytes."""
    rounds = facts.rounds
    clients = sorted({int(c.get("client_id", -1)) for r in rounds for c in r.get("clients", ())})
    own = [
        Series(
            name=f"client {client}",
            points=[
                (float(r["round"]), float(c["fine_loss"]))
                for r in rounds
                for c in r.get("clients", ())
                if c.get("client_id") == client and is_number(c.get("fine_loss"))
            ],
        )
        for client in clients[:LINES_SHOWN]
    ]
    traffic = [
        _sums(_series(rounds, key, name, 1e-6))
        for key, name in (("bytes_up", "to the server"), ("bytes_down", "to clients"))
    ]
    charts = [
        _known_chart([_series(rounds, key, name, 100.0) for key, name in _KNOWN.items()]),
        line_chart(
            [_series(rounds, key, name) for key, name in _shown_losses(rounds).items()],
            title="Losses", x_label="round", y_label="loss",
        ),
        line_chart(own, title="Fine model's loss by client", x_label="round", y_label="loss"),
        line_chart(
            _distance_series(rounds), title="Distance by group", x_label="round",
            y_label="Frechet distance",
        ),
        line_chart(traffic, title="Sent so far", x_label="round", y_label="MB, all clients"),
    ]  # fmt: skip
    return [chart for chart in charts if chart is not None]


def _known_chart(series: Sequence[Series], of: str = "images") -> Chart | None:
    title = f"What the shared model knows of {of}"
    return line_chart(series, title=title, x_label="round", y_label="%", note=EXPLANATION)


def comparison_charts(runs: Sequence[RunFacts], names: Sequence[str]) -> list[Chart]:
    """A line per run."""
    together = list(zip(runs, names, strict=True))
    charts = [
        _known_chart([_series(f.rounds, key, name, 100.0) for f, name in together], words)
        for key, words in _KNOWN.items()
    ]
    charts += [
        line_chart(
            [_series(f.rounds, k, name) for f, name in together if k in _shown_losses(f.rounds)],
            title=title[0].upper() + title[1:], x_label="round", y_label="loss",
        )
        for k, title in _LOSSES.items()
    ]  # fmt: skip
    sent = [
        _sums(
            Series(name=name, points=[(float(r["round"]), _total(r) / 1e6) for r in facts.rounds])
        )
        for facts, name in together
    ]
    charts.append(
        line_chart(sent, title="Sent so far", x_label="round", y_label="MB, both directions")
    )
    return [chart for chart in charts if chart is not None]


# Image metrics.


def _measured(
    clients: Sequence[Mapping[str, Any]],
) -> dict[tuple[str, str, str], dict[int, float]]:
    """(group, method, metric) to values by client."""
    found: dict[tuple[str, str, str], dict[int, float]] = {}
    for metrics in clients:
        for name, value in metrics.items():
            if (match := _DISTANCE.fullmatch(name)) and is_number(value):
                group, method, metric = match.groups()
                key = (group, method, metric)
                found.setdefault(key, {})[int(metrics.get("client_id", -1))] = float(value)
    return found


def _means(clients: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str, str], float]:
    measured = _measured(clients)
    return {
        key: sum(values.values()) / len(values)
        for key in sorted(measured, key=lambda k: (GROUPS.index(k[0]), list(METHODS).index(k[1])))
        if (values := measured[key])
    }


def mean_distances(facts: RunFacts) -> dict[str, float]:
    """Frechet distances at the end, averaged over clients, by group and method in words."""
    return {
        f"{group}, {METHODS[method]}": value
        for (group, method, metric), value in _means(facts.final_clients).items()
        if metric == "frechet" and method != "own"
    }


def _distance_series(rounds: Sequence[Mapping[str, Any]]) -> list[Series]:
    lines: dict[str, list[tuple[float, float]]] = {}
    for record in rounds:
        for (group, method, metric), value in _means(record.get("clients", ())).items():
            if metric == "frechet":
                name = f"{group}, {METHODS[method]}"
                lines.setdefault(name, []).append((float(record["round"]), value))
    return [Series(name=name, points=points) for name, points in lines.items()][:LINES_SHOWN]


def distance_table(facts: RunFacts) -> Table | None:
    """Distances and class fidelity at the end, by client and group; None if unmeasured."""
    measured = _measured(facts.final_clients)
    if not measured:
        return None
    columns = [
        (method, metric)
        for metric in ("frechet", "class_fidelity")
        for method in METHODS
        if any((group, method, metric) in measured for group in GROUPS)
    ]
    clients = sorted({client for values in measured.values() for client in values})
    rows = []
    for client in clients:
        for group in GROUPS:
            cells = [measured.get((group, *column), {}).get(client) for column in columns]
            if any(cell is not None for cell in cells):
                rows.append([f"client {client}, {group}", *map(number, cells)])
    words = {"frechet": "distance", "class_fidelity": "fidelity"}
    heads = [f"{words[metric]}, {METHODS[method]}" for method, metric in columns]
    return Table(columns=["", *heads], rows=rows)


def choice_table(facts: RunFacts) -> Table | None:
    """How each client samples, as it chose on its own images; None where none has."""
    if not facts.choices:
        return None
    rows = [
        [
            f"client {client}",
            number(one.handover),
            "with" if one.fine_labels else "without",
            number(one.candidates),
            ", ".join(map(str, one.own_classes)) or "none",
            number(one.scores.get("fidelity")),
            number(one.scores.get("distance")),
            number(one.scores.get("near_copies")),
            one.why,
        ]
        for client, one in sorted(facts.choices.items())
    ]
    columns = [
        "hand-over t",
        "labels under it",
        "candidates",
        "by own model alone",
        "fidelity",
        "distance",
        "near-copies",
        "basis",
    ]
    return Table(columns=["", *columns], rows=rows)


# The split.


@dataclass(frozen=True, kw_only=True)
class Split:
    """Images per client and class: (count, share of the largest count), as text and 0 to 100."""

    classes: Sequence[str]
    rows: Sequence[tuple[str, Sequence[tuple[str, int]], str]]


def split_of(facts: RunFacts) -> Split | None:
    """The split as cells; None where it is not known, or has too many cells to be read."""
    record = facts.partition
    if not record or not record.get("clients"):
        return None
    clients, names = record["clients"], facts.class_names()
    if len(clients) * len(names) > CELLS_SHOWN:
        return None
    most = max(1, *(int(n) for client in clients for n in client["per_class"]))
    rows = [
        (
            str(client["client_id"]),
            [(f"{int(n):,}", round(100 * int(n) / most)) for n in client["per_class"]],
            f"{int(client['num_images']):,}",
        )
        for client in clients
    ]
    return Split(classes=names, rows=rows)
