"""What a sampler passes through on its way from noise to an image.

The denoisers are asked through a recorder, so the states are those of `fedpdm.diffusion.sampling`
itself, for any scheduler. A state x_t = a (x_0 - shift) + noise is shown as x_t + a * shift:
mid-grey noise at first, the image at last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fedpdm.config import RunConfig
from fedpdm.data import denormalize
from fedpdm.diffusion.denoisers import NO_LABEL, DenoisingFunction
from fedpdm.diffusion.sampling import sample
from fedpdm.diffusion.training import load_named, select_device
from fedpdm.rng import Purpose, torch_generator
from fedpdm.setup.build import build_denoiser, sampler_options
from fedpdm.setup.run_setup import set_up

__all__ = ["Chain", "State", "coarse_chain", "record_states"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Chain:
    """Models to sample with; `options` are `sampling.sample`'s."""

    coarse: DenoisingFunction | None
    fine: DenoisingFunction | None
    image_shape: tuple[int, int, int]
    num_classes: int
    shift: float
    device: torch.device
    options: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, eq=False)
class State:
    """One step: who is asked next (`coarse`, `fine`, `both`; `image` at the end), at which t.

    `noisy` and `estimate` are uint8 (N, C, H, W): x_t, and the clean images that the answer
    expects; the last state has no estimate.
    """

    stage: str
    t: int
    noisy: np.ndarray
    estimate: np.ndarray | None


def coarse_chain(config: RunConfig, weights: Mapping[str, torch.Tensor]) -> Chain:
    """The shared model alone, by its (EMA) weights: what a server can sample.

    `ValueError` if the weights are not this config's.
    """
    setup = set_up(config)
    spec = setup.spec
    device = select_device(config.run.device)
    model = build_denoiser(setup, "coarse").to(device)
    target = dict(model.network.named_parameters())
    load_named(target, {k: v.to(device) for k, v in weights.items()}, what="coarse weights")
    return Chain(
        coarse=model.eval(),
        fine=None,
        image_shape=spec.shape,
        num_classes=spec.num_classes,
        shift=spec.shift,
        device=device,
        options=sampler_options(config, setup.schedule, setup.plan),
    )


def record_states(
    chain: Chain, labels: np.ndarray, *, seed: int, client: int = 0
) -> tuple[State, ...]:
    """Sample an image for each label (int64 (N,)) and keep every state; equal seeds, equal noise.

    `client` chooses the noise, as for that client's own samples.
    """
    wanted = torch.from_numpy(labels).to(chain.device)
    generator = torch_generator(seed, Purpose.SAMPLING, client=client, device=chain.device)
    x_T = torch.randn((len(wanted), *chain.image_shape), generator=generator, device=chain.device)
    recorder = _Recorder(chain, wanted)
    output = sample(
        recorder.asking("coarse") if chain.coarse is not None else None,
        recorder.asking("fine") if chain.fine is not None else None,
        x_T,
        labels=wanted,
        generator=generator,
        **chain.options,
    )
    factor = recorder.release_factor if chain.fine is None else 1.0
    end = State(
        stage="image", t=0, noisy=_shown(output.images, shift=factor * chain.shift), estimate=None
    )
    return (*recorder.states, end)


class _Recorder:
    """Passes questions on and keeps them with their answers."""

    def __init__(self, chain: Chain, labels: torch.Tensor) -> None:
        self.states: list[State] = []
        self._chain, self._count = chain, len(labels)
        self._guidance = float(chain.options.get("guidance", 1.0))
        self._abar = chain.options["schedule"].alpha_bar
        two_chains = chain.options.get("chain") == "noise_to_noise" and chain.coarse is not None
        # A coarse model of the paper's chain draws releases, which are images times this.
        self.release_factor = self._abar(chain.options["t0"]) ** 0.5 if two_chains else 1.0
        self._share: torch.Tensor | None = None
        share = chain.options.get("coarse_share")
        if share is not None and chain.coarse is not None and chain.fine is not None:
            place = torch.where(labels == NO_LABEL, len(share) - 1, labels)
            self._share = share.to(chain.device)[place].view(-1, 1, 1, 1)
        self._before: torch.Tensor | None = None  # the other model's answer at this t

    def asking(self, role: str) -> DenoisingFunction:
        model = getattr(self._chain, role)

        def ask(
            x_t: torch.Tensor,
            t: torch.Tensor,
            *,
            labels: torch.Tensor,
            clipped: torch.Tensor | None = None,
        ) -> torch.Tensor:
            answer: torch.Tensor = model(x_t, t, labels=labels, clipped=clipped)
            self._keep(role, x_t[: self._count], int(t[0]), answer)
            return answer

        return ask

    def _keep(self, role: str, x_t: torch.Tensor, t: int, answer: torch.Tensor) -> None:
        estimate = answer
        if len(answer) == 2 * self._count:  # classifier-free guidance, as in the sampler
            conditional, null = answer.chunk(2)
            estimate = null + self._guidance * (conditional - null)
        stage = role
        if self._share is not None and role == "coarse":  # the fine model was asked just before
            assert self._before is not None
            estimate = torch.lerp(self._before, estimate, self._share)
            stage = "both"
            self.states.pop()
        self._before = estimate
        factor = self.release_factor if role == "coarse" else 1.0
        shift = self._chain.shift
        self.states.append(
            State(
                stage=stage,
                t=t,
                noisy=_shown(x_t, shift=factor * self._abar(t) ** 0.5 * shift),
                estimate=_shown(estimate / factor, shift=shift),
            )
        )


def _shown(x: torch.Tensor, *, shift: float) -> np.ndarray:
    return denormalize(x.detach().float().cpu(), shift=shift).numpy()
