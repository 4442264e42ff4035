"""Scores of the samples of a finished simulation, against real images that no client holds.

Everything here reads raw images: the guarantee covers none of it, so it is for simulations.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpdm.config import RunConfig
from fedpdm.data import denormalize, normalize
from fedpdm.data.client_images import client_images
from fedpdm.data.loading import build_partitions, load_split
from fedpdm.diffusion.schedule import q_sample
from fedpdm.diffusion.twostage import refine
from fedpdm.evaluation.downstream import NUM_STEPS, classifier_scores
from fedpdm.evaluation.judging import check_counts, reference_rows
from fedpdm.evaluation.measures import group_labels
from fedpdm.evaluation.scoring import Say, Scorer, build_extractor, real_images_of_others
from fedpdm.evaluation.synthesis import Synthesizer, open_synthesizer
from fedpdm.jobs.progress import count_progress, work_progress
from fedpdm.rng import Purpose, torch_generator
from fedpdm.storage.run_directory import RunDirectory

__all__ = ["assess", "assess_run", "check_scoring", "handover_curve", "refined"]


def check_scoring(
    config: RunConfig,
    *,
    clients: Sequence[int] = (0,),
    cache: Path | None = None,
    say: Say = print,
) -> None:
    """Refuse, before anything is trained, a run that `assess_run` could not score.

    Makes the feature network, which `assess_run` then finds in the cache. `ValueError` (one line):
    no features, or too few test images, samples or images of other clients in a class group.
    """
    train, test = load_split(config, "train"), load_split(config, "test")
    parts, count = build_partitions(config, train), config.evaluation.num_images
    extractor, _ = build_extractor(config, test, cache=cache, say=say)
    width = extractor(test.images[:1]).shape[1]
    for client in clients:
        own = client_images(config, train, parts, client)
        for group, classes in own.groups.items():
            _, labels = real_images_of_others(config, train, client, classes, count)
            where = f"client {client}, {group}"
            try:
                reference_rows(test.labels, classes)
                check_counts(num_generated=count, num_training=len(own.train), width=width)
                where += ", real images of other clients"
                check_counts(num_generated=len(labels), num_training=len(own.train), width=width)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None


def assess_run(
    run: RunDirectory,
    *,
    clients: Sequence[int] = (0,),
    num_images: int | None = None,
    method: str = "run",
    cache: Path | None = None,
    say: Say = print,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Scores of each client's samples per class group, and a few of the samples.

    Args:
        run: a finished run of a simulation.
        clients: whose samples.
        num_images: per class group; default `evaluation.num_images`.
        method: `run`: as the run samples; `alone`: fine models only, at every t.
        cache: of feature networks and reference features.
        say: told of progress.

    Returns:
        Plain data (see docs/experiments.md) and arrays uint8 (n, C, H, W) by group of the first
        client, with `real_` ones beside them.

    Raises:
        ValueError: the run has not finished, a client is not there, or too few images; one line.
    """
    if method not in ("run", "alone"):
        raise ValueError(f"method must be run or alone, got {method!r}")
    config = run.config()
    scorer = Scorer.of(config, num_images=num_images, cache=cache, say=say)

    def synthesizer(client: int) -> Synthesizer:
        found = open_synthesizer(run, client, images=scorer.train)
        return found.alone() if method == "alone" else found

    scores, pictures = assess(scorer, synthesizer, clients=clients, say=say)
    return {**scores, "method": method}, pictures


def assess(
    scorer: Scorer,
    synthesizer: Callable[[int], Synthesizer],
    *,
    clients: Sequence[int],
    say: Say,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """As `assess_run`, of the clients that `synthesizer` gives."""
    started = time.perf_counter()
    seed = scorer.config.run.seed
    results, pictures = [], {}
    for client in clients:
        source = synthesizer(client)
        own = source.own
        record: dict[str, Any] = {"client_id": client, "num_train": len(own.train), "groups": {}}
        drawn, wanted = [], []
        for group, classes in own.groups.items():
            options: dict[str, Any] = {"group": group, "classes": classes, "own": own}
            others, other_labels = scorer.others(client, classes)
            try:
                floor = scorer.scores((others, other_labels), **options)
            except ValueError as error:
                where = f"client {client}, {group}, real images of other clients"
                raise ValueError(f"{where}: {error}") from None
            say(f"client {client}, {group}: {scorer.count} images")
            labels = group_labels(classes, scorer.count)
            title = f"client {client} samples of {group}"
            images = source.shown(title, labels).sample(labels, seed=seed)
            record["groups"][group] = {
                "classes": list(classes),
                "num_own": int(np.isin(own.train_labels, classes).sum()),
                "scores": scorer.scores((images, labels), **options),
                "floor": floor,
            }
            drawn.append(images)
            wanted.append(labels)
            if client == clients[0]:
                shown = _spread(labels, 20)
                pictures[group], pictures[f"{group}_labels"] = images[shown], labels[shown]
                pictures[f"real_{group}"] = others[_spread(other_labels, 20)]
        downstream = classifier_scores(
            np.concatenate(drawn), np.concatenate(wanted), scorer.test.images, scorer.test.labels,
            num_classes=scorer.train.num_classes, seed=seed,
            num_steps=min(NUM_STEPS, scorer.config.evaluation.classifier_steps),
            device=source.device, progress=work_progress(f"client {client} downstream classifier"),
        )  # fmt: skip
        record["downstream"] = downstream.named("synthetic")
        results.append(record)
    return {
        "extractor": scorer.extractor.name,
        "extractor_digest": scorer.extractor.digest,
        "classifier_accuracy": None if scorer.classifier is None else scorer.classifier.accuracy,
        "images_per_group": scorer.count,
        "clients": results,
        "seconds": time.perf_counter() - started,
    }, pictures


def handover_curve(
    run: RunDirectory,
    *,
    client: int,
    levels: Sequence[int],
    num_images: int | None = None,
    cache: Path | None = None,
    say: Say = print,
) -> list[dict[str, Any]]:
    """The fine stage alone: real images of other clients, noised to t and refined, for each level.

    This is the ceiling that no coarse model can beat at that hand-over; at t = 0 it is the floor.
    """
    config = run.config()
    last = config.schedule.num_steps
    for t in levels:
        if not 0 <= t <= last:
            raise ValueError(f"t must be in [0, {last}], got {t}")
    scorer = Scorer.of(config, num_images=num_images, cache=cache, say=say)
    synthesizer = open_synthesizer(run, client, images=scorer.train)
    if synthesizer.fine is None:
        raise ValueError(f"{run.root}: this run has no fine models")
    own = synthesizer.own
    curve = []
    for group, classes in own.groups.items():
        others, labels = scorer.others(client, classes)
        for t in levels:
            say(f"client {client}, {group}: from t = {t}")
            count = count_progress(f"client {client} {group} from t = {t}", "image")
            images = refined(synthesizer, others, labels, t=t, progress=count)
            scores = scorer.scores((images, labels), group=group, classes=classes, own=own)
            curve.append({"group": group, "t": t, "scores": scores})
    return curve


def refined(
    synthesizer: Synthesizer,
    images: np.ndarray,
    labels: np.ndarray,
    *,
    t: int,
    progress: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Images uint8 (N, C, H, W), noised to t and brought down to 0 by the fine model alone.

    `progress` is told (images done, N).
    """
    config, settings, device = synthesizer.config, synthesizer.settings, synthesizer.device
    generator = torch_generator(config.run.seed, Purpose.SAMPLING, client=t, device=device)
    parts = []
    for start in range(0, len(images), config.sampling.batch_size):
        chosen = slice(start, start + config.sampling.batch_size)
        x_0 = normalize(torch.from_numpy(images[chosen]).to(device), shift=synthesizer.spec.shift)
        noise = torch.randn(x_0.shape, generator=generator, device=device)
        level = torch.full((len(x_0),), t, device=device)
        assert synthesizer.fine is not None
        x = refine(
            synthesizer.fine, q_sample(settings.schedule, x_0, level, noise=noise), settings, t=t,
            labels=torch.from_numpy(labels[chosen]).to(device), generator=generator,
        )  # fmt: skip
        parts.append(denormalize(x.cpu(), shift=synthesizer.spec.shift).numpy())
        if progress is not None:
            progress(start + len(x_0), len(images))
    return np.concatenate(parts)


def _spread(labels: np.ndarray, count: int) -> np.ndarray:
    """Positions of about `count` images, equally many of each class, in the order of classes."""
    classes = np.unique(labels)
    each = max(1, count // len(classes))
    return np.concatenate([np.flatnonzero(labels == label)[:each] for label in classes])
