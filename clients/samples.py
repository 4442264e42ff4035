"""A client's samples and, in simulation, what they are worth against real images."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from clients.local import LocalClient
from fedpdm.build import ReleasePlan, sampler_options
from fedpdm.data import denormalize
from fedpdm.denoisers import DenoisingFunction
from fedpdm.evaluation import ImageJudge, group_labels, merge_named
from fedpdm.sampling import sample_in_batches
from fedpdm.schedule import NoiseSchedule

__all__ = ["measure_images"]


def _pixels(x: torch.Tensor, shift: float) -> np.ndarray:
    return denormalize(x.cpu(), shift=shift).numpy()


def measure_images(
    local: LocalClient,
    *,
    coarse: DenoisingFunction,
    fine: DenoisingFunction,
    schedule: NoiseSchedule,
    plan: ReleasePlan,
    generator: torch.Generator,
) -> dict[str, float]:
    """Sample with coarse then fine, and with the fine model alone; store pictures; return metrics.

    `alone` needs a fine model that was trained at every t (`fine.t_range: all`). Metrics are
    empty where the config does not ask for them or the client does not allow them.
    """
    config = local.config
    methods: dict[str, DenoisingFunction | None] = {"pfdm": coarse}
    if config.fine.t_range == "all":
        methods["alone"] = None
    options = {
        **sampler_options(config, schedule, plan),
        "image_shape": local.spec.shape,
        "generator": generator,
        "batch_size": config.sampling.batch_size,
    }
    _store_pictures(local, methods, fine, plan, options)
    if not (local.raw_metrics and config.evaluation.image_metrics and local.reference):
        return {}
    parts = {}
    for group, classes in local.groups.items():
        judge = ImageJudge(local.reference, classes)
        labels = group_labels(classes, config.evaluation.num_images)
        wanted = torch.from_numpy(labels).to(generator.device)
        for method, first in methods.items():
            output = sample_in_batches(first, fine, labels=wanted, **options)
            images = _pixels(output.images, plan.shift)
            parts[f"{group}_{method}"] = judge.score(images, labels)
        held = np.flatnonzero(np.isin(local.images.labels, classes))
        if len(held) >= 2:  # fewer have no spread to compare
            own = local.images.images[held], local.images.labels[held]
            parts[f"{group}_own"] = judge.score(*own)
    return merge_named(parts)


def _store_pictures(
    local: LocalClient,
    methods: dict[str, DenoisingFunction | None],
    fine: DenoisingFunction,
    plan: ReleasePlan,
    options: dict[str, Any],
) -> None:
    """`per_class` samples of every class with every method, kept in the client's store."""
    per_class = local.config.sampling.per_class
    labels = torch.arange(local.spec.num_classes).repeat_interleave(per_class)
    wanted = labels.to(options["generator"].device)
    arrays: dict[str, np.ndarray] = {"labels": labels.numpy()}
    for method, first in methods.items():
        output = sample_in_batches(first, fine, labels=wanted, **options)
        arrays[method] = _pixels(output.images, plan.shift)
        if output.coarse is not None:
            arrays["coarse"] = _pixels(output.coarse, plan.shift)
    local.store.save_samples(arrays)
