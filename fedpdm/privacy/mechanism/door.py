"""What a release mechanism is, and which ones there are: the door for custom ones.

A mechanism is one module with a subclass of `ReleaseMechanism`, or of
`fedpdm.privacy.mechanism.ImageMechanism` where it releases a row for each image. It says what a
release was made with, how it is made, what it costs an image, what is sent, and what people are
told. Everything else holds for all mechanisms alike: the store keeps each release with the digests
of the images in it, the ledger adds up what each image has paid, the wire sends nothing else, and
a node allows the mechanisms that its policy names.

A mechanism is known by its name from where its module is imported on. `privacy.release` and a
ledger find it by that name, also in an installed package that declares it as an entry point of
the group `fedpdm.mechanisms`; `privacy.release: package.module:NAME` imports it.
"""

from __future__ import annotations

import abc
import dataclasses
import difflib
import math
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch

from fedpdm.config import ConfigError, RunConfig
from fedpdm.config.plugins import is_named, load_installed, load_named
from fedpdm.diffusion.schedule import NoiseSchedule
from fedpdm.privacy.composition import grouped
from fedpdm.privacy.noise import NoiseSource
from fedpdm.privacy.types import Parameters, PrivacyEvent, Release

__all__ = [
    "ReleaseMechanism",
    "ReleaseSource",
    "StoredRelease",
    "mechanism_named",
    "mechanism_of",
    "recorded_mechanism",
    "register",
]

P = TypeVar("P", bound=Parameters)
Layout = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> safetensors type (F32, ...) and shape

_BYTES = {"U8": 1, "I32": 4, "F32": 4, "I64": 8}  # of a value
GROUP = "fedpdm.mechanisms"
_NAME = re.compile(r"[a-z][a-z0-9_]*")
# What records hold besides a mechanism's own fields.
_TAKEN = (
    "client_id", "delta", "digests", "encoding", "identities", "image_shape", "kind", "mechanism",
    "noise_source", "preparation", "seeded", "version",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ReleaseSource:
    """What a release is made of: images that this mechanism has not released with these parameters.

    `images` is uint8 (N, C, H, W), `labels` int64 (N,), public. `public` holds what the server made
    of earlier rounds, by name; it costs nothing to use.
    """

    images: np.ndarray
    labels: np.ndarray
    public: Mapping[str, torch.Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StoredRelease:
    """A release in a client's store: its values by name, and the row of each image by digest."""

    tensors: Mapping[str, torch.Tensor]
    rows: Mapping[bytes, int]


class ReleaseMechanism(abc.ABC, Generic[P]):
    """How clients release, and what that costs. A subclass has no state.

    `parameters` is the class of what a release was made with; its `mechanism` is the name by which
    records know this one. `names` are those of the tensors that are sent.
    """

    parameters: ClassVar[type[Parameters]]
    names: ClassVar[tuple[str, ...]]

    @abc.abstractmethod
    def plan(
        self, config: RunConfig, schedule: NoiseSchedule, *, shift: float, num_classes: int
    ) -> tuple[Parameters, ...]:
        """What a run releases: the parameters of each round in which clients release. They may be
        those of other mechanisms too.

        All rounds are planned before the first: the ledger lets an image take part in each once,
        and budgets count all of them. What an image pays may not depend on `shift` and
        `num_classes`. `ConfigError` or `ValueError` for what cannot be kept.
        """

    @abc.abstractmethod
    def event(self, parameters: P) -> PrivacyEvent:
        """What one release costs each image in it."""

    def group_event(self, event: PrivacyEvent, count: int) -> PrivacyEvent:
        """At most what a release with this `event` costs `count` of a client's images that are
        replaced together.

        As it stands it holds for every mechanism: `count` images may move what is sent by `count`
        times as much as one. Where images are noised one by one they cost less.
        """
        return grouped(event, count)

    @abc.abstractmethod
    def check(self, parameters: P) -> None:
        """`ValueError` with one line for recorded parameters that no release can have."""

    def same(self, a: P, b: P) -> bool:
        """Whether two releases were made with the same settings."""
        return a == b

    @abc.abstractmethod
    def layout(self, parameters: P, count: int, image_shape: tuple[int, int, int]) -> Layout:
        """The tensors of a release of `count` images, in the order in which `make` gives them."""

    def num_bytes(self, parameters: P, count: int, image_shape: tuple[int, int, int]) -> int:
        """Of the values of a release of `count` images."""
        layout = self.layout(parameters, count, image_shape)
        return sum(_BYTES[kind] * math.prod(shape) for kind, shape in layout.values())

    @abc.abstractmethod
    def make(
        self, source: ReleaseSource, parameters: P, noise: NoiseSource
    ) -> Iterator[np.ndarray]:
        """The bytes of these tensors, in pieces; called once for an image and these parameters."""

    @abc.abstractmethod
    def gather(
        self, stored: Sequence[StoredRelease], digests: Sequence[bytes], labels: np.ndarray
    ) -> dict[str, torch.Tensor]:
        """What is sent for the images with these digests and labels int64 (N,), from stored
        releases that hold them all: post-processing, so it costs nothing."""

    @abc.abstractmethod
    def restore(
        self,
        tensors: Mapping[str, torch.Tensor],
        *,
        parameters: P,
        event: PrivacyEvent,
        noise_source: str,
        seeded: bool,
        check_values: bool,
    ) -> Release:
        """A release from what was sent or gathered; `ValueError` for wrong types and shapes.

        `check_values=False` leaves out the pass over all values.
        """

    @abc.abstractmethod
    def describe(self, parameters: P) -> str:
        """The settings in a few words, for terminals."""

    @abc.abstractmethod
    def sentence(self, parameters: P) -> str:
        """One plain sentence for the privacy statement: what is sent."""

    def settings(self, parameters: P) -> dict[str, float]:
        """Numbers by name: statements list them, a node's policy may bound them (`min_t0`)."""
        return {}


_registered: dict[str, ReleaseMechanism[Any]] = {}
M = TypeVar("M", bound=type[ReleaseMechanism[Any]])


def register(kind: M) -> M:
    """Make a mechanism known by its parameters' name; for use as a class decorator.

    `ValueError` for a name that is another mechanism's, and for parameters that cannot be recorded.
    """
    name = getattr(getattr(kind, "parameters", None), "mechanism", "")
    if not _NAME.fullmatch(name):
        raise ValueError(
            f"{kind.__name__}: parameters.mechanism must be a name of small letters, digits and _, "
            f"got {name!r}"
        )
    hints = typing.get_type_hints(kind.parameters)
    for each in dataclasses.fields(kind.parameters):
        if hints[each.name] not in (int, float, str) or each.name in _TAKEN:
            raise ValueError(
                f"{kind.__name__}: parameter {each.name} must be an int, float or str, and not be "
                f"named {', '.join(_TAKEN)}"
            )
    known = type(_registered[name]) if name in _registered else kind
    if (known.__module__, known.__qualname__) != (kind.__module__, kind.__qualname__):
        raise ValueError(
            f"{kind.__name__}: mechanism {name!r} is that of "
            f"{known.__module__}.{known.__qualname__} already"
        )
    _registered[name] = kind()
    return kind


def mechanism_named(value: str) -> ReleaseMechanism[Any]:
    """The mechanism of `privacy.release`; imports it where it is `package.module:NAME`.

    `ConfigError` with one line for a name that nothing has, or that of something else.
    """
    key = "privacy.release"
    if is_named(value):
        return _take(load_named(value, key=key), f"{key}: {value!r}")
    if not _is_known(value):
        near = difflib.get_close_matches(value, _registered, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigError(
            f"{key}: must be one of {', '.join(sorted(_registered))} or package.module:NAME, "
            f"got {value!r}{hint}"
        )
    return _registered[value]


def mechanism_of(parameters: Parameters) -> ReleaseMechanism[Any]:
    """The mechanism whose parameters these are."""
    return recorded_mechanism(parameters.mechanism)


def recorded_mechanism(name: str) -> ReleaseMechanism[Any]:
    """The mechanism by the name in a record; `ValueError` if nothing here has it."""
    if not _is_known(name):
        raise ValueError(
            f"release mechanism {name!r} is not known here; import the module that registers it"
        )
    return _registered[name]


def _is_known(name: str) -> bool:
    """Whether a mechanism is registered by this name; installed packages are asked."""
    if name not in _registered and (found := load_installed(GROUP, name)) is not None:
        _take(found, f"entry point {name} of {GROUP}:")
    return name in _registered


def _take(found: object, where: str) -> ReleaseMechanism[Any]:
    """Register what must be a class of mechanisms; `ConfigError` for anything else."""
    if not (isinstance(found, type) and issubclass(found, ReleaseMechanism)):
        raise ConfigError(f"{where} must be a class of release mechanisms, got {found!r}")
    try:
        register(found)
    except (TypeError, ValueError) as error:  # TypeError: methods that it lacks
        raise ConfigError(f"{where} {error}") from None
    return _registered[found.parameters.mechanism]
