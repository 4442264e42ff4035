"""Training steps: AdamW, warm-up and decay, gradient clipping, EMA, mixed precision.

A `Trainer` is a denoiser with its optimiser, its exponential moving average and a step count;
`state` and `load_state` give and take all of it as named tensors, so that a run can stop between
any two chunks and go on exactly. Losses are passed in: this module does not know objectives.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch

from fedpdm.diffusion.denoisers import TrainableDenoiser
from fedpdm.diffusion.weights import load_named

__all__ = [
    "BatchLoss",
    "Gradient",
    "OptimizerSettings",
    "Progress",
    "Pull",
    "TrainReport",
    "Trainer",
    "class_weights",
    "select_device",
]


@dataclass(frozen=True, kw_only=True)
class TrainReport:
    """What a stretch of training did: mean loss, steps, images seen and wall seconds."""

    loss: float
    num_steps: int
    num_images: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        return self.num_images / self.seconds if self.seconds > 0 else 0.0


BatchLoss = Callable[[torch.Tensor, torch.Generator], torch.Tensor]
"""(indices int64 (B,), generator) -> loss per example (B,)."""

Progress = Callable[[int, int, float], None]
"""(steps done, steps in all, current loss) -> None."""


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """How a model is trained. Steps count over the whole run, not over a round.

    `decay` is `constant` or `cosine` (to zero at `total_steps`); `ema_decay` is the limit of
    min(ema_decay, (1 + step) / (10 + step)); `precision` is auto, float32 or bfloat16.
    """

    lr: float
    batch_size: int
    total_steps: int
    warmup_steps: int = 100
    decay: str = "cosine"
    weight_decay: float = 0.0
    beta2: float = 0.99
    grad_clip: float = 1.0
    ema_decay: float = 0.999
    precision: str = "auto"

    def learning_rate(self, step: int) -> float:
        """Learning rate of the step with this index, counted from 0."""
        rate = self.lr * min(1.0, (step + 1) / max(1, self.warmup_steps))
        if self.decay == "cosine":
            rate *= 0.5 * (1.0 + math.cos(math.pi * min(1.0, step / max(1, self.total_steps))))
        return rate


def select_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA where there is one, else the CPU.

    `ValueError` for a device that is not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the meta device can be made, but holds nothing
    except (RuntimeError, AssertionError) as error:
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"run.device {name!r} cannot be used here: {line}") from None
    return device


def class_weights(labels: torch.Tensor, *, balance: float) -> torch.Tensor:
    """Sampling weight per image, float64 (N,): n_k^(-balance) for an image of class k.

    balance 0 is uniform over images, 1 uniform over the classes that are there.
    """
    if not 0.0 <= balance <= 1.0:
        raise ValueError(f"class_balance must be in [0, 1], got {balance}")
    counts = torch.bincount(labels)
    return counts[labels].double() ** -balance


@dataclass(frozen=True, kw_only=True, eq=False)
class Pull:
    """FedProx: mu (w - to) is added to the gradient; `to` in the order of the parameters."""

    to: list[torch.Tensor]
    mu: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Gradient:
    """A step's loss and norm of its gradient, scalars on the device.

    `count` weighs the loss in the mean over steps: equal where all batches are equally large.
    """

    loss: torch.Tensor
    count: int
    norm: torch.Tensor


Model = TypeVar("Model", bound=TrainableDenoiser)


class Trainer(Generic[Model]):
    """A denoiser in training: model, AdamW moments, EMA and step count."""

    def __init__(self, model: Model, settings: OptimizerSettings, *, device: torch.device) -> None:
        self.settings = settings
        self.device = device
        self.model: Model = model.to(device)
        if device.type == "cuda":
            self.model = self.model.to(memory_format=torch.channels_last)
        self._named = dict(self.model.network.named_parameters())
        self._parameters: list[torch.Tensor] = list(self._named.values())
        self._ema = [p.detach().clone() for p in self._parameters]
        self._optimizer = torch.optim.AdamW(
            self._parameters,
            lr=settings.lr,
            betas=(0.9, settings.beta2),
            weight_decay=settings.weight_decay,
            fused=True,
        )
        self.step = 0
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
        self._autocast = settings.precision == "bfloat16" or (settings.precision == "auto" and bf16)

    def weights(self) -> dict[str, torch.Tensor]:
        """The network's current weights by name (views, not copies)."""
        return {name: p.detach() for name, p in self._named.items()}

    def ema(self) -> dict[str, torch.Tensor]:
        """The moving average of the weights by name (views, not copies)."""
        return dict(zip(self._named, self._ema, strict=True))

    def load_weights(self, weights: Mapping[str, torch.Tensor], *, what: str) -> None:
        """Set the current weights (not EMA, not moments); strict, see `load_named`."""
        load_named(self.weights(), weights, what=what)

    def restart(
        self,
        weights: Mapping[str, torch.Tensor],
        *,
        moments: Mapping[str, torch.Tensor] | None = None,
        step: int,
        what: str,
    ) -> None:
        """Go on from these weights, which become the EMA too; strict, see `load_named`.

        `moments` are `state`'s entries that begin with exp_avg, and step; none: Adam starts anew.
        """
        own = {f"model.{name}": tensor for name, tensor in weights.items()}
        own |= {f"ema.{name}": tensor for name, tensor in weights.items()}
        self.load_state({"step": torch.tensor(0), **own, **(moments or {})}, what=what)
        self.step = step

    def state(self) -> dict[str, torch.Tensor]:
        """Everything that the next step depends on, as named tensors on the CPU."""
        tensors = {f"model.{name}": p for name, p in self.weights().items()}
        tensors |= {f"ema.{name}": p for name, p in self.ema().items()}
        for name, p in self._named.items():
            moments = self._optimizer.state.get(p, {})
            for key in ("exp_avg", "exp_avg_sq"):
                if key in moments:
                    tensors[f"{key}.{name}"] = moments[key]
        tensors = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
        tensors["step"] = torch.tensor(self.step)
        return tensors

    def load_state(self, state: Mapping[str, torch.Tensor], *, what: str) -> None:
        """Inverse of `state`; `ValueError` if names, shapes or dtypes differ."""
        if "step" not in state or state["step"].numel() != 1:
            raise ValueError(f"{what}: step is missing or not one number")
        groups: dict[str, dict[str, torch.Tensor]] = {}
        for key, tensor in state.items():
            prefix, _, name = key.partition(".")
            groups.setdefault(prefix, {})[name] = tensor
        if unknown := groups.keys() - {"model", "ema", "exp_avg", "exp_avg_sq", "step"}:
            raise ValueError(f"{what}: unknown entries {sorted(unknown)}")
        load_named(self.weights(), groups.get("model", {}), what=what)
        load_named(self.ema(), groups.get("ema", {}), what=what)
        self.step = int(groups["step"][""])
        slots = self._optimizer.state
        if "exp_avg" not in groups and "exp_avg_sq" not in groups:
            slots.clear()  # a state from before the first step
            return
        for key in ("exp_avg", "exp_avg_sq"):
            for p in self._parameters:
                if key not in slots[p]:
                    slots[p][key] = torch.empty_like(p)
            moments = {name: slots[p][key] for name, p in self._named.items()}
            load_named(moments, groups.get(key, {}), what=f"{what}, {key}")
        for p in self._parameters:
            slots[p]["step"] = torch.tensor(float(self.step), device=self.device)

    def _descend(self) -> None:
        """AdamW with the gradients that there are, and the moving average."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.settings.learning_rate(self.step)
        self._optimizer.step()
        self.step += 1
        decay = min(self.settings.ema_decay, (1.0 + self.step) / (10.0 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self._ema, self._parameters, 1.0 - decay)

    def train(
        self,
        batch_loss: BatchLoss,
        *,
        sample_weights: torch.Tensor,
        num_steps: int,
        generator: torch.Generator,
        anchor: Mapping[str, torch.Tensor] | None = None,
        proximal_mu: float = 0.0,
        progress: Progress | None = None,
        what: str = "training",
    ) -> TrainReport:
        """Take `num_steps` steps.

        Args:
            batch_loss: loss per example of a batch of indices.
            sample_weights: float64 (N,), how often each example is drawn (with replacement).
            generator: drives batches, timesteps and noise; on `device`.
            anchor: weights that FedProx pulls towards, with strength `proximal_mu`
                (Li et al. 2020, Eq. 2).
            progress: called about every 20 steps.
            what: named in errors.

        Raises:
            FloatingPointError: the loss or the gradient became NaN or infinite; names the first
                such step.
        """
        started = time.perf_counter()
        self.model.train()
        if num_steps < 1:
            return TrainReport(loss=0.0, num_steps=0, num_images=0, seconds=0.0)
        pull = None
        if anchor and proximal_mu > 0:
            pull = Pull(to=[anchor[name].to(self.device) for name in self._named], mu=proximal_mu)
        trace = torch.zeros(num_steps, 2, device=self.device)  # loss, norm of the gradient
        counts: list[int] = []
        checked = 0
        gradients = self._gradients(
            batch_loss, sample_weights, num_steps, generator=generator, pull=pull, what=what
        )
        with gradients as next_gradient:
            for index in range(num_steps):
                found = next_gradient()
                self._descend()
                trace[index, 0], trace[index, 1] = found.loss, found.norm
                counts.append(found.count)
                if index % 20 == 0 or index + 1 == num_steps:
                    recent = trace[checked : index + 1].tolist()  # one wait for the device
                    _check_finite(recent, first_step=self.step - len(recent) + 1, what=what)
                    checked = index + 1
                    if progress is not None:
                        progress(index + 1, num_steps, recent[-1][0])
        self._optimizer.zero_grad(set_to_none=True)
        weights = torch.tensor(counts, dtype=torch.float64, device=self.device)
        mean = (trace[:, 0].double() * weights).sum() / weights.sum().clamp(min=1)
        return TrainReport(
            loss=float(mean),
            num_steps=num_steps,
            num_images=num_steps * self.settings.batch_size,
            seconds=time.perf_counter() - started,
        )

    @contextlib.contextmanager
    def _gradients(
        self,
        batch_loss: BatchLoss,
        sample_weights: torch.Tensor,
        num_steps: int,
        *,
        generator: torch.Generator,
        pull: Pull | None,
        what: str,
    ) -> Iterator[Callable[[], Gradient]]:
        """What leaves the gradient of one step after another in `parameter.grad`, ready to use.

        It is called `num_steps` times inside the block; arguments as for `train`. This and
        `_descend` are all that a step is: a trainer of another kind replaces them.
        """
        size = self.settings.batch_size
        batches = iter(
            torch.multinomial(
                sample_weights.to(self.device),
                num_steps * size,
                replacement=True,
                generator=generator,
            ).view(num_steps, size)
        )

        def next_gradient() -> Gradient:
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self._autocast):
                loss = batch_loss(next(batches), generator).mean()
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            if pull is not None:
                gradients = [p.grad for p in self._parameters if p.grad is not None]
                with torch.no_grad():
                    torch._foreach_add_(gradients, self._parameters, alpha=pull.mu)
                    torch._foreach_add_(gradients, pull.to, alpha=-pull.mu)
            norm = torch.nn.utils.clip_grad_norm_(self._parameters, self.settings.grad_clip)
            return Gradient(loss=loss.detach(), count=1, norm=norm)

        yield next_gradient


def _check_finite(rows: list[list[float]], *, first_step: int, what: str) -> None:
    """`FloatingPointError` naming the first step whose (loss, gradient) is not finite."""
    for step, row in enumerate(rows, first_step):
        for name, value in zip(("loss", "gradient"), row, strict=True):
            if not math.isfinite(value):
                raise FloatingPointError(f"{what}: {name} is {value} at step {step}")
