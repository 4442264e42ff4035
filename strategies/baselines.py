"""Baselines in the same engine: training alone, and one model of all raw images at one place.

Both are for simulations, in which one party holds all images. Federated averaging of raw images
needs no strategy of its own: `CoarseFedAvg` averages what clients send.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from flwr.common import Parameters, ndarrays_to_parameters

from fedpdm import wire
from fedpdm.data.client_images import client_images
from fedpdm.data.loading import build_partitions, load_split
from fedpdm.diffusion.training import BatchLoss
from fedpdm.setup.losses import raw_coarse_batch_loss
from fedpdm.setup.run_setup import RunSetup
from fedpdm.wire.types import Phase
from strategies.coarse import CoarseStrategy
from strategies.server_training import CoarseServerTraining

__all__ = ["CentralisedTraining", "TrainingAlone"]


class TrainingAlone(CoarseStrategy):
    """No shared model: clients train their fine models and send nothing."""

    has_model = False

    def phase(self, round: int) -> Phase:
        return Phase.FINE

    def fit_message(self, round: int) -> Parameters:
        return ndarrays_to_parameters(wire.encode_nothing())

    def evaluation_message(self) -> Parameters:
        return ndarrays_to_parameters(wire.encode_nothing())

    def merge(self, round: int) -> dict[str, float]:
        return {}


class CentralisedTraining(CoarseServerTraining):
    """The server trains one model on the raw training images of all clients: no privacy at all."""

    def __init__(self, *, setup: RunSetup, **options: Any) -> None:
        super().__init__(setup=setup, **options)
        config = setup.config
        images = load_split(config, "train")
        parts = build_partitions(config, images)
        held = [client_images(config, images, parts, part.client_id) for part in parts]
        self._members = []
        for own in held:
            assert own.members is not None  # a simulation
            self._members.append(own.members.with_model("coarse", "raw"))
        self._pixels = np.concatenate([own.images.images[own.train] for own in held])
        self._labels = np.concatenate([own.train_labels for own in held])

    def phase(self, round: int) -> Phase:
        return Phase.FINE

    def training_data(self) -> tuple[BatchLoss, torch.Tensor, None]:
        """(loss on all clients' training images, their labels, None); records whose these are."""
        records = [record.fields() for record in self._members]
        self._run.write_json("server/members.json", {"clients": records})
        loss = raw_coarse_batch_loss(
            self._setup,
            self._trainer.model,
            images=self._pixels,
            labels=self._labels,
            training=True,
            device=self._device,
        )
        return loss, torch.from_numpy(self._labels), None
