"""Images of a run, as each of its clients would draw them.

What a client samples with depends on the run: coarse then fine model, the shared model of a
baseline alone, or the client's own model alone. Only EMA weights are used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fedpdm.config import RunConfig
from fedpdm.data import ImageSet, denormalize
from fedpdm.data.client_images import ClientImages, client_images
from fedpdm.data.loading import build_partitions, load_split
from fedpdm.diffusion.denoisers import Denoiser
from fedpdm.diffusion.sampling import sample_in_batches
from fedpdm.diffusion.training import load_named, select_device
from fedpdm.rng import Purpose, torch_generator
from fedpdm.setup.build import build_denoiser, coarse_share, sampler_options
from fedpdm.setup.run_setup import set_up
from fedpdm.storage.client_store import ClientStore
from fedpdm.storage.files import read_tensors
from fedpdm.storage.run_directory import RunDirectory

__all__ = ["Synthesizer", "open_synthesizer"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Synthesizer:
    """Draws images for one client. `own` is what the client holds.

    `coarse` and `fine` are the models that there are; `options` are `sampling.sample`'s.
    """

    own: ClientImages
    config: RunConfig
    coarse: Denoiser | None
    fine: Denoiser | None
    image_shape: tuple[int, int, int]
    shift: float
    device: torch.device
    options: dict[str, Any]

    def sample(self, labels: np.ndarray, *, seed: int) -> np.ndarray:
        """uint8 (N, C, H, W) for labels int64 (N,); equal seeds draw equal noise."""
        output = sample_in_batches(
            self.coarse,
            self.fine,
            image_shape=self.image_shape,
            labels=torch.from_numpy(labels).to(self.device),
            generator=torch_generator(
                seed, Purpose.SAMPLING, client=self.own.client_id, device=self.device
            ),
            batch_size=self.config.sampling.batch_size,
            **self.options,
        )
        return denormalize(output.images.cpu(), shift=self.shift).numpy()

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
    coarse: Mapping[str, torch.Tensor] | None = None,
) -> Synthesizer:
    """Load a client's models of a finished run; `ValueError`, one line, if it has none.

    `images` is the run's `train` split where it is at hand already; `coarse` are the shared
    model's weights in a run that has not finished.
    """
    config = run.config()
    names = ("coarse.safetensors", "privacy.json")  # written when the last round is over
    for name in names[not config.kind.has_shared_model :] if coarse is None else ():
        if not (run.root / name).exists():
            raise ValueError(f"{run.root}: this run has not finished ({name} is missing)")
    images = load_split(config, "train") if images is None else images
    own = client_images(config, images, build_partitions(config, images), client_id)
    setup = set_up(config, images)
    spec = setup.spec
    device = select_device(config.run.device)
    weights: dict[str, Mapping[str, torch.Tensor]] = {}
    if config.kind.has_shared_model:
        path = run.root / "coarse.safetensors"
        weights["coarse"] = read_tensors(path)[0] if coarse is None else coarse
    if config.kind.has_fine_model:
        store = ClientStore(run.client_path(client_id))
        state = store.load_state(store.last_round(), "fine")
        if not state:
            raise ValueError(f"{store.root}: client {client_id} has no fine model there")
        weights["fine"] = {
            name.removeprefix("ema."): tensor
            for name, tensor in state.items()
            if name.startswith("ema.")
        }
    models: dict[str, Denoiser] = {}
    for role, tensors in weights.items():
        model = build_denoiser(setup, role).to(device)
        target = dict(model.network.named_parameters())
        load_named(target, {k: v.to(device) for k, v in tensors.items()}, what=f"{role} weights")
        models[role] = model.eval()
    share = coarse_share(config, own.train_labels, num_classes=spec.num_classes)
    return Synthesizer(
        own=own,
        config=config,
        coarse=models.get("coarse"),
        fine=models.get("fine"),
        image_shape=spec.shape,
        shift=spec.shift,
        device=device,
        options={**sampler_options(config, setup.schedule, setup.plan), "coarse_share": share},
    )
