"""Class statistics: noised sums over a client's images, in three rounds or more. `statistics`.

With y the public label and x the coordinates of an image in a public basis
(`fedpdm.privacy.mechanism.basis`), a client sends

    means     for each class   sum of CLIP(x, C)
    pooled    for all together sum of r r^T,   r = CLIP(x - m_y, C_r)
    classes   for each class   sum of z z^T,   z = CLIP(W (x - m_y), C_r)

where m and W are what the server made of earlier rounds (`fedpdm.privacy.estimation`): whatever
they are, the result is clipped. Where a class is a mixture of J Gaussians, further rounds follow,

    components-N   for each class and component   sum of (z, C_r) over the images that are nearest

to that component's centre in the server's eyes so far: the C_r adds up to how many these are, times
C_r. Each number has its own noise. Neighbours: one image replaced by any other of the same label.
That moves the first sum by at most 2 C, those of products by sqrt(2) C_r^2, and those of components
by 2 C_r: in one component by |a - b| <= 2 C_r, and from one to another by sqrt(|a|^2 + |b|^2 +
2 C_r^2), which is no more.

It works on the noise's grid of `GRID` steps per standard deviation: each image's contribution
becomes whole steps (`fedpdm.privacy.mechanism.whole`), so sums are whole numbers, and noise of
whole steps is added to them once. A round with Gaussian-DP parameter mu has sums of squares of at
most

    L = (GRID mu / 2)^2 (means, components),   L = GRID mu / sqrt(2) (products),

rounded down; the sensitivities 2 sqrt(L) and sqrt(2) L are then at most GRID mu. (An image counts
isqrt(L) steps in a component.) Rounds compose to mu^2 = mu_1^2 + mu_2^2 + ..., exactly.

How many images of each class are in a sum is public and sent along. A class without images has no
sum: zeros without noise.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from fedpdm.config import ConfigError, RunConfig
from fedpdm.data import normalize
from fedpdm.diffusion.schedule import NoiseSchedule
from fedpdm.privacy.accountant import accounting_named, compose
from fedpdm.privacy.mechanism.basis import cosine_basis
from fedpdm.privacy.mechanism.door import (
    Layout,
    ReleaseMechanism,
    ReleaseSource,
    StoredRelease,
    register,
)
from fedpdm.privacy.mechanism.sums import (
    STAGES,
    ReleasedStatistics,
    StatisticsParameters,
    check_shapes,
    check_stage,
    check_sums,
    component_stage,
)
from fedpdm.privacy.mechanism.whole import (
    pack_symmetric,
    sum_of_products,
    whole_vectors,
)
from fedpdm.privacy.noise import GRID, NoiseSource
from fedpdm.privacy.types import GaussianEvent

__all__ = ["ClassStatistics", "in_places"]

RESIDUAL_SHARE = 0.72  # of clip_norm: C_r by default
LARGEST_MU = 1000.0  # of a round: far beyond any privacy, and sums stay exact
CHUNK = 1024  # images at a time


@register
class ClassStatistics(ReleaseMechanism[StatisticsParameters]):
    """See the module."""

    parameters: ClassVar[type[StatisticsParameters]] = StatisticsParameters
    names = ("counts", "sums", "directions")

    def plan(
        self, config: RunConfig, schedule: NoiseSchedule, *, shift: float, num_classes: int
    ) -> tuple[StatisticsParameters, ...]:
        """Rounds that share `privacy.epsilon` as the section `statistics` says."""
        privacy = config.privacy
        if privacy.epsilon is None:
            raise ConfigError("privacy.epsilon: release statistics needs it, and no t0; got null")
        rules = accounting_named(privacy.accounting)
        mu = 1.0 / rules.multiplier(epsilon=privacy.epsilon, delta=privacy.delta)
        less = 1.0
        while True:  # rounding errs low
            rounds = self.sums(config, mu=less * mu, shift=shift, num_classes=num_classes)
            event = compose([self.event(parameters) for parameters in rounds])
            if rules.epsilon(event, delta=privacy.delta) <= privacy.epsilon:
                return rounds
            less -= 2.0**-50

    def sums(
        self, config: RunConfig, *, mu: float, shift: float, num_classes: int
    ) -> tuple[StatisticsParameters, ...]:
        """The rounds of sums that have `mu` together, shared as the section `statistics` says."""
        privacy, section = config.privacy, config.statistics
        residual = section.residual_norm or RESIDUAL_SHARE * privacy.clip_norm
        moves = [component_stage(number) for number in range(1, section.moves + 1)]
        rounds = tuple(
            StatisticsParameters(
                stage=stage,
                mu=mu * math.sqrt(share),
                clip_norm=privacy.clip_norm if stage == "means" else residual,
                dimensions=section.dimensions,
                directions=section.directions,
                num_classes=num_classes,
                shift=float(shift),
                grid=GRID,
                components=section.components if stage in moves else 1,
            )
            for stage, share in zip((*STAGES, *moves), section.shares, strict=True)
        )
        for parameters in rounds:
            try:
                self.check(parameters)
            except ValueError as error:
                raise ConfigError(
                    f"privacy.epsilon: {privacy.epsilon:g} for class statistics: {error}"
                ) from None
        return rounds

    def event(self, parameters: StatisticsParameters) -> GaussianEvent:
        return GaussianEvent(noise_multiplier=1.0 / parameters.mu if parameters.mu > 0 else 0.0)

    def check(self, parameters: StatisticsParameters) -> None:
        check_stage(parameters)
        if not 0.0 < parameters.mu <= LARGEST_MU:
            raise ValueError(f"mu must be in (0, {LARGEST_MU:g}], got {parameters.mu}")
        if not 0.0 < parameters.clip_norm < math.inf:
            raise ValueError(f"clip_norm must be positive and finite, got {parameters.clip_norm}")
        if min(parameters.dimensions, parameters.directions, parameters.num_classes) < 1:
            raise ValueError("dimensions, directions and num_classes must be at least 1")
        if not -1.0 <= parameters.shift <= 1.0:
            raise ValueError(f"shift must be in [-1, 1], got {parameters.shift}")
        if parameters.grid != GRID:
            raise ValueError(f"grid must be {GRID}, as the noise's, got {parameters.grid}")
        if parameters.limit < 1:
            raise ValueError(
                f"{parameters.stage}: mu {parameters.mu:.3g} leaves an image less than one step of "
                "the noise's grid"
            )

    def same(self, a: StatisticsParameters, b: StatisticsParameters) -> bool:
        """Machines may round mu differently."""
        return dataclasses.replace(a, mu=b.mu) == b and math.isclose(a.mu, b.mu, rel_tol=1e-9)

    def layout(
        self, parameters: StatisticsParameters, count: int, image_shape: tuple[int, int, int]
    ) -> Layout:
        pixels = math.prod(image_shape)
        p, classes = min(parameters.dimensions, pixels), parameters.num_classes
        rows = 1 if parameters.stage == "pooled" else classes
        q = min(parameters.directions, p) if parameters.projected else 0
        return {
            "counts": ("I64", (classes,)),
            "sums": ("I64", (rows, parameters.size(pixels))),
            "directions": ("F32", (q, p)),
        }

    def make(
        self, source: ReleaseSource, parameters: StatisticsParameters, noise: NoiseSource
    ) -> Iterator[np.ndarray]:
        self.check(parameters)
        shape = self.layout(parameters, len(source.images), source.images.shape[1:])
        counts = np.bincount(source.labels, minlength=parameters.num_classes).astype(np.int64)
        if counts.shape != shape["counts"][1]:
            raise ValueError(f"labels must be in [0, {parameters.num_classes - 1}]")
        directions = np.zeros(shape["directions"][1], dtype=np.float32)
        if parameters.projected:
            given = public_array(source, "directions", (None, directions.shape[1]))
            if len(given) > len(directions):
                raise ValueError(f"directions must be at most {len(directions)}, got {len(given)}")
            directions[: len(given)] = given
        sums = self.exact_sums(source, parameters, directions)
        drawn = np.empty(sums.shape, dtype=np.float32)
        noise.fill(drawn)
        sums += drawn.astype(np.int64)
        if parameters.stage != "pooled":
            sums[counts == 0] = 0
        yield counts
        yield sums
        yield directions

    def exact_sums(
        self, source: ReleaseSource, parameters: StatisticsParameters, directions: np.ndarray
    ) -> np.ndarray:
        """The sums without noise, in whole steps, int64 as in `layout`: not to leave a client."""
        shape = self.layout(parameters, 1, source.images.shape[1:])["sums"][1]
        sums = np.zeros(shape, dtype=np.int64)
        for start in range(0, len(source.images), CHUNK):
            labels = source.labels[start : start + CHUNK]
            whole = self.contributions(
                ReleaseSource(
                    images=source.images[start : start + CHUNK], labels=labels, public=source.public
                ),
                parameters,
                directions,
            )
            for row in range(len(sums)):
                chosen = whole if parameters.stage == "pooled" else whole[labels == row]
                if not parameters.products:
                    sums[row] += chosen.sum(axis=0)
                elif len(chosen):
                    sums[row] += pack_symmetric(sum_of_products(chosen))
        return sums

    def contributions(
        self, source: ReleaseSource, parameters: StatisticsParameters, directions: np.ndarray
    ) -> np.ndarray:
        """Each image's vector in whole steps, int64 (n, d): the sum, or what is multiplied."""
        x = normalize(source.images, shift=parameters.shift).flatten(1).numpy().astype(np.float64)
        x = x @ cosine_basis(tuple(source.images.shape[1:]), parameters.dimensions).T
        if parameters.stage != "means":
            means = public_array(source, "means", (parameters.num_classes, x.shape[1]))
            x -= means[source.labels]
        if parameters.projected:
            x = x @ directions.T.astype(np.float64)
        whole = whole_vectors(x, steps=parameters.steps, limit=parameters.limit)
        if parameters.moves:
            places = parameters.num_classes * parameters.components
            centers = public_array(source, "centers", (places, whole.shape[1]))
            whole = in_places(whole, source.labels, centers, parameters)
        return whole

    def gather(
        self, stored: Sequence[StoredRelease], digests: Sequence[bytes], labels: np.ndarray
    ) -> dict[str, torch.Tensor]:
        """All sums side by side: a sum can be sent whole only, with all images that are in it."""
        return {name: torch.stack([part.tensors[name] for part in stored]) for name in self.names}

    def restore(
        self, tensors: Mapping[str, torch.Tensor], *, check_values: bool, **made: Any
    ) -> ReleasedStatistics:
        made |= {name: tensors[name] for name in self.names}
        # Of a total; a client's message has no such name.
        released = ReleasedStatistics(**made, totalled=tensors.get("totalled"))
        check_shapes(released)
        if check_values:
            check_sums(released)
        return released

    def describe(self, parameters: StatisticsParameters) -> str:
        of = f" of {parameters.components}" if parameters.moves else ""
        return (
            f"class statistics ({parameters.stage}{of}), mu {parameters.mu:.4g}, clip norm "
            f"{parameters.clip_norm:g} around {parameters.shift:g}"
        )

    def sentence(self, parameters: StatisticsParameters) -> str:
        noise = f"random noise of {parameters.sigma:.3g} on each number"
        if parameters.stage == "means":
            return (
                "No image is sent by itself. Sent is how many images of each class there are, and "
                "for each class the sum of its images, each shortened to a length of at most "
                f"{parameters.clip_norm:g} and all together covered once with {noise} (pixels run "
                "from -1 to 1). An image is hidden among all possible ones of its class."
            )
        if parameters.moves:
            return (
                "Then, once or several times, the images of each class are divided into "
                f"{parameters.components} groups of similar ones, and for each group two things "
                "are sent, each time with noise of its own: the sum of its images' "
                f"{parameters.directions} features, each image shortened to a length of at most "
                f"{parameters.clip_norm:g}, and how many they are; covered once with {noise} (on "
                f"how many, of {parameters.grid / parameters.weight:.3g} images)."
            )
        where = (
            "Then one table is sent for all images together:"
            if parameters.stage == "pooled"
            else f"Then such a table is sent for each class, of {parameters.directions} features:"
        )
        return (
            f"{where} it says which features of images differ together from the average of their "
            "class. It is a sum over images, of differences shortened to a length of at most "
            f"{parameters.clip_norm:g}, covered once with {noise}."
        )

    def settings(self, parameters: StatisticsParameters) -> dict[str, float]:
        return {
            "clip_norm": parameters.clip_norm,
            "shift": parameters.shift,
            "dimensions": parameters.dimensions,
        }


def in_places(
    whole: np.ndarray, labels: np.ndarray, centers: np.ndarray, parameters: StatisticsParameters
) -> np.ndarray:
    """Vectors int64 (n, q), each with its count at the place of the nearest centre of its class:
    int64 (n, J (q + 1)), zero at all other places. `centers` is float64 (K J, q), in units."""
    n, q = whole.shape
    near = centers.reshape(parameters.num_classes, parameters.components, q) * parameters.steps
    placed = np.zeros((n, parameters.components, q + 1), dtype=np.int64)
    for k in np.unique(labels):
        own = np.flatnonzero(labels == k)
        far = np.vecdot(near[k], near[k]) - 2.0 * whole[own].astype(np.float64) @ near[k].T
        place = far.argmin(axis=1)
        placed[own, place, :q] = whole[own]
        placed[own, place, q] = parameters.weight
    return placed.reshape(n, -1)


def public_array(source: ReleaseSource, name: str, shape: tuple[int | None, int]) -> np.ndarray:
    """What the server made of earlier rounds, float64; `ValueError` if it is not of this shape
    (None: any length) or not finite."""
    if name not in source.public:
        raise ValueError(f"the server's {name} are missing: they come from an earlier round")
    value = source.public[name].detach().cpu().double().numpy()
    fits = value.ndim == 2 and all(
        size in (None, got) for size, got in zip(shape, value.shape, strict=True)
    )
    if not fits or not np.isfinite(value).all():
        wanted = " x ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"the server's {name} must be finite, {wanted}, got {value.shape}")
    return value
