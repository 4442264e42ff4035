"""A coarse and a fine model that sample together, as a finished run and a client's store keep them.

Runs of some kinds have one of them only: a baseline's shared model, or a client's own. Only EMA
weights are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, Self, TypeVar

import numpy as np
import torch

from fedpdm.config import RunConfig
from fedpdm.data import denormalize
from fedpdm.data.spec import ImageSpec
from fedpdm.diffusion.denoisers import Denoiser, DenoisingFunction
from fedpdm.diffusion.from_gaussians import sample_from_gaussians, steps_from_gaussians
from fedpdm.diffusion.gaussian import GaussianDenoiser
from fedpdm.diffusion.training import select_device
from fedpdm.diffusion.twostage import (
    SamplerOutput,
    SamplerSettings,
    sample_in_batches,
    stages,
    steps_of,
)
from fedpdm.diffusion.weights import ema_weights, load_named
from fedpdm.jobs.progress import sum_progress
from fedpdm.setup.build import build_denoiser, build_shared, coarse_share, sampler_settings
from fedpdm.setup.choice import SamplingChoice, load_choice
from fedpdm.setup.run_setup import RunSetup, set_up, set_up_for
from fedpdm.storage.client_store import ClientStore
from fedpdm.storage.files import StoreError
from fedpdm.storage.node_run import NodeRun
from fedpdm.storage.run_directory import RunDirectory

__all__ = [
    "ModelPair",
    "check_finished",
    "client_weights",
    "load_pair",
    "node_pair",
    "shared_pair",
    "shared_weights",
]

Weights = Mapping[str, torch.Tensor]
D_co = TypeVar("D_co", bound=DenoisingFunction, covariant=True)


@dataclass(frozen=True, kw_only=True, eq=False)
class ModelPair(Generic[D_co]):
    """Models to sample with, as far as there are; `spec` is that of the images they draw."""

    coarse: D_co | None
    fine: D_co | None
    spec: ImageSpec
    settings: SamplerSettings
    device: torch.device

    def steps(self, labels: np.ndarray) -> int:
        """Steps of the chains for samples of these labels, over all of their candidates."""
        if isinstance(self.coarse, GaussianDenoiser):
            wanted = torch.from_numpy(labels)
            return steps_from_gaussians(self.coarse, self.fine, self.settings, wanted)
        chains = stages(self.coarse, self.fine, self.settings)
        return len(labels) * steps_of(chains, self.settings)

    def shown(self, title: str, labels: np.ndarray) -> Self:
        """The same models, which show under this title how far samples of these labels are."""
        watch = sum_progress(title, "step", self.steps(labels))
        return replace(self, settings=replace(self.settings, watch=watch))

    def draw(self, labels: np.ndarray, *, generator: torch.Generator) -> SamplerOutput:
        """One sample for each label, int64 (N,), -1 for none, in the models' scale."""
        options: dict[str, Any] = {
            "image_shape": self.spec.shape,
            "labels": torch.from_numpy(labels).to(self.device),
            "generator": generator,
        }
        if isinstance(self.coarse, GaussianDenoiser):
            return sample_from_gaussians(self.coarse, self.fine, self.settings, **options)
        return sample_in_batches(self.coarse, self.fine, self.settings, **options)

    def draw_pixels(self, labels: np.ndarray, *, generator: torch.Generator) -> np.ndarray:
        """As `draw`; the images as uint8 (N, C, H, W)."""
        images = self.draw(labels, generator=generator).images
        return denormalize(images.cpu(), shift=self.spec.shift).numpy()


def check_finished(run: RunDirectory, config: RunConfig) -> None:
    """`ValueError`, one line, if the run's last round is not over."""
    names = ("coarse.safetensors", run.STATEMENT)
    for name in names[not config.kind.has_shared_model :]:
        if not (run.root / name).exists():
            raise ValueError(f"{run.root}: this run has not finished ({name} is missing)")


def shared_weights(run: RunDirectory) -> dict[str, torch.Tensor]:
    """The shared model's EMA weights in a finished run."""
    return run.load_shared()


def client_weights(store: ClientStore) -> dict[str, torch.Tensor]:
    """EMA weights of the fine model after the client's last round; empty where there is none."""
    return ema_weights(store.load_state(store.last_round(), "fine"))


def load_pair(
    setup: RunSetup,
    *,
    coarse: Weights | None,
    fine: Weights | None,
    device: torch.device,
    share: torch.Tensor | None = None,
    choice: SamplingChoice | None = None,
    who: str = "",
) -> ModelPair[Denoiser]:
    """The run's denoisers with these weights, in `eval()`; None for none. The coarse one is a
    `GaussianDenoiser` in a run of class statistics.

    `share` is the client's `coarse_share`, `choice` how it chose to sample. `ValueError` if the
    weights are not this run's; `who` is added to what they are called.
    """

    def load(role: str, weights: Weights | None) -> Any:
        if weights is None:
            return None
        if role == "coarse" and setup.has_gaussians:
            return build_shared(setup, {n: t.to(device) for n, t in weights.items()})
        model = build_denoiser(setup, role).to(device)
        here = {name: tensor.to(device) for name, tensor in weights.items()}
        load_named(dict(model.network.named_parameters()), here, what=f"{role} weights{who}")
        return model.eval()

    return ModelPair(
        coarse=load("coarse", coarse),
        fine=load("fine", fine),
        spec=setup.spec,
        settings=sampler_settings(setup, share=share, choice=choice),
        device=device,
    )


def shared_pair(config: RunConfig, weights: Weights) -> ModelPair[Denoiser]:
    """The shared model alone: what a server can sample. `ValueError` for other weights."""
    device = select_device(config.run.device)
    return load_pair(set_up(config), coarse=weights, fine=None, device=device)


def node_pair(run: NodeRun) -> ModelPair[Denoiser]:
    """A node's models of a finished run, which sample as it chose; no image is read.

    `ValueError`, one line, if the run has not finished, or its fine model is not there.
    """
    config, store = run.config(), run.store
    check_finished(run, config)
    setup, last = set_up_for(config, _spec(run)), store.last_round()
    counts, fine = store.load_class_counts(), client_weights(store)
    if config.kind.has_fine_model and not fine:
        raise ValueError(f"{store.root}: the fine model is missing")
    held = np.zeros(setup.spec.num_classes, dtype=np.int64) if counts is None else counts
    return load_pair(
        setup,
        coarse=shared_weights(run) if config.kind.has_shared_model else None,
        fine=fine or None,
        device=select_device(config.run.device),
        share=coarse_share(
            config, np.repeat(np.arange(len(held)), held), num_classes=setup.spec.num_classes
        ),
        choice=load_choice(store, round=last),
    )


def _spec(run: NodeRun) -> ImageSpec:
    """The shape of the node's images; `StoreError` if its file does not say."""
    facts = run.facts()
    try:
        return ImageSpec(**facts["images"])
    except (KeyError, TypeError) as error:
        raise StoreError(f"{run.root}/node.json: images: {error}") from None
