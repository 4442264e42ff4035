"""Cells whose methods share one own model for each client: what they are scored with, and on what.

The shared model comes from a run in which nobody trains an own model, the own model from
`fedpdm.suites.own_models`. Besides the scores of every cell there are

* `lengths`: samples of minority classes with the own model after a share of its training;
* `use`: accuracy of the client's own classifier (`fedpdm.evaluation.use`): with these samples, and
  in the cells that say most of it, without any, with real images of others, and with the Gaussians.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpdm.config import RunConfig
from fedpdm.data.client_images import client_images
from fedpdm.data.loading import build_partitions, load_split
from fedpdm.diffusion.gaussian import GaussianDenoiser
from fedpdm.evaluation.assessment import assess, refined
from fedpdm.evaluation.choosing import choose_sampling
from fedpdm.evaluation.measures import group_labels
from fedpdm.evaluation.scoring import Labelled, Scorer, real_images_of_others
from fedpdm.evaluation.synthesis import Synthesizer, make_synthesizer
from fedpdm.evaluation.use import (
    Recipe,
    own_log_probabilities,
    use_of,
)
from fedpdm.jobs.progress import work_progress
from fedpdm.setup.choice import SamplingChoice, is_open
from fedpdm.setup.run_setup import set_up
from fedpdm.suites.own_models import heldout_loss, own_models

__all__ = ["OthersRefined", "score_with_own_models", "shared_config"]

Weights = Mapping[str, torch.Tensor]
LENGTH_IMAGES = 500


def shared_config(config: RunConfig) -> RunConfig:
    """The run that makes this config's shared model, and no own models."""
    plain = RunConfig().sampling
    if config.has_statistics:
        handover = set_up(config).handover
        plain = dataclasses.replace(plain, handover=handover, fine_labels=False, candidates=1)
    rounds = max(config.run.rounds, config.least_rounds)
    return dataclasses.replace(
        config,
        run=dataclasses.replace(config.run, rounds=rounds),
        fine=dataclasses.replace(config.fine, steps_per_round=0),
        sampling=dataclasses.replace(plain, per_class=1, num_steps=1),
        evaluation=dataclasses.replace(config.evaluation, image_metrics=False),
    )


class OthersRefined(Synthesizer):
    """Real images of other clients, noised to the hand-over and refined by the own model."""

    def sample(self, labels: np.ndarray, *, seed: int) -> np.ndarray:
        """As of a `Synthesizer`; an image serves again where the others have too few."""
        train = load_split(self.config, "train")
        classes = np.unique(labels)
        others, their = real_images_of_others(
            self.config, train, self.own.client_id, classes.tolist(), len(labels)
        )
        images = np.empty((len(labels), *others.shape[1:]), dtype=np.uint8)
        for label in classes:
            wanted = labels == label
            images[wanted] = others[np.resize(np.flatnonzero(their == label), wanted.sum())]
        return refined(self, images, labels, t=self.settings.t0)


def score_with_own_models(
    config: RunConfig,
    *,
    weights: Weights | None,
    clients: Sequence[int],
    kept: Path,
    early: bool,
    others: bool,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(scores as `assess`, with `use` and `lengths` of each client; pictures).

    Args:
        weights: of the shared model; None for none.
        kept: where own models are.
        early: the own model as it was when its loss on the client's held-out images was lowest.
        others: real images of others in the place of the shared model.
    """
    started = time.perf_counter()
    scorer = Scorer.of(config, num_images=None, cache=None, say=print)
    trained = {client: own_models(config, client, kept=kept) for client in clients}
    training_seconds = time.perf_counter() - started
    parts = build_partitions(config, scorer.train)
    held = {client: client_images(config, scorer.train, parts, client) for client in clients}
    chosen: dict[int, int] = {}
    for client, stages in trained.items():
        losses = [heldout_loss(config, client, w) for w in stages] if early else []
        chosen[client] = 1 + int(np.argmin(losses)) if early else len(stages)

    choices: dict[int, SamplingChoice] = {}

    def synthesizer(client: int, rounds: int | None = None) -> Synthesizer:
        fine = trained[client][(rounds or chosen[client]) - 1]
        made = make_synthesizer(
            config, held[client], coarse=weights, fine=fine, choice=choices.get(client)
        )
        return OthersRefined(**vars(made)) if others else made

    for client in clients if is_open(set_up(config, scorer.train)) and weights else ():
        choices[client] = _choose(synthesizer(client))
        print(f"client {client}: {choices[client].words}")
    scores, pictures = assess(scorer, synthesizer, clients=clients, say=print)
    for record in scores["clients"]:
        client = record["client_id"]
        source = synthesizer(client)
        record["own_model_rounds"] = chosen[client]
        if client in choices:
            record["choice"] = dataclasses.asdict(choices[client])
        after = functools.partial(synthesizer, client)
        record["lengths"] = _lengths(scorer, after, config.run.rounds)
        plain = weights is None and not others and not early and config.fine.augment == "none"
        record["use"] = _use(scorer, source, alone=plain)
        pictures |= _own_pictures(source) if client == clients[0] else {}
    return {**scores, "own_seconds": training_seconds}, pictures


def _choose(source: Synthesizer) -> SamplingChoice:
    """How the client samples, by its held-out images."""
    assert isinstance(source.coarse, GaussianDenoiser)
    assert source.fine is not None
    setup = set_up(source.config, source.own.images)
    return choose_sampling(
        setup, source.own, source.coarse, source.fine, device=source.device,
        where=f"client {source.own.client_id}",
    )  # fmt: skip


def _lengths(
    scorer: Scorer, synthesizer: Callable[[int], Synthesizer], rounds: int
) -> list[dict[str, Any]]:
    """Scores of minority samples with the own model after halves of its training."""
    points = []
    numbers = sorted({max(1, rounds // 2**k) for k in range(4)})
    for number in numbers:
        source = synthesizer(number)
        own, group = source.own, list(source.own.groups)[-1]
        classes = own.groups[group]
        labels = group_labels(classes, min(scorer.count, LENGTH_IMAGES))
        print(f"client {own.client_id}, {group}: after {number} of {rounds} rounds")
        shown = source.shown(f"client {own.client_id} samples of {group}", labels)
        drawn = shown.sample(labels, seed=scorer.config.run.seed), labels
        scores = scorer.scores(drawn, group=group, classes=classes, own=own)
        points.append({"share": number / rounds, "group": group, "scores": scores})
    return points


def _use(scorer: Scorer, source: Synthesizer, *, alone: bool) -> dict[str, Any]:
    """Accuracies by row: `samples`, and `own` and `others` in the cell of training alone, or
    `gaussians` and `together` where the shared model is class Gaussians."""
    own, test = source.own, scorer.test
    recipe = Recipe(num_steps=scorer.config.evaluation.classifier_steps)
    minority = own.minority or own.majority
    seed, client = scorer.config.run.seed, own.client_id
    training = own.images.subset(own.train)

    def network(row: str, others: Labelled | None) -> list[np.ndarray]:
        print(f"client {client}, classifier: {row}")
        return own_log_probabilities(
            training, others, test.images, minority=minority, seed=seed, recipe=recipe,
            device=source.device,
            progress=lambda n: work_progress(f"client {client} classifier {row} {n + 1}"),
        )  # fmt: skip

    labels = group_labels(minority, scorer.count)
    shown = source.shown(f"client {client} samples for a classifier", labels)
    answers = {"samples": network("samples", (shown.sample(labels, seed=seed), labels))}
    if alone:
        answers["own"] = network("own", None)
        answers["others"] = network("others", scorer.others(client, minority))
    if isinstance(source.coarse, GaussianDenoiser):
        read = source.gaussian_classifier().log_probabilities(test.images)
        answers["gaussians"] = [read]
        answers["together"] = [
            scores + recipe.gaussian_weight * np.maximum(read, -1e3)
            for scores in network("own", None)
        ]
    rows = {
        row: dataclasses.asdict(use_of(scores, test.labels, minority=minority))
        for row, scores in answers.items()
    }
    return {**rows, "recipe": dataclasses.asdict(recipe)}


def _own_pictures(source: Synthesizer) -> dict[str, np.ndarray]:
    """The client's own training images of each group, at most 20."""
    own, shown = source.own, {}
    training = own.images.subset(own.train)
    for group, classes in own.groups.items():
        each = max(1, 20 // len(classes))
        rows = [np.flatnonzero(training.labels == label)[:each] for label in classes]
        shown[f"own_{group}"] = training.images[np.concatenate(rows)]
    return shown
