"""Reconstruction of images from their uploads, by attackers who know more and more.

An upload is `x_tilde = sqrt(abar_t0) CLIP(x) + sqrt(1 - abar_t0) z`; what is wanted is x. Beside
the attackers with a denoiser (`fedpdm.attacks.denoising`) there are two without:

* none: `unclip x_tilde / sqrt(abar_t0)`, the upload rescaled only;
* blind: the mean of the other originals of the class, for who never saw the upload.

Clipping takes the length of an image and keeps its direction. Attackers whose answers are clipped
images multiply them with one public number, `unclip`: the median length of public images over C,
at least 1 (`unclip_factor`). Then everything is projected into the range of pixels (`bounds`),
which can only bring it nearer; re-identification looks at it before that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedpdm.attacks.denoising import METHODS, Reconstructor
from fedpdm.attacks.likelihood import check_release
from fedpdm.attacks.recovery import (
    Identification,
    blind_guess,
    identify,
    row_distances,
    share_interval,
    structural_similarity,
)
from fedpdm.data import normalize
from fedpdm.privacy.mechanism import clip_l2
from fedpdm.privacy.types import ReleasedDataset

__all__ = [
    "ReconstructionResult",
    "RecoveryScores",
    "attack_uploads",
    "rescale",
    "unclip_factor",
]

Progress = Callable[[int, int], None]
Array = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class RecoveryScores:
    """One attacker and method in numbers; `dataclasses.asdict` of it is JSON.

    `distance` is the mean L2 distance from the originals at the models' scale. `recovery` and
    `recovery_blind` are defined in `fedpdm.attacks.recovery`, with bootstrap intervals over images
    at `confidence`. `ssim` is the mean, None where it is not defined. `identification` is among all
    originals, `identification_in_class` among those of the same (public) label.
    """

    attacker: str
    method: str
    num_images: int
    distance: float
    recovery: float
    recovery_low: float
    recovery_high: float
    recovery_blind: float
    recovery_blind_low: float
    recovery_blind_high: float
    confidence: float
    ssim: float | None
    identification: Identification
    identification_in_class: Identification


@dataclass(frozen=True, kw_only=True, eq=False)
class ReconstructionResult:
    """`rows`, the reconstructions (N, *) by (attacker, method), and what they are compared with.

    `originals` and `images` are float32 at the models' scale, the latter projected. `upload` is how
    well the upload itself identifies its image: the likelihood of the clipped candidates. No
    reconstruction identifies better on average, since all are made from it; `upload_in_class` is
    the one to compare those with that know the label.
    """

    rows: tuple[RecoveryScores, ...]
    images: Mapping[tuple[str, str], torch.Tensor]
    originals: torch.Tensor
    upload: Identification
    upload_in_class: Identification
    unclip: float
    t0: int

    def best(self, attacker: str) -> RecoveryScores:
        """The attacker's method with the smallest distance; `ValueError` for an unknown name."""
        rows = [row for row in self.rows if row.attacker == attacker]
        if not rows:
            known = ", ".join(dict.fromkeys(row.attacker for row in self.rows))
            raise ValueError(f"attacker must be one of {known}, got {attacker!r}")
        return min(rows, key=lambda row: row.distance)


def unclip_factor(
    public: torch.Tensor | NDArray[np.uint8], *, clip_norm: float, shift: float
) -> float:
    """Median length of public images over C, at least 1.

    Args:
        public: (M, C, H, W) uint8, or (M, *) float at the models' scale (shift subtracted).
    """
    rows = _to_model_scale(public, shift=shift).flatten(1).double()
    return max(1.0, float(rows.norm(dim=1).median()) / clip_norm)


def rescale(released: ReleasedDataset, *, unclip: float = 1.0) -> torch.Tensor:
    """The rescaled upload, `unclip x_tilde / sqrt(abar_t0)`, (N, *): what doing nothing gives."""
    return released.x_tilde * (unclip / released.parameters.alpha_bar**0.5)


@torch.no_grad()
def attack_uploads(
    released: ReleasedDataset,
    originals: torch.Tensor | NDArray[np.uint8],
    *,
    reconstructors: Sequence[Reconstructor],
    generator: torch.Generator,
    rng: np.random.Generator,
    unclip: float = 1.0,
    bounds: tuple[float, float] | None = None,
    num_steps: int = 50,
    scheduler: str = "ddim",
    batch_size: int = 256,
    confidence: float = 0.95,
    num_bootstrap: int = 1000,
    progress: Progress | None = None,
) -> ReconstructionResult:
    """Reconstruct every upload by every attacker, beside `none` and `blind`.

    Args:
        released: the uploads.
        originals: what they were made from, in the same order: (N, C, H, W) uint8, or (N, *) float
            at the models' scale (shift subtracted). N at least 2.
        reconstructors: see there.
        generator: on the CPU; noise that attackers add. rng: of the bootstrap.
        unclip: see the module and `unclip_factor`.
        bounds: of the values of an image at the models' scale. Default: those of pixels for uint8
            originals, none for float ones (then there is no SSIM).
        num_steps, scheduler: of the continuation.
        progress: called with (reconstructions done, in all).

    Raises:
        ValueError: for originals that do not fit the release, names given twice, a model that does
            not know t0, or a schedule that is not the release's.
    """
    parameters = released.parameters
    truth = _to_model_scale(originals, shift=parameters.shift)
    check_release(released, tuple(truth.shape), name="released")
    if bounds is None and originals.dtype in (np.uint8, torch.uint8):
        bounds = (-1.0 - parameters.shift, 1.0 - parameters.shift)
    _check_reconstructors(reconstructors, released)
    found: dict[tuple[str, str], torch.Tensor] = {
        ("none", "rescaled"): rescale(released, unclip=unclip),
        ("blind", "class_mean"): blind_guess(truth, released.labels).float(),
    }
    total, done = len(truth) * len(reconstructors) * len(METHODS), 0
    for each in reconstructors:
        for method in METHODS:
            parts = []
            for x_tilde, labels in zip(
                released.x_tilde.split(batch_size), released.labels.split(batch_size), strict=True
            ):
                x_hat = each.reconstruct(
                    x_tilde,
                    parameters.t0,
                    labels,
                    method=method,
                    generator=generator,
                    scheduler=scheduler,
                    num_steps=num_steps,
                )
                parts.append(x_hat * (unclip if each.answers_clipped else 1.0))
                done += len(x_tilde)
                if progress is not None:
                    progress(done, total)
            found[each.name, method] = torch.cat(parts)
    images = {key: x if bounds is None else x.clamp(*bounds) for key, x in found.items()}
    distances = {key: row_distances(x, truth) for key, x in images.items()}
    rows = []
    for key, x in found.items():
        intervals = [
            share_interval(
                distances[key],
                distances[reference],
                confidence=confidence,
                num_bootstrap=num_bootstrap,
                rng=rng,
            )
            for reference in (("none", "rescaled"), ("blind", "class_mean"))
        ]
        similarity = None
        if bounds is not None:
            similarity = structural_similarity(images[key], truth, bounds=bounds)
        rows.append(
            RecoveryScores(
                attacker=key[0],
                method=key[1],
                num_images=len(truth),
                distance=float(distances[key].mean()),
                recovery=intervals[0][0],
                recovery_low=intervals[0][1],
                recovery_high=intervals[0][2],
                recovery_blind=intervals[1][0],
                recovery_blind_low=intervals[1][1],
                recovery_blind_high=intervals[1][2],
                confidence=confidence,
                ssim=None if similarity is None else float(similarity.mean()),
                identification=identify(x, truth, confidence=confidence),
                identification_in_class=identify(
                    x, truth, labels=released.labels, confidence=confidence
                ),
            )
        )
    y, clipped = rescale(released), clip_l2(truth, clip_norm=parameters.clip_norm)
    return ReconstructionResult(
        rows=tuple(rows),
        images=images,
        originals=truth,
        upload=identify(y, clipped, confidence=confidence),
        upload_in_class=identify(y, clipped, labels=released.labels, confidence=confidence),
        unclip=unclip,
        t0=parameters.t0,
    )


def _check_reconstructors(
    reconstructors: Sequence[Reconstructor], released: ReleasedDataset
) -> None:
    parameters = released.parameters
    names = ["none", "blind", *(each.name for each in reconstructors)]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(f"reconstructors must have names of their own, got {repeated[0]!r} twice")
    for each in reconstructors:
        schedule = each.target.schedule
        fits = schedule.num_steps == parameters.num_steps and np.isclose(
            schedule.alpha_bar(parameters.t0), parameters.alpha_bar, rtol=1e-9
        )
        if not fits:
            raise ValueError(f"{each.name}: the model's schedule must be the release's")
        if not each.noise_to_noise and each.target.t_range[1] < parameters.t0:
            raise ValueError(
                f"{each.name}: t0 must be at most the largest level of the model, "
                f"{each.target.t_range[1]}, got {parameters.t0}"
            )


def _to_model_scale(images: torch.Tensor | NDArray[np.uint8], *, shift: float) -> torch.Tensor:
    """float32; uint8 is normalised, floats are there already."""
    if images.dtype in (np.uint8, torch.uint8):
        return normalize(images, shift=shift).cpu()
    return torch.as_tensor(images).float().cpu()
