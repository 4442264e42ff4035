"""A client's own work: the release, coarse steps on it, fine steps on raw images.

Free of Flower, except for the arrays of a message. Everything is kept in the client's store.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
from flwr.common import NDArrays, Scalar

from clients.bounds import check_release
from clients.diary import tell_owner
from clients.failures import kept_at_home
from clients.local import LocalClient
from clients.workers import WriteBehind, borrowed
from fedpdm import wire
from fedpdm.data import ImageSet
from fedpdm.data.members import save_members
from fedpdm.diffusion.denoisers import Denoiser
from fedpdm.diffusion.knowledge import Knowledge
from fedpdm.diffusion.training import BatchLoss, Progress, Trainer, class_weights, select_device
from fedpdm.jobs.progress import count_progress, work_progress
from fedpdm.privacy.mechanism import released_images
from fedpdm.privacy.releases import ReleaseRequest
from fedpdm.privacy.statement import baseline_statement, client_statement, plain_text
from fedpdm.privacy.types import Release, ReleasedDataset
from fedpdm.rng import Purpose, torch_generator
from fedpdm.setup.losses import (
    coarse_batch_loss,
    coarse_knowledge,
    fine_batch_loss,
    raw_coarse_batch_loss,
)
from fedpdm.wire.types import CoarseUpdate

__all__ = ["LocalTraining"]


def _show_from(show: Progress, start: int, total: int, done: int, _: int, loss: float) -> None:
    """Progress of a chunk that began at step `start` of `total`."""
    show(start + done, total, loss)


def _coarse_progress(where: str, known: Knowledge | None) -> Progress:
    """Without the loss where it hardly moves (`fedpdm.reporting.shared_words`)."""
    if known is None:
        return work_progress(where)
    show = count_progress(where, "step")
    return lambda done, total, _: show(done, total)


class LocalTraining:
    """One client's training, between its images and its store. Use under the store's lock."""

    def __init__(self, local: LocalClient) -> None:
        self.local = local
        self.config = local.config
        self.setup = local.setup
        self.device = select_device(self.config.run.device)
        self.fine_loss: float | None = None  # of the last round's fine steps; it may stay at home
        if self.config.run.threads:
            torch.set_num_threads(self.config.run.threads)

    @property
    def deployed(self) -> bool:
        """Whether the server is another party, to which nothing private may be shown."""
        return not self.config.run.simulation

    def clock(self, seconds: float) -> float:
        """A time as it may be sent: a deployed client's in whole seconds, for fractions of any
        precision could carry other things."""
        return math.ceil(seconds) if self.deployed else seconds

    @property
    def who(self) -> str:
        """The client's name in errors."""
        return f"client {self.local.client_id}"

    def ledger_marks(self) -> dict[str, str]:
        """What a deployed client shows of its ledger: random numbers, so that the server notices a
        store that was set back (`strategies.ledgers`)."""
        if not self.deployed:
            return {}
        return {"ledger": self.local.releases.ledger().marks}

    def release(self) -> ReleasedDataset:
        """The release of all local images; those never released before are noised now."""
        local = self.local
        assert self.setup.release_plan.images  # else `ConfigError`, before anything is released
        return released_images(self.obtain(local.held.images))

    def statistics(self, stage: int, public: Mapping[str, torch.Tensor]) -> Release:
        """Noised sums of the local training images in a round of the plan, counted from 0.

        Images that are held out are in no sum. `public` is what the server made of earlier rounds.
        """
        held = self.local.held
        return self.obtain(held.images.subset(held.train), stage=stage, public=public)

    def obtain(
        self,
        images: ImageSet,
        *,
        obtain: Callable[[ImageSet, ReleaseRequest], Release] | None = None,
        **asked: Any,
    ) -> Release:
        """The release of these images from the store, after the node's own checks; by `obtain`
        where it is not a whole one."""
        local, store = self.local, self.local.store
        local.releases.check_history(store.ledger_heads())
        request = self.setup.release_request(
            client=local.client_id, allow_new_release=local.allow_new_release, **asked
        )
        check_release(local.policy, local.releases, images, request)
        before = local.releases.ledger()
        head = before.head
        if obtain is None:
            show = count_progress(f"{self.who} release", "image")
            released = local.releases.obtain(images, request, progress=show)
        else:
            released = obtain(images, request)
        after = local.releases.ledger()
        if local.tells_owner and after.head != head:
            new = sum(record.images for record in after.releases()[len(before.releases()) :])
            tell_owner(self.who, f"released {new} images for the first time, of {len(images)}")
        if after.head != head or store.load_statement() is None:
            statement = client_statement(local.releases, delta=self.config.privacy.delta)
            store.save_statement(statement, plain_text(statement))
        return released

    def coarse_loss(
        self, model: Denoiser, indices: np.ndarray, *, training: bool
    ) -> tuple[BatchLoss, bool, Knowledge | None]:
        """(loss of the shared model on the images at `indices`, whether their noise is seeded, what
        counts the knowledge of its answers).

        On the release of these images, or for baselines on the raw ones, without the last.
        """
        options: dict[str, Any] = {"training": training, "device": self.device}
        if self.config.kind.releases:
            released, known = self.release(), coarse_knowledge(self.setup)
            loss = coarse_batch_loss(
                self.setup, model, released, subset=indices, known=known, **options
            )
            return loss, released.seeded, known
        images = self.local.held.images
        loss = raw_coarse_batch_loss(
            self.setup,
            model,
            images=images.images[indices],
            labels=images.labels[indices],
            **options,
        )
        return loss, False, None

    def borrowed(
        self, role: str, *, fresh: bool = False
    ) -> AbstractContextManager[Trainer[Denoiser]]:
        """A trainer for a block; see `clients.workers`."""
        return borrowed(self.local, role, device=self.device, fresh=fresh)

    def generator(self, purpose: Purpose, round: int, chunk: int = 0) -> torch.Generator:
        """The client's random stream for a purpose, round and chunk, on its device."""
        return torch_generator(
            self.config.run.seed,
            purpose,
            client=self.local.client_id,
            round=round,
            chunk=chunk,
            device=self.device,
        )

    def record_members(self, role: str, basis: str) -> None:
        """Note in the store that a model is trained on the images at `train`, in this form."""
        if self.local.held.members is not None:
            save_members(
                self.local.store.root / "members.json",
                self.local.held.members.with_model(role, basis),
            )

    def train_coarse(
        self,
        parameters: NDArrays,
        round: int,
        config: dict[str, Scalar],
        write: WriteBehind,
    ) -> tuple[NDArrays, dict[str, Any]]:
        """Local coarse steps from the received weights; Adam's moments stay with the client."""
        store, indices = self.local.store, self.local.held.train
        self.record_members("coarse", self.config.kind.basis)
        received = wire.decode_model(parameters)
        with self.borrowed("coarse") as trainer:
            trainer.restart(
                received,
                moments=store.load_state(store.last_round(), "coarse"),
                step=(round - 1) * self.config.coarse.steps_per_round,
                what=f"coarse weights from the server, or moments of {self.who}",
            )
            loss, seeded, known = self.coarse_loss(trainer.model, indices, training=True)
            mu = float(config.get("proximal_mu", 0.0))
            anchor = received if mu > 0 else None
            if self.config.aggregation.encoding == "float32":
                received = {}  # weights are sent as they are
            labels = torch.from_numpy(self.local.held.images.labels[indices])
            where = f"{self.who} round {round} coarse"
            report = trainer.train(
                loss,
                sample_weights=class_weights(labels, balance=self.config.coarse.class_balance),
                num_steps=self.config.coarse.steps_per_round,
                generator=self.generator(Purpose.COARSE_TRAINING, round),
                anchor=anchor,
                proximal_mu=mu,
                progress=_coarse_progress(where, known),
                what=where,
            )
            update = CoarseUpdate(
                weights=trainer.weights(),
                num_examples=len(indices),
                client_id=self.local.client_id,
                round=round,
                seeded=seeded,
                basis=self.config.kind.basis,
            )
            kept = ("exp_avg", "step")  # Adam's moments and their age; the weights are the server's
            moments = {k: v for k, v in trainer.state().items() if k.startswith(kept)}
            write(
                functools.partial(store.draft_state, round, "coarse", moments),
                num_bytes=sum(tensor.nbytes for tensor in moments.values()),
            )
        metrics: dict[str, Any] = {
            "coarse_loss": report.loss,
            "coarse_steps": report.num_steps,
            "coarse_seconds": self.clock(report.seconds),
            "coarse_images": report.num_images,
        }
        if known is not None and known.share is not None:
            metrics["coarse_known"] = known.share
        # Moments and EMA of a large model go before the message is made: memory peaks there.
        del trainer, loss, moments
        message = wire.encode_update(
            update,
            encoding=self.config.aggregation.encoding,
            base=received,
            generator=torch_generator(
                self.config.run.seed, Purpose.ROUNDING, client=self.local.client_id, round=round
            ),
            simulation=not self.deployed,
        )
        return message, metrics

    def train_fine(self, round: int) -> dict[str, Any]:
        """Fine steps on raw images, in chunks that are checkpointed and seeded one by one.

        If they fail, a deployed client keeps its last fine model, and answers as if they had not.
        """
        section = self.config.fine
        metrics: dict[str, Any] = {"fine_images": section.steps_per_round * section.batch_size}
        store, what = self.local.store, f"round {round} fine"
        with kept_at_home(store, what, who=self.who, deployed=self.deployed) as failed:
            losses = self._train_fine(round)
            self.fine_loss = float(np.mean(losses)) if losses else None
            if self.fine_loss is not None and self.local.raw_metrics:
                metrics["fine_loss"] = self.fine_loss
        if failed:
            with kept_at_home(store, what, who=self.who, deployed=self.deployed):
                store.draft_previous_state(round, "fine")
        return metrics

    def _train_fine(self, round: int) -> list[float]:
        """Train and draft the fine model; the losses of the chunks that were trained now."""
        store = self.local.store
        self.record_members("fine", "raw")
        labels = self.local.held.train_labels
        if not (self.config.kind.releases or not self.deployed):  # no trace of a release
            statement = baseline_statement(self.config)
            store.save_statement(statement, plain_text(statement))
        store.save_class_counts(np.bincount(labels, minlength=self.local.held.images.num_classes))
        chunks_done, state, notes = store.load_partial(round) or (0, None, {})
        if state is None:
            state = store.load_state(store.last_round(), "fine")
        with self.borrowed("fine", fresh=not state) as trainer:
            if state:
                trainer.load_state(state, what=f"fine state of {self.who}")
            del state
            losses = self._fine_steps(trainer, round, chunks_done, notes)
            store.draft_state(round, "fine", trainer.state())
        return losses

    def _fine_steps(
        self, trainer: Trainer[Denoiser], round: int, chunks_done: int, notes: dict[str, Any]
    ) -> list[float]:
        """The round's chunks from `chunks_done` on; returns the losses of all, earlier ones by the
        `notes` of their checkpoint."""
        local, section, model = self.local, self.config.fine, trainer.model
        loss = fine_batch_loss(
            self.setup,
            model,
            images=local.held.images.images[local.held.train],
            labels=local.held.train_labels,
            device=self.device,
        )
        labels = torch.from_numpy(local.held.train_labels)
        where = f"{self.who} round {round} fine"
        show = work_progress(where)
        total, size = section.steps_per_round, section.checkpoint_every
        losses = list(notes.get("losses", ()))
        for chunk, start in enumerate(range(0, total, size)):
            if chunk < chunks_done:
                continue
            report = trainer.train(
                loss,
                sample_weights=class_weights(labels, balance=section.class_balance),
                num_steps=min(size, total - start),
                generator=self.generator(Purpose.FINE_TRAINING, round, chunk),
                progress=functools.partial(_show_from, show, start, total),
                what=where,
            )
            losses.append(report.loss)
            if start + size < total:
                notes = {"losses": losses}
                local.store.save_partial(round, chunk + 1, trainer.state(), notes)
        return losses
