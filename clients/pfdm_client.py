"""The PFDM client: keeps images, release and fine model; sends coarse updates and releases.

One `fit` is one round: coarse steps on the stored release from the received weights (federated
training) or the release itself (server training, first round), and fine steps on raw images. All
state is in the client's store, so the object is made anew for every message, a replayed round is
answered from the store, and an interrupted one goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from flwr.client import NumPyClient
from flwr.common import NDArrays, Scalar

from clients.diary import round_words, tell_owner
from clients.failures import EXPECTED, failure_line, kept_at_home
from clients.gradients import noised_gradient
from clients.keeping import keep_end, keep_round
from clients.local import LocalClient
from clients.samples import measure_images
from clients.training import LocalTraining
from clients.workers import WriteBehind
from fedpdm import wire
from fedpdm.diffusion.denoisers import Denoiser, DenoisingFunction
from fedpdm.diffusion.weights import load_named
from fedpdm.evaluation.measures import mean_loss
from fedpdm.privacy.mechanism import select
from fedpdm.privacy.types import Release
from fedpdm.reporting.shared_words import shared_words
from fedpdm.rng import Purpose
from fedpdm.setup.build import build_shared
from fedpdm.storage.client_store import Reply
from fedpdm.storage.files import StoreError
from fedpdm.wire.types import Phase

__all__ = ["PFDMClient"]


class PFDMClient(NumPyClient):
    """See the module. Errors in input are reported as an `error` metric, with no payload."""

    def __init__(self, local: LocalClient) -> None:
        self.work = LocalTraining(local)
        self.local = local
        self.config = local.config

    # Flower's interface.

    def get_properties(self, config: dict[str, Scalar]) -> dict[str, Scalar]:
        with contextlib.suppress(StoreError):  # the release will say what is wrong with it
            return {"client_id": self.local.client_id, **self.work.ledger_marks()}
        return {"client_id": self.local.client_id}

    def fit(
        self, parameters: NDArrays, config: dict[str, Scalar]
    ) -> tuple[NDArrays, int, dict[str, Scalar]]:
        try:
            with self.local.store.lock():
                reply = self._fit(parameters, int(config["round"]), config)
            metrics = self._checked({**reply.metrics, **self.work.ledger_marks()})
        except self._caught as error:
            return [], 0, self._failure(error)
        message = [np.frombuffer(reply.payload, dtype=np.uint8)] if reply.payload else []
        if self.local.tells_owner:
            size, loss = len(reply.payload or b""), self.work.fine_loss
            words = round_words(reply.round, metrics, num_bytes=size, fine_loss=loss)
            tell_owner(self.work.who, words)
        return message, reply.num_examples, metrics

    def evaluate(
        self, parameters: NDArrays, config: dict[str, Scalar]
    ) -> tuple[float, int, dict[str, Scalar]]:
        try:
            with self.local.store.lock():
                metrics = self._evaluate(parameters, config)
            checked = self._checked(metrics)
        except self._caught as error:
            return 0.0, 0, self._failure(error)
        if self.local.tells_owner and (known := shared_words(metrics)):
            number = config.get("round")
            name = f"round {number} evaluated" if isinstance(number, int) else "evaluated"
            tell_owner(self.work.who, f"{name}: {', '.join(known)}")
        loss = metrics.get("heldout_coarse_loss", 0.0)  # the checked ones leave out NaN
        return float(loss), int(metrics["num_heldout"]), checked

    # What a message asks for.

    @property
    def _caught(self) -> tuple[type[Exception], ...]:
        """Errors that become an answer: of a deployed client all, for Flower sends their text."""
        return (Exception,) if self.work.deployed else EXPECTED

    def _failure(self, error: Exception) -> dict[str, Scalar]:
        line = failure_line(error, who=self.work.who, deployed=self.work.deployed)
        return {"client_id": self.local.client_id, "error": line}

    def _checked(self, metrics: Mapping[str, Any]) -> dict[str, Scalar]:
        return dict(
            wire.check_metrics(
                metrics,
                allow_raw=self.local.raw_metrics,
                whole_seconds=self.work.deployed,
                who=self.work.who,
            )
        )

    def _fit(self, parameters: NDArrays, round: int, config: dict[str, Scalar]) -> Reply:
        store = self.local.store
        request = wire.fingerprint(parameters)
        done = store.last_round()
        if round <= done:
            reply = store.load_reply(round)
            if reply is None or reply.request != request:
                raise StoreError(
                    f"{store.root}: round {round} was finished before with other coarse weights; "
                    f"the store is {self.work.who}'s of another run or a later state of this one"
                )
            kept = {
                name: self.work.clock(value) if name in wire.CLOCKS else value
                for name, value in reply.metrics.items()
                if self.local.raw_metrics or name not in wire.RAW_METRICS  # since turned off
            }
            return Reply(**{**vars(reply), "metrics": {**kept, "replayed": True}})
        started = time.perf_counter()
        store.begin_round(round)
        with WriteBehind() as write:
            message, metrics = self._shared_part(parameters, round, config, write)
            payload: Any = message[0] if message else b""
            del message  # once it is on disk, fine training needs the memory
            write(functools.partial(store.draft_payload, round, payload), num_bytes=len(payload))
            del payload
            if self.config.kind.has_fine_model:
                metrics |= self.work.train_fine(round)
        metrics["seconds"] = self.work.clock(time.perf_counter() - started)
        reply = store.finish_round(
            Reply(
                round=round,
                payload=None,
                num_examples=len(self.local.held.train),
                metrics=metrics,
                request=request,
                ledger=self.local.releases.ledger().head,
            )
        )
        keep_round(self.work, round, reply.metrics)
        return reply

    def _shared_part(
        self, parameters: NDArrays, round: int, config: dict[str, Scalar], write: WriteBehind
    ) -> tuple[NDArrays, dict[str, Any]]:
        """What the round's phase asks for besides fine training: the message and its metrics."""
        metrics: dict[str, Any] = {
            "client_id": self.local.client_id,
            "num_released": len(self.local.held.images) if self.config.kind.releases else 0,
        }
        gaussians = self.local.setup.has_gaussians
        if gaussians:
            metrics["num_released"] = len(self.local.held.train)
        phase = str(config["phase"])
        if phase == Phase.FINE:
            return wire.encode_nothing(), metrics
        sums = len(self.local.setup.release_plan.sums) if gaussians else 0
        if phase == Phase.RELEASE and gaussians:
            if not 1 <= round <= sums:
                raise ValueError(f"round {round}: no sums are planned in it")
            public = wire.decode_model(parameters) if parameters else {}
            released = self.work.statistics(round - 1, public)
            self.work.record_members("coarse", "released")
            return self._upload(released), metrics
        if phase == Phase.RELEASE:
            train = select(self.work.release(), torch.from_numpy(self.local.held.train))
            self.work.record_members("coarse", "released")
            return self._upload(train), metrics
        if phase == Phase.GRADIENT and self.local.setup.has_network:
            sent = noised_gradient(self.work, round - sums, wire.decode_model(parameters))
            self.work.record_members("coarse", "released")
            return self._upload(sent), metrics
        if phase == Phase.COARSE:
            message, trained = self.work.train_coarse(parameters, round, config, write)
            return message, metrics | trained
        raise ValueError(f"phase must be coarse, release, gradient or fine, got {phase!r}")

    def _upload(self, released: Release) -> NDArrays:
        encoding = self.config.aggregation.encoding
        return wire.encode_release(released, client_id=self.local.client_id, encoding=encoding)

    def _evaluate(self, parameters: NDArrays, config: dict[str, Scalar]) -> dict[str, Any]:
        final = bool(config.get("final", False))
        shared: dict[str, torch.Tensor] = {}
        metrics: dict[str, Any] = {
            "client_id": self.local.client_id,
            "num_heldout": len(self.local.held.train),
        }
        if not self.config.kind.has_shared_model:
            metrics |= self._final_images(None) if final else {}
        elif not self.local.setup.has_gaussians:
            shared = wire.decode_model(parameters)
            with self.work.borrowed("coarse") as trainer:
                trainer.load_weights(shared, what="coarse weights")
                trainer.model.eval()
                metrics = self._evaluate_model(trainer.model, final=final)
        elif final:
            shared = wire.decode_model(parameters)
            tensors = {name: tensor.to(self.work.device) for name, tensor in shared.items()}
            metrics |= self._final_images(build_shared(self.local.setup, tensors))
        if final:
            keep_end(self.work, shared, metrics)
        return metrics

    def _evaluate_model(self, coarse: Denoiser, *, final: bool) -> dict[str, Any]:
        heldout = self.local.held.heldout if len(self.local.held.heldout) else self.local.held.train
        loss, _, known = self.work.coarse_loss(coarse, heldout, training=False)
        value = mean_loss(
            loss,
            num_examples=len(heldout),
            generator=self.work.generator(Purpose.EVALUATION, 0),
        )
        metrics: dict[str, Any] = {
            "client_id": self.local.client_id,
            "heldout_coarse_loss": value,
            "num_heldout": len(heldout),
        }
        if known is not None and known.share is not None:
            metrics["heldout_coarse_known"] = known.share
        if final:
            metrics |= self._final_images(coarse)
        return metrics

    def _final_images(self, coarse: DenoisingFunction | None) -> dict[str, float]:
        """Sample with the finished models; the pictures stay in the client's store.

        Whether that succeeds depends on the fine model, so a deployed client does not say it.
        """
        metrics: dict[str, float] = {}
        store, work = self.local.store, self.work
        with kept_at_home(store, "samples", who=work.who, deployed=work.deployed):
            metrics |= self._sampled(coarse)
        return metrics

    def _sampled(self, coarse: DenoisingFunction | None) -> dict[str, float]:
        store = self.local.store
        last = store.last_round()
        if last == 0:
            return {}  # never selected for training
        options: dict[str, Any] = {
            "coarse": coarse,
            "generator": self.work.generator(Purpose.SAMPLING, last),
        }
        if not self.config.kind.has_fine_model:
            return measure_images(self.local, fine=None, **options)
        state = store.load_state(last, "fine")
        if not state:
            raise StoreError(f"{store.root}: the fine model of round {last} is missing")
        with self.work.borrowed("fine") as trainer:
            trainer.load_state(state, what=f"fine state of {self.work.who}")
            load_named(trainer.weights(), trainer.ema(), what="EMA of the fine model")
            trainer.model.eval()
            return measure_images(self.local, fine=trainer.model, **options)
