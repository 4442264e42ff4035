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

from fedpdm.config import ConfigError, RunConfig
from fedpdm.data import ImageSet, denormalize, normalize
from fedpdm.data.client_images import client_images
from fedpdm.data.loading import build_partitions, load_public, load_split
from fedpdm.diffusion.schedule import q_sample
from fedpdm.diffusion.training import select_device
from fedpdm.diffusion.twostage import refine
from fedpdm.evaluation.downstream import classifier_scores
from fedpdm.evaluation.features import (
    FeatureExtractor,
    InceptionFeatures,
    PixelExtractor,
    TrainedFeatures,
    train_feature_network,
)
from fedpdm.evaluation.judging import GroupReference, check_counts, reference_rows, score_group
from fedpdm.evaluation.measures import group_labels
from fedpdm.evaluation.synthesis import Synthesizer, open_synthesizer
from fedpdm.rng import Purpose, numpy_rng, torch_generator
from fedpdm.storage.run_directory import RunDirectory

__all__ = ["assess_run", "check_scoring", "handover_curve"]

Say = Callable[[str], None]


def build_extractor(
    config: RunConfig, reference: ImageSet, *, cache: Path | None, say: Say
) -> tuple[FeatureExtractor, TrainedFeatures | None]:
    """(extractor that `evaluation.features` names, network that classifies, if there is one)."""
    kind = config.evaluation.features
    if kind == "inception":
        return InceptionFeatures(device=select_device(config.run.device)), None
    if kind == "pixels":
        components = min(32, len(reference) - 1)
        return PixelExtractor.fit(reference.images, num_components=components), None
    public = load_public(config, count=config.evaluation.num_public)
    network = train_feature_network(public, seed=0, cache=cache)
    say(f"feature network: accuracy {network.accuracy:.3f} on {network.num_held_out} public images")
    return network, network


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
    parts, count = build_partitions(config, train), _count(config, None)
    extractor, _ = build_extractor(config, test, cache=cache, say=say)
    width = extractor(test.images[:1]).shape[1]
    for client in clients:
        own = client_images(config, train, parts, client)
        for group, classes in _groups(own.majority, own.minority).items():
            _, labels = _others(config, train, client, classes, count)
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
    started = time.perf_counter()
    config = run.config()
    if not config.run.simulation:
        raise ConfigError("run.simulation: false; only a simulation's images can be scored here")
    if method not in ("run", "alone"):
        raise ValueError(f"method must be run or alone, got {method!r}")
    train, test = load_split(config, "train"), load_split(config, "test")
    extractor, classifier = build_extractor(config, test, cache=cache, say=say)
    count, seed = _count(config, num_images), config.run.seed
    results, pictures = [], {}
    for client in clients:
        synthesizer = open_synthesizer(run, client, images=train)
        if method == "alone":
            synthesizer = synthesizer.alone()
        own = synthesizer.own
        training = own.images.images[own.train]
        record: dict[str, Any] = {"client_id": client, "num_train": len(own.train), "groups": {}}
        drawn, wanted = [], []
        for group, classes in _groups(own.majority, own.minority).items():
            reference = GroupReference.of(test, classes, extractor, cache=cache)
            options: dict[str, Any] = {
                "reference": reference, "training": training, "extractor": extractor,
                "classifier": classifier,
            }  # fmt: skip
            others, other_labels = _others(config, train, client, classes, count)
            try:
                floor = score_group(others, other_labels, **options, rng=_rng(seed, client))
            except ValueError as error:
                where = f"client {client}, {group}, real images of other clients"
                raise ValueError(f"{where}: {error}") from None
            say(f"client {client}, {group}: {count} images")
            labels = group_labels(classes, count)
            images = synthesizer.sample(labels, seed=seed)
            scores = score_group(images, labels, **options, rng=_rng(seed, client))
            record["groups"][group] = {
                "classes": list(classes),
                "num_own": int(np.isin(own.train_labels, classes).sum()),
                "scores": scores.named(group),
                "floor": floor.named(group),
            }
            drawn.append(images)
            wanted.append(labels)
            if client == clients[0]:
                shown = _spread(labels, 20)
                pictures[group], pictures[f"{group}_labels"] = images[shown], labels[shown]
                pictures[f"real_{group}"] = others[_spread(other_labels, 20)]
        downstream = classifier_scores(
            np.concatenate(drawn), np.concatenate(wanted), test.images, test.labels,
            num_classes=train.num_classes, seed=seed,
        )  # fmt: skip
        record["downstream"] = downstream.named("synthetic")
        results.append(record)
    return {
        "extractor": extractor.name,
        "extractor_digest": extractor.digest,
        "classifier_accuracy": None if classifier is None else classifier.accuracy,
        "method": method,
        "images_per_group": count,
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
    train, test = load_split(config, "train"), load_split(config, "test")
    extractor, classifier = build_extractor(config, test, cache=cache, say=say)
    synthesizer = open_synthesizer(run, client, images=train)
    if synthesizer.fine is None:
        raise ValueError(f"{run.root}: this run has no fine models")
    own, count = synthesizer.own, _count(config, num_images)
    curve = []
    for group, classes in _groups(own.majority, own.minority).items():
        reference = GroupReference.of(test, classes, extractor, cache=cache)
        others, labels = _others(config, train, client, classes, count)
        for t in levels:
            say(f"client {client}, {group}: from t = {t}")
            images = _refined(synthesizer, config, others, labels, t=t)
            scores = score_group(
                images, labels, reference=reference, training=own.images.images[own.train],
                extractor=extractor, classifier=classifier, rng=_rng(config.run.seed, client),
            )  # fmt: skip
            curve.append({"group": group, "t": t, "scores": scores.named(group)})
    return curve


def _refined(
    synthesizer: Synthesizer, config: RunConfig, images: np.ndarray, labels: np.ndarray, *, t: int
) -> np.ndarray:
    settings, device = synthesizer.settings, synthesizer.device
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
    return np.concatenate(parts)


def _count(config: RunConfig, num_images: int | None) -> int:
    count = config.evaluation.num_images if num_images is None else num_images
    if count < 1:
        raise ValueError(f"number of images must be at least 1, got {count}")
    return count


def _groups(majority: tuple[int, ...], minority: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
    if not minority:
        return {"all": majority}
    return {"majority": majority, "minority": minority}


def _others(
    config: RunConfig, train: ImageSet, client: int, classes: Sequence[int], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """About `count` real images of these classes that other clients hold, classes in turn."""
    parts = build_partitions(config, train)
    held = [part.indices for part in parts if part.client_id != client] or [parts[0].indices]
    pool = np.concatenate(held)
    each, order = -(-count // len(classes)), _rng(config.run.seed, client)
    chosen = []
    for label in classes:
        members = pool[train.labels[pool] == label]
        chosen.append(order.permutation(members)[:each])
    indices = np.concatenate(chosen)
    return train.images[indices], train.labels[indices]


def _spread(labels: np.ndarray, count: int) -> np.ndarray:
    """Positions of about `count` images, equally many of each class, in the order of classes."""
    classes = np.unique(labels)
    each = max(1, count // len(classes))
    return np.concatenate([np.flatnonzero(labels == label)[:each] for label in classes])


def _rng(seed: int, client: int) -> np.random.Generator:
    return numpy_rng(seed, Purpose.EVALUATION, client=client)
