"""A client's samples and, in simulation, what they are worth against real images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from clients.local import LocalClient
from fedpdm.data import denormalize
from fedpdm.diffusion.denoisers import DenoisingFunction
from fedpdm.diffusion.sampling import sample_in_batches
from fedpdm.evaluation.measures import ImageJudge, group_labels, merge_named
from fedpdm.setup.build import coarse_share, sampler_options

__all__ = ["measure_images"]

Methods = dict[str, tuple[DenoisingFunction | None, DenoisingFunction | None]]


def _pixels(x: torch.Tensor, shift: float) -> np.ndarray:
    return denormalize(x.cpu(), shift=shift).numpy()


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
    setup, config = local.setup, local.config
    methods: Methods = {}
    if fine is None:
        methods["shared"] = (coarse, None)
    elif coarse is not None:
        methods["pfdm"] = (coarse, fine)
    if fine is not None and config.fine.t_range == "all":
        methods["alone"] = (None, fine)
    own_labels = local.held.train_labels
    options = {
        **sampler_options(config, setup.schedule, setup.plan),
        "coarse_share": coarse_share(config, own_labels, num_classes=local.setup.spec.num_classes),
        "image_shape": local.setup.spec.shape,
        "generator": generator,
        "batch_size": config.sampling.batch_size,
    }
    _store_pictures(local, methods, options)
    if not (local.raw_metrics and config.evaluation.image_metrics and local.reference):
        return {}
    parts = {}
    for group, classes in local.held.groups.items():
        judge = ImageJudge(local.reference, classes)
        labels = group_labels(classes, config.evaluation.num_images)
        wanted = torch.from_numpy(labels).to(generator.device)
        for method, (first, second) in methods.items():
            output = sample_in_batches(first, second, labels=wanted, **options)
            images = _pixels(output.images, setup.spec.shift)
            parts[f"{group}_{method}"] = judge.score(images, labels)
        held = np.flatnonzero(np.isin(local.held.images.labels, classes))
        if len(held) >= 2:  # fewer have no spread to compare
            own = local.held.images.images[held], local.held.images.labels[held]
            parts[f"{group}_own"] = judge.score(*own)
    return merge_named(parts)


def _store_pictures(
    local: LocalClient,
    methods: Methods,
    options: dict[str, Any],
) -> None:
    """`per_class` samples of every class with every method, kept in the client's store."""
    per_class = local.config.sampling.per_class
    labels = torch.arange(local.setup.spec.num_classes).repeat_interleave(per_class)
    wanted = labels.to(options["generator"].device)
    arrays: dict[str, np.ndarray] = {"labels": labels.numpy()}
    for method, (first, second) in methods.items():
        output = sample_in_batches(first, second, labels=wanted, **options)
        arrays[method] = _pixels(output.images, local.setup.spec.shift)
        if output.coarse is not None:
            arrays["coarse"] = _pixels(output.coarse, local.setup.spec.shift)
    local.store.save_samples(arrays)
