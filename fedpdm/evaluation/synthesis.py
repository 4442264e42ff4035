"""Images of a run, as each of its clients would draw them.

What a client samples with depends on the run: coarse then fine model, the shared model of a
baseline alone, or the client's own model alone. Only EMA weights are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedpdm.config import RunConfig
from fedpdm.data import ImageSet
from fedpdm.data.client_images import ClientImages, client_images
from fedpdm.data.loading import build_partitions, load_split
from fedpdm.diffusion.denoisers import Denoiser
from fedpdm.diffusion.training import select_device
from fedpdm.evaluation.gaussian_classifier import GaussianClassifier, as_classifier
from fedpdm.rng import Purpose, torch_generator
from fedpdm.setup.build import coarse_share
from fedpdm.setup.choice import SamplingChoice, load_choice
from fedpdm.setup.pair import ModelPair, check_finished, client_weights, load_pair, shared_weights
from fedpdm.setup.run_setup import set_up
from fedpdm.storage.client_store import ClientStore, store_label
from fedpdm.storage.run_directory import RunDirectory

__all__ = ["Synthesizer", "make_synthesizer", "open_synthesizer"]

Weights = Mapping[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class Synthesizer(ModelPair[Denoiser]):
    """Draws images for one client. `own` is what the client holds."""

    own: ClientImages
    config: RunConfig

    def sample(self, labels: np.ndarray, *, seed: int) -> np.ndarray:
        """uint8 (N, C, H, W) for labels int64 (N,); equal seeds draw equal noise."""
        client = self.own.client_id
        generator = torch_generator(seed, Purpose.SAMPLING, client=client, device=self.device)
        return self.draw_pixels(labels, generator=generator)

    def gaussian_classifier(self) -> GaussianClassifier:
        """The shared model as a classifier; `ValueError` unless it is class Gaussians."""
        return as_classifier(self.coarse, self.spec)

    def alone(self) -> Synthesizer:
        """The same client with its fine model at every t."""
        if self.fine is None or self.config.fine.t_range != "all":
            raise ValueError("training alone needs a fine model that was trained at every t")
        return replace(self, coarse=None)


def open_synthesizer(
    run: RunDirectory,
    client_id: int,
    *,
    images: ImageSet | None = None,
    coarse: Weights | None = None,
) -> Synthesizer:
    """Load a client's models of a finished run; `ValueError`, one line, if it has none.

    `images` is the run's `train` split where it is at hand already; `coarse` are the shared
    model's weights in a run that has not finished.
    """
    config = run.config()
    if coarse is None:
        check_finished(run, config)
    images = load_split(config, "train") if images is None else images
    own = client_images(config, images, build_partitions(config, images), client_id)
    fine = choice = None
    if not config.kind.has_shared_model:
        coarse = None
    elif coarse is None:
        coarse = shared_weights(run)
    if config.kind.has_fine_model:
        store = ClientStore(run.client_path(client_id), store_label(config, client_id))
        fine = client_weights(store)
        if not fine:
            raise ValueError(f"{store.root}: client {client_id} has no fine model there")
        choice = load_choice(store, round=store.last_round())
    return make_synthesizer(config, own, coarse=coarse, fine=fine, choice=choice)


def make_synthesizer(
    config: RunConfig,
    own: ClientImages,
    *,
    coarse: Weights | None,
    fine: Weights | None,
    choice: SamplingChoice | None = None,
) -> Synthesizer:
    """A client of this config with these models, which samples as it chose."""
    setup, device = set_up(config, own.images), select_device(config.run.device)
    share = coarse_share(config, own.train_labels, num_classes=setup.spec.num_classes)
    pair = load_pair(setup, coarse=coarse, fine=fine, device=device, share=share, choice=choice)
    return Synthesizer(own=own, config=config, **vars(pair))
