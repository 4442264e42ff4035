"""A run's log, pictures and closing summary."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from fedpdm.config import RunConfig, RunKind
from fedpdm.data import ImageSet
from fedpdm.data.loading import record_partitions
from fedpdm.data.partition import ClientPartition, partition_table
from fedpdm.privacy.dpsgd import SeededDraws
from fedpdm.privacy.planning import build_noise
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.privacy.statement import baseline_statement, plain_text, run_statement
from fedpdm.reporting.pictures import draw_image_grid, draw_partition
from fedpdm.reporting.provenance import software_versions
from fedpdm.reporting.shared_words import EXPLANATION, percent
from fedpdm.setup.choice import kept_choices
from fedpdm.setup.run_setup import RunSetup
from fedpdm.storage.client_store import ClientStore
from fedpdm.storage.run_directory import RunDirectory
from fedpdm.text import visible

__all__ = ["RunLog", "draw_samples", "draw_split", "finish_run", "privacy_lines", "summarise"]

ROW_NAMES = {
    "shared": "shared model",
    "coarse": "coarse output",
    "pfdm": "coarse, then fine",
    "alone": "training alone",
}
COLUMNS = 20
CLASSES_SHOWN = 40
CLIENTS_SHOWN = 4


class RunLog:
    """Lines to standard output and, with the time of day, to the run's `log.txt`."""

    def __init__(self, run: RunDirectory) -> None:
        self._path = run.root / "log.txt"

    def say(self, line: str) -> None:
        shown = visible(line)
        with open(self._path, "a", encoding="utf-8") as file:  # first: who reads it may interrupt
            file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {shown}\n")
        print(shown, flush=True)


def draw_split(
    run: RunDirectory,
    config: RunConfig,
    partitions: Sequence[ClientPartition],
    images: ImageSet,
) -> None:
    """`partition.png`, `.txt` and `.json`: who holds how many images of which class, and which."""
    names = images.class_names
    draw_partition(run.root / "partition.png", partitions, images.labels, names)
    run.write_text("partition.txt", partition_table(partitions, images.labels, names) + "\n")
    run.write_json("partition.json", record_partitions(config, images, partitions))


def draw_samples(run: RunDirectory, config: RunConfig) -> bool:
    """`samples.png` from the stored samples of the clients that are here: all in a simulation, the
    node's own in what it keeps of a run.

    A group of rows per client: coarse output, coarse then fine, training alone; columns go
    through the classes, headed by their names: `CLASSES_SHOWN` of them, evenly, where there are
    more. Returns whether there was anything to draw.
    """
    names = _class_names(run)
    rows: list[np.ndarray] = []
    labels: list[str] = []
    groups: list[str] = []
    columns: list[str] = []
    present = 0
    for client in run.clients()[:CLIENTS_SHOWN]:
        samples = ClientStore(run.client_path(client)).load_samples()
        if samples is None:
            continue
        chosen = _columns(samples["labels"])
        present = len(np.unique(samples["labels"]))
        columns = [names.get(int(label), str(label)) for label in samples["labels"][chosen]]
        for method, name in ROW_NAMES.items():
            if method in samples:
                rows.append(samples[method][chosen])
                labels.append(name)
                groups.append(f"client {client}")
    if not rows:
        return False
    draw_image_grid(
        run.root / "samples.png",
        rows,
        row_labels=labels,
        row_groups=groups,
        column_labels=columns,
        title=f"{config.name}: samples per class",
        note=f"{CLASSES_SHOWN} of {present} classes" if present > CLASSES_SHOWN else None,
    )
    return True


def _class_names(run: RunDirectory) -> dict[int, str]:
    """By label, as the split says; empty where there is none."""
    if not (run.root / "partition.json").exists():
        return {}
    return dict(enumerate(map(str, run.read_json("partition.json").get("class_names", ()))))


def _columns(labels: np.ndarray) -> np.ndarray:
    """Positions of an equal number of samples of each class shown, about `COLUMNS` in all."""
    classes = np.unique(labels)
    if len(classes) > CLASSES_SHOWN:
        even = np.linspace(0, len(classes) - 1, CLASSES_SHOWN).round().astype(int)
        classes = classes[even]
    each = max(1, COLUMNS // len(classes))
    return np.concatenate([np.flatnonzero(labels == k)[:each] for k in classes])


def finish_run(
    run: RunDirectory,
    setup: RunSetup,
    log: RunLog,
    stores: Sequence[ReleaseStore],
    ema: Mapping[str, torch.Tensor],
    history: Mapping[str, Any],
) -> None:
    """Write what a finished run leaves behind and say where it is.

    `stores` are the clients' release stores in simulation, empty elsewhere.
    """
    config = setup.config
    if setup.plan is not None:
        noise_source = build_noise(config, client=0, release=1).description
        statement = run_statement(config, setup.plan, noise_source=noise_source, stores=stores)
    else:
        noise_source, statement = "none", baseline_statement(config)
        if config.kind is RunKind.DP_SGD:
            noise_source = SeededDraws.description
    if config.kind.has_shared_model:
        run.save_shared(ema, noise_source=noise_source)
    run.write_json("privacy.json", statement)
    run.write_text("privacy.txt", plain_text(statement))
    run.write_json("metrics.json", history)
    run.write_json("versions.json", software_versions())
    if config.run.simulation:
        draw_samples(run, config)
        for client, choice in kept_choices(run, config).items():
            log.say(f"client {client} samples with {choice.words}")
    log.say(summarise(run))


def _no_metrics(config: RunConfig) -> str:
    """Why there is no table of image metrics."""
    if not config.run.simulation:
        return "No image metrics: they are of raw images, which stay at the participants."
    if not config.evaluation.image_metrics:
        return "No image metrics: evaluation.image_metrics is false."
    return "No image metrics: no client has images to compare with."


def summarise(run: RunDirectory) -> str:
    """The closing summary of a finished run: places, privacy statement, metrics table."""
    privacy = run.statement()
    final = run.read_json("metrics.json")["final"]
    lines = [
        "",
        f"Run directory  {run.root}",
    ]
    for name, what in (
        ("samples.png", "samples of each class, a row per client and method"),
        ("partition.png", "who holds what"),
        ("partition.json", "the same, with digests to compare with other machines"),
        ("privacy.txt", "what is promised, in plain words"),
        ("metrics.json", "losses, bytes and metrics per round and client"),
        ("coarse.safetensors", "the shared coarse model"),
    ):
        if (run.root / name).exists():
            lines.append(f"  {name:<19} {what}")
    lines += ["", *privacy_lines(privacy), ""]
    table = metrics_table(final["clients"])
    lines += [*table, *_recipe(run.config())] if table else [_no_metrics(run.config())]
    lines.append("")
    lines += _shared_lines(final, of="images" if "baseline" in privacy else "releases")
    return "\n".join(lines)


def _recipe(config: RunConfig) -> list[str]:
    """What `both` is, in the words of `fedpdm experiment`; nothing for a baseline."""
    if not config.kind.releases:
        return []
    if config.has_network:
        what = "from a private network on, 'network' in fedpdm experiment"
    elif config.has_statistics:
        what = "from class Gaussians on, 'statistics' in fedpdm experiment"
    elif config.coarse.objective == "truncated":
        what = "trained as 'ours' in fedpdm experiment (not as 'PFDM', which is the paper's recipe)"
    elif config.coarse.objective == "noise_to_noise":
        what = "with the paper's noise-to-noise model, as 'PFDM' in fedpdm experiment"
    else:
        what = f"with coarse.objective {config.coarse.objective}"
    return [f"  both: the shared model, then the client's fine model; {what}."]


def _shared_lines(final: Mapping[str, Any], *, of: str) -> list[str]:
    """What the shared model knows of held-out images, or its loss on them."""
    if (known := final.get("heldout_coarse_known")) is not None:
        return [f"Shared model  knows {percent(known)} of held-out images; {EXPLANATION}"]
    if (loss := final.get("heldout_coarse_loss")) is not None:
        return [f"Shared model's loss on held-out {of}: {loss:.4f}"]
    return []


def privacy_lines(privacy: Mapping[str, Any]) -> list[str]:
    """A statement in a few lines for a terminal."""
    if "baseline" in privacy:
        return [f"Privacy  baseline: {privacy['guarantee']}. {privacy['words']}"]
    groups = ", ".join(f"{v:.4g} for {k}" for k, v in privacy["group_epsilon"].items() if k != "1")
    releases = privacy["releases_per_image"]
    what = "as privacy.txt says"
    if {"clip_norm", "shift"} <= privacy.keys():
        t0 = f"t0 = {privacy['t0']}, " if "t0" in privacy else ""
        what = f"{t0}clip norm {privacy['clip_norm']:g} around {privacy['shift']:g}"
    if "network_rounds" in privacy:
        rounds, noise = privacy["network_rounds"], privacy["gradient_noise_multiplier"]
        what += f", {rounds} rounds of gradients under noise of {noise:.4g} clip norms"
    how, bound = "exact accounting (analytic Gaussian)", privacy["epsilon_paper_bound"]
    compared = "" if bound is None else f"; the paper's bound would say {bound:.4g}"
    if bound is None:
        how = "privacy loss distributions, which bound it from above"
    lines = [
        f"Privacy  each image is ({privacy['epsilon']:.4g}, {privacy['delta']:g})-locally "
        f"differentially private, by {how};",
        f"         {what}, "
        f"{'one release' if releases == 1 else f'up to {releases} releases'} per image"
        f"{compared}.",
        f"         A person with more images in one client: epsilon {groups}.",
        "         Not covered: labels, counts, metrics on raw data, fine models once published.",
    ]
    if privacy["simulation"]:
        lines.append("         SIMULATION: the noise is seeded; who knows the seed can remove it.")
    return lines


def metrics_table(clients: Sequence[Mapping[str, Any]]) -> list[str]:
    """Image metrics per client and class group; empty if there are none.

    The first column is a baseline's shared model where that was measured.
    """
    rows = []
    shared = any(name.endswith("_shared_frechet") for metrics in clients for name in metrics)
    first, title = ("shared", "shared") if shared else ("pfdm", "both")
    for metrics in clients:
        for group in ("majority", "minority", "all"):
            if not any(f"{group}_{method}_frechet" in metrics for method in (first, "alone")):
                continue
            cells = [
                _number(metrics.get(f"{group}_{method}_{metric}"))
                for metric in ("frechet", "class_fidelity")
                for method in (first, "alone", "own")
            ]
            rows.append((f"client {metrics['client_id']}", group, cells))
    if not rows:
        return []
    for group in ("majority", "minority", "all"):
        values = [cells for _, name, cells in rows if name == group]
        if len(values) > 1:
            rows.append(("mean", group, [_mean(column) for column in zip(*values, strict=True)]))
    lines = [
        "Metrics                  Frechet distance (pixel PCA)    class fidelity",
        f"                         {title:<8}alone   own images      {title:<7}alone  own images",
    ]
    for who, group, cells in rows:
        numbers = "  ".join(_cell(value, 6) for value in cells[:3])
        shares = "  ".join(_cell(value, 5) for value in cells[3:])
        lines.append(f"  {who:<10} {group:<9} {numbers}        {shares}")
    lines.append(
        "  Lower Frechet distance is better; against test images that no client holds. It is not "
        "FID.\n  own images: the client's real training images by the same measure. "
        "-: not measured."
    )
    return lines


def _number(value: float | None) -> float:
    """NaN for what was not measured, or is no number in JSON."""
    return math.nan if value is None else value


def _cell(value: float, width: int) -> str:
    return f"{'-' if math.isnan(value) else f'{value:.2f}':>{width}}"


def _mean(values: Sequence[float]) -> float:
    """Mean of the values that are not NaN; NaN if there is none."""
    present = [value for value in values if not math.isnan(value)]
    return sum(present) / len(present) if present else math.nan
