"""A client's samples and, in simulation, their scores against real images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from clients.local import LocalClient
from fedpdm.data import denormalize
from fedpdm.diffusion.denoisers import DenoisingFunction
from fedpdm.diffusion.gaussian import GaussianDenoiser
from fedpdm.evaluation.choosing import choose_sampling
from fedpdm.evaluation.measures import ImageJudge, group_labels, merge_named
from fedpdm.setup.build import coarse_share, sampler_settings
from fedpdm.setup.choice import SamplingChoice, is_open, load_choice, save_choice
from fedpdm.setup.pair import ModelPair

__all__ = ["measure_images"]


def measure_images(
    local: LocalClient,
    *,
    coarse: DenoisingFunction | None,
    fine: DenoisingFunction | None,
    generator: torch.Generator,
) -> dict[str, float]:
    """Sample with coarse then fine, and with each alone; store pictures; return metrics.

    `alone` needs a fine model that was trained at every t (`fine.t_range: all`), `shared` a coarse
    model that was (baselines). Metrics are empty where the config does not ask for them or the
    client does not allow them.
    """
    config, setup, held = local.config, local.setup, local.held
    choice = _choice(local, coarse, fine, device=generator.device)
    share = coarse_share(config, held.train_labels, num_classes=setup.spec.num_classes)
    pair = ModelPair(
        coarse=coarse,
        fine=fine,
        spec=setup.spec,
        settings=sampler_settings(setup, share=share, choice=choice),
        device=generator.device,
    )
    methods: dict[str, ModelPair[Any]] = {}
    if fine is None:
        methods["shared"] = pair
    elif coarse is not None:
        methods["pfdm"] = pair
    if fine is not None and config.fine.t_range == "all":
        methods["alone"] = replace(pair, coarse=None)
    _store_pictures(local, methods, generator)
    if not (local.raw_metrics and config.evaluation.image_metrics and local.reference):
        return {}
    parts = {}
    where = _where(local)
    for group, classes in held.groups.items():
        judge = ImageJudge(local.reference, classes)
        labels = group_labels(classes, config.evaluation.num_images)
        for method, models in methods.items():
            shown = models.shown(f"{where} samples of {group}, {method}", labels)
            images = shown.draw_pixels(labels, generator=generator)
            parts[f"{group}_{method}"] = judge.score(images, labels)
        rows = np.flatnonzero(np.isin(held.images.labels, classes))
        if len(rows) >= 2:  # fewer have no spread to compare
            own = held.images.images[rows], held.images.labels[rows]
            parts[f"{group}_own"] = judge.score(*own)
    return merge_named(parts)


def _where(local: LocalClient) -> str:
    """Client and round, as in the progress of training: what `fedpdm run` shows."""
    return f"client {local.client_id} round {local.store.last_round()}"


def _choice(
    local: LocalClient,
    coarse: DenoisingFunction | None,
    fine: DenoisingFunction | None,
    *,
    device: torch.device,
) -> SamplingChoice | None:
    """How the client samples, as far as the config leaves it open: chosen once with the models of
    its last round, and kept in its store. A deployed client's owner is told, nobody else."""
    if not (is_open(local.setup) and isinstance(coarse, GaussianDenoiser) and fine is not None):
        return None
    last = local.store.last_round()
    choice = load_choice(local.store, round=last)
    if choice is None:
        choice = choose_sampling(
            local.setup, local.held, coarse, fine, device=device, where=_where(local)
        )
        save_choice(local.store, choice, round=last)
        if not local.config.run.simulation:
            print(f"client {local.client_id}: samples with {choice.words}", flush=True)
    return choice


def _store_pictures(
    local: LocalClient, methods: Mapping[str, ModelPair[Any]], generator: torch.Generator
) -> None:
    """`per_class` samples of every class with every method, kept in the client's store."""
    spec = local.setup.spec
    labels = np.arange(spec.num_classes, dtype=np.int64).repeat(local.config.sampling.per_class)
    arrays: dict[str, np.ndarray] = {"labels": labels}
    for method, models in methods.items():
        shown = models.shown(f"{_where(local)} samples, {method}", labels)
        output = shown.draw(labels, generator=generator)
        arrays[method] = denormalize(output.images.cpu(), shift=spec.shift).numpy()
        if output.coarse is not None:
            arrays["coarse"] = denormalize(output.coarse.cpu(), shift=spec.shift).numpy()
    local.store.save_samples(arrays)
