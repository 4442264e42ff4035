"""A private network above the hand-over: class statistics, a warm-up, rounds of noised gradients.

After the last round of sums the server trains the network on draws of the class Gaussians, which
costs nothing. Then it sends the weights, a round at a time, adds up the noised sums of clipped
gradients that clients answer with, and takes a step of AdamW with their mean

    (sum of all clients' sums) C / (sqrt(L) q N),    N images of the clients that answered.

Rounds after those train fine models alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from typing import Any

import torch
from flwr.common import NDArrays, Parameters

from fedpdm import wire
from fedpdm.diffusion.following import FollowingTrainer
from fedpdm.diffusion.training import Trainer, select_device
from fedpdm.jobs.progress import work_progress
from fedpdm.privacy.mechanism import ReleasedGradient, largest_total, mechanism_of
from fedpdm.rng import Purpose, torch_generator
from fedpdm.setup.build import (
    GAUSSIANS,
    NETWORK,
    build_denoiser,
    build_gaussians,
    build_network_settings,
    named_part,
)
from fedpdm.setup.losses import drawn_batch_loss
from fedpdm.setup.run_setup import RunSetup
from fedpdm.wire.types import Phase
from strategies.answers import ClientAnswer, encode_arrays
from strategies.coarse import Weights
from strategies.gaussians import CoarseGaussians

__all__ = ["CoarseNetwork"]


def _named(prefix: str, tensors: Weights) -> Weights:
    return {prefix + name: tensor for name, tensor in tensors.items()}


class CoarseNetwork(CoarseGaussians):
    """Its `weights` are those of the network and the tensors of the Gaussians, by prefixes."""

    def __init__(self, *, setup: RunSetup, announce: Callable[[str], None], **options: Any) -> None:
        super().__init__(setup=setup, announce=announce, **options)
        plan = setup.release_plan.gradients
        assert plan is not None  # or this is another strategy's run
        self._plan, self._config = plan, setup.config
        self._device = select_device(setup.config.run.device)
        settings = build_network_settings(setup.config, warm_up=False)
        self._trainer = FollowingTrainer(
            build_denoiser(setup, "coarse"), settings, device=self._device
        )
        self._size = sum(w.numel() for w in self._trainer.weights().values())
        self._total = torch.zeros(0, dtype=torch.int64)
        self._images = 0

    def _number(self, round: int) -> int:
        """Of a round of the network's plan, from 1; others are outside of [1, its rounds]."""
        return round - len(self._planned)

    def phase(self, round: int) -> Phase:
        inside = 1 <= self._number(round) <= self._plan.rounds
        return Phase.GRADIENT if inside else super().phase(round)

    def fit_message(self, round: int) -> Parameters:
        if self.phase(round) is not Phase.GRADIENT:
            return super().fit_message(round)
        return encode_arrays(wire.encode_model(named_part(self.weights, NETWORK)))

    def begin(self, round: int, clients: Collection[int]) -> None:
        super().begin(round, clients)
        self._total, self._images = torch.zeros(self._size, dtype=torch.int64), 0

    def largest_message(self, num_examples: int) -> int:
        """Four bytes for each parameter, and the round's number."""
        if self._asked is not None:
            return super().largest_message(num_examples)
        return 4 * self._size + 8

    def accept(self, round: int, answer: ClientAnswer, message: NDArrays) -> None:
        """A sum of gradients is added to those of the round."""
        if self.phase(round) is not Phase.GRADIENT:
            super().accept(round, answer, message)
            return
        who, count = f"client {answer.client_id}", answer.num_examples
        released = wire.decode_release(
            message, who=who, client_id=answer.client_id, mechanism=self._plan.mechanism
        )
        if not isinstance(released, ReleasedGradient):
            raise wire.WireError(f"release of {who}: expected noised gradients")
        got, number = released.parameters, self._number(round)
        if not mechanism_of(self._plan).same(got, self._plan) or int(released.round) != number:
            raise wire.WireError(
                f"release of {who}: round {int(released.round)} of {got}, expected round {number} "
                f"of {self._plan}"
            )
        if released.seeded and not self.settings.simulation:
            raise wire.WireError(f"release of {who}: its noise is seeded, outside simulation")
        if count < 1 or len(released.total) != self._size:
            raise wire.WireError(
                f"release of {who}: must be {self._size} numbers of at least 1 image, got "
                f"{len(released.total)} of {count}"
            )
        total, most = released.total.long(), largest_total(self._plan, count)
        if (largest := int(total.abs().max())) > most:
            raise wire.WireError(
                f"release of {who}: a sum of {count} gradients must be within {most} steps, "
                f"got {largest}"
            )
        self._total += total
        self._images += count

    def merge(self, round: int) -> dict[str, float]:
        if round == len(self._planned):
            metrics = super().merge(round)
            gaussians, self.weights = dict(self.weights), {}
            return metrics | self._warm_up(gaussians)
        if self.phase(round) is not Phase.GRADIENT:
            return super().merge(round)
        expected = self._plan.sample_rate * self._images
        mean = self._total.double() / (self._plan.steps * expected)
        sizes = [w.numel() for w in self._trainer.weights().values()]
        gradients = {
            name: part.view(weight.shape).to(weight)
            for (name, weight), part in zip(
                self._trainer.weights().items(), mean.split(sizes), strict=True
            )
        }
        self._trainer.follow(gradients, what=f"network round {self._number(round)}")
        self._take()
        noise = self._plan.noise_multiplier * self._plan.clip_norm
        clients = len(self.book.now.answers)
        return {
            "network_steps": self._trainer.step,
            "gradient_norm": float(mean.norm()),
            "gradient_noise": noise * math.sqrt(clients * self._size) / expected,
        }

    def _warm_up(self, gaussians: Weights) -> dict[str, float]:
        """Train the network on draws of the Gaussians; its average is what private rounds go on
        from."""
        here = {name: tensor.to(self._device) for name, tensor in gaussians.items()}
        model = self._trainer.model
        first = Trainer(
            model, build_network_settings(self._config, warm_up=True), device=self._device
        )
        shared = build_gaussians(self._setup, here).gaussians
        loss, share = drawn_batch_loss(self._setup, model, shared)
        report = first.train(
            loss,
            sample_weights=share,
            num_steps=self._config.network.warmup_steps,
            generator=torch_generator(
                self._config.run.seed, Purpose.SERVER_TRAINING, device=self._device
            ),
            progress=work_progress("network warm-up"),
            what="network warm-up",
        )
        average = {name: tensor.clone() for name, tensor in first.ema().items()}
        self._trainer.restart(average, step=0, what="network warm-up")
        self.weights = _named(GAUSSIANS, gaussians)
        self._take()
        return {"warmup_loss": report.loss, "warmup_steps": report.num_steps}

    def _take(self) -> None:
        """The trainer's weights as those of the run."""
        own = {name: w.cpu().clone() for name, w in self._trainer.weights().items()}
        self.weights = {**self.weights, **_named(NETWORK, own)}

    def average(self, round: int) -> None:
        """The trainer's average, over steps."""
        if self.weights:
            mean = {name: w.cpu().clone() for name, w in self._trainer.ema().items()}
            self.ema = {**self.weights, **_named(NETWORK, mean)}

    def extra_state(self) -> Weights:
        return self._trainer.state()

    def load_extra_state(self, tensors: Weights) -> None:
        self._trainer.load_state(tensors, what="server checkpoint")
