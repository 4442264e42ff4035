"""The paper's Algorithm 1: clients upload their releases once, the server trains the coarse model.

The releases are already private, so training on them is post-processing. They are kept under the
run directory so that a resumed run need not ask for them again. To keep progress and checkpoints
alike in both modes, the server's steps are spread over the rounds in which clients train their
fine models.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from flwr.common import NDArrays, Parameters, ndarrays_to_parameters

from fedpdm import wire
from fedpdm.diffusion.knowledge import Knowledge
from fedpdm.diffusion.training import BatchLoss, Trainer, class_weights, select_device
from fedpdm.privacy.mechanism import (
    join,
    mechanism_of,
    release_metadata,
    released_images,
    restore_release,
)
from fedpdm.privacy.types import Release, ReleasedDataset
from fedpdm.rng import Purpose, torch_generator
from fedpdm.setup.build import (
    build_denoiser,
    build_optimizer_settings,
    server_steps_per_round,
)
from fedpdm.setup.losses import coarse_batch_loss, coarse_knowledge
from fedpdm.setup.run_setup import RunSetup
from fedpdm.storage.run_directory import RunDirectory
from fedpdm.wire.types import Phase
from strategies.answers import ClientAnswer
from strategies.coarse import CoarseStrategy, Weights

__all__ = ["CoarseServerTraining"]


def keep_release(run: RunDirectory, client_id: int, released: Release, *, part: str = "") -> None:
    """Keep what a client uploaded in the run directory."""
    metadata = release_metadata(
        released.parameters,
        released.event,
        noise_source=released.noise_source,
        seeded=released.seeded,
    )
    run.save_upload(client_id, released.tensors(), metadata, part=part)


def kept_releases(run: RunDirectory) -> list[ReleasedDataset]:
    """All uploads, in the order of client ids; `ValueError` for one that is malformed."""
    return [
        released_images(restore_release(tensors, metadata))
        for tensors, metadata in run.load_uploads()
    ]


class CoarseServerTraining(CoarseStrategy):
    """Collects `ReleasedDataset`s in the first round and trains on them in every round."""

    def __init__(self, *, setup: RunSetup, **options: Any) -> None:
        super().__init__(**options)
        config = setup.config
        self._config, self._setup, self._spec = config, setup, setup.spec
        self._accepted: list[int] = []  # whose releases came in this round
        self._releasing = False
        self._device = select_device(config.run.device)
        model = build_denoiser(setup, "coarse")
        settings = build_optimizer_settings(config, "coarse", at_server=True)
        self._trainer = Trainer(model, settings, device=self._device)
        self._trainer.load_weights(self.weights, what="initial coarse weights")

    def phase(self, round: int) -> Phase:
        return Phase.RELEASE if round == 1 else Phase.FINE

    def fit_message(self, round: int) -> Parameters:
        """Nothing: no client trains the coarse model, so weights travel for evaluation alone."""
        return ndarrays_to_parameters(wire.encode_nothing())

    def accept(self, round: int, answer: ClientAnswer, message: NDArrays) -> None:
        """A release goes to disk at once."""
        if self.phase(round) is not Phase.RELEASE:
            super().accept(round, answer, message)
            return
        released = released_images(
            wire.decode_release(
                message,
                who=f"client {answer.client_id}",
                client_id=answer.client_id,
                mechanism=self._config.privacy.release,
            )
        )
        self._check(released, answer)
        keep_release(self._run, answer.client_id, released)
        self._accepted.append(answer.client_id)

    def begin(self, round: int, clients: Collection[int]) -> None:
        self._accepted = []
        self._releasing = self.phase(round) is Phase.RELEASE

    def largest_message(self, num_examples: int) -> int:
        """Float32 values and an int64 label for each image, whatever the encoding."""
        per_image = 4 * math.prod(self._spec.shape) + 8
        return max(0, num_examples) * per_image if self._releasing else 0

    def abandon(self) -> None:
        for client_id in self._accepted:
            self._run.drop_upload(client_id)

    def _check(self, released: ReleasedDataset, answer: ClientAnswer) -> None:
        """`wire.WireError` for a release that is not what was asked for."""
        got, shape = released.parameters, tuple(released.x_tilde.shape[1:])
        if released.seeded and not self.settings.simulation:
            raise wire.WireError(
                f"release of client {answer.client_id}: its noise is seeded, outside simulation"
            )
        wanted = self._setup.release_plan.images
        same = mechanism_of(wanted).same(got, wanted)
        if not same or shape != self._spec.shape:
            raise wire.WireError(
                f"release of client {answer.client_id}: made with {got} of images {shape}, "
                f"expected {wanted} of {self._spec.shape}"
            )
        if len(released) != answer.num_examples:
            raise wire.WireError(
                f"release of client {answer.client_id}: {len(released)} images; Flower says "
                f"{answer.num_examples}"
            )
        labels = released.labels
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self._spec.num_classes:
            raise wire.WireError(
                f"release of client {answer.client_id}: labels must be in "
                f"[0, {self._spec.num_classes - 1}]"
            )

    def training_data(self) -> tuple[BatchLoss, torch.Tensor, Knowledge | None]:
        """(loss on all releases, their labels, what counts the knowledge of answers)."""
        released, known = self._collected(), coarse_knowledge(self._setup)
        loss = coarse_batch_loss(
            self._setup,
            self._trainer.model,
            released,
            training=True,
            device=self._device,
            known=known,
        )
        return loss, released.labels, known

    def merge(self, round: int) -> dict[str, float]:
        """Train on all that there is."""
        loss, labels, known = self.training_data()
        balance = self._config.coarse.class_balance
        report = self._trainer.train(
            loss,
            sample_weights=class_weights(labels, balance=balance),
            num_steps=server_steps_per_round(self._config),
            generator=torch_generator(
                self._config.run.seed, Purpose.SERVER_TRAINING, round=round, device=self._device
            ),
            what=f"server round {round} coarse",
        )
        self.weights = {k: v.cpu().clone() for k, v in self._trainer.weights().items()}
        metrics = {"coarse_loss": report.loss, "server_steps": report.num_steps}
        if known is not None and known.share is not None:
            metrics["coarse_known"] = known.share
        return metrics

    def average(self, round: int) -> None:
        """The trainer's average, over steps."""
        self.ema = {k: v.cpu().clone() for k, v in self._trainer.ema().items()}

    def extra_state(self) -> Weights:
        return self._trainer.state()

    def load_extra_state(self, tensors: Weights) -> None:
        self._trainer.load_state(tensors, what="server checkpoint")

    def _collected(self) -> ReleasedDataset:
        """All clients' releases as one, in the order of client ids."""
        parts = kept_releases(self._run)
        if not parts:
            raise wire.WireError("server training: no release was collected")
        return join(parts)
