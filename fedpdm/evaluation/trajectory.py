"""What a sampler passes through on its way from noise to an image.

The denoisers are watched while they answer, so the states are those of the sampler itself, for any
scheduler. A state x_t = a (x_0 - shift) + noise is shown as x_t + a * shift: mid-grey noise at
first, the image at last.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from fedpdm.data import denormalize
from fedpdm.diffusion.combined import Watched
from fedpdm.diffusion.denoisers import DenoisingFunction
from fedpdm.diffusion.from_gaussians import begin, first_level, way_down
from fedpdm.diffusion.gaussian import GaussianDenoiser
from fedpdm.diffusion.twostage import Stage, as_asked, run_stages, stages
from fedpdm.rng import Purpose, torch_generator
from fedpdm.setup.pair import ModelPair

__all__ = ["State", "record_states"]


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


def record_states(
    pair: ModelPair[Any], labels: np.ndarray, *, seed: int, client: int = 0
) -> tuple[State, ...]:
    """Sample an image for each label (int64 (N,)) and keep every state; equal seeds, equal noise.

    `client` chooses the noise, as for that client's own samples. Class Gaussians take one step: a
    draw, noised to the hand-over. Of several candidates these are the first ones.
    """
    settings, wanted = pair.settings, torch.from_numpy(labels).to(pair.device)
    generator = torch_generator(seed, Purpose.SAMPLING, client=client, device=pair.device)
    states: list[State] = []
    asked: list[str] = []  # about the state at hand

    def noting(role: str, denoiser: DenoisingFunction) -> DenoisingFunction:
        return Watched(denoiser, lambda *_: asked.append(role))

    def keep(stage: str, x_t: torch.Tensor, level: int, x0_hat: torch.Tensor, scale: float) -> None:
        a = settings.schedule.alpha_bar(level) ** 0.5
        states.append(
            State(
                stage=stage,
                t=level,
                noisy=_shown(x_t, shift=scale * a * pair.spec.shift),
                estimate=_shown(x0_hat / scale, shift=pair.spec.shift),
            )
        )

    def keeping(stage: Stage) -> Stage:
        def watch(x_t: torch.Tensor, t: torch.Tensor, x0_hat: torch.Tensor) -> None:
            role = "both" if len(set(asked)) > 1 else asked[0]
            keep(role, x_t, int(t[0]), x0_hat, stage.scale)
            asked.clear()

        return replace(stage, denoiser=Watched(stage.denoiser, watch))

    shared = pair.coarse if isinstance(pair.coarse, GaussianDenoiser) else None
    if shared is not None and not (pair.fine is not None and settings.coarse_share is not None):
        level = first_level(shared, settings)
        x_0, x = begin(
            shared.gaussians, settings, image_shape=pair.spec.shape, labels=wanted,
            generator=generator, level=level,
        )  # fmt: skip
        keep("coarse", x, level, x_0, 1.0)
        chains = way_down(shared, pair.fine, settings, watched=noting)
        x = x if chains else x_0
    else:
        shape = (len(wanted), *pair.spec.shape)
        x = torch.randn(shape, generator=generator, device=pair.device)
        coarse, fine = as_asked(pair.coarse, pair.fine, settings)
        chains = stages(
            None if coarse is None else noting("coarse", coarse),
            None if fine is None else noting("fine", fine),
            settings,
        )
    x = run_stages(
        [keeping(stage) for stage in chains], x, settings, labels=wanted, generator=generator
    )
    scale = chains[-1].scale if chains else 1.0
    last = _shown(x, shift=scale * pair.spec.shift)
    return (*states, State(stage="image", t=0, noisy=last, estimate=None))


def _shown(x: torch.Tensor, *, shift: float) -> np.ndarray:
    return denormalize(x.detach().float().cpu(), shift=shift).numpy()
