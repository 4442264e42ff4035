"""Options and output that attacks on releases share."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpdm.commands.terminal import show
from fedpdm.config.schema import ScheduleConfig
from fedpdm.text import json_text

if TYPE_CHECKING:
    from fedpdm.config import RunConfig
    from fedpdm.data import ImageSet

__all__ = ["add_release_options", "given_shape", "public_images", "release_config", "tell"]


def add_release_options(parser: argparse.ArgumentParser) -> None:
    """Options that say how a client releases, and where results go."""
    kind = next(f for f in dataclasses.fields(ScheduleConfig) if f.name == "kind")
    parser.add_argument(
        "--release", choices=("images", "statistics", "network"), default="images",
        help="what clients release, as privacy.release; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--components", type=int, default=1,
        help="statistics: Gaussians of a class, as statistics.components; default: %(default)s",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=int, default=50, help="network: rounds of gradients; default: %(default)s"
    )
    parser.add_argument(
        "--sample-rate", type=float, default=0.1,
        help="network: share of the images that a round draws; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--epsilon", type=float, help="give it or --t0; default: 10")
    parser.add_argument("--t0", type=int, help="noising steps")
    parser.add_argument("--clip-norm", type=float, default=10.0, help="default: %(default)s")
    parser.add_argument("--delta", type=float, default=1e-5, help="default: %(default)s")
    parser.add_argument("--shift", type=float, help="default: the set's background (statistics: 0)")
    parser.add_argument("--schedule", choices=kind.metadata["choices"], default=kind.default)
    parser.add_argument("--steps", type=int, default=1000, help="T; default: %(default)s")
    parser.add_argument("--seed", type=int, help="of pairs and coins; default: drawn and reported")
    parser.add_argument(
        "--seeded", type=int, metavar="SEED", help="seeded noise, as in a simulation with this seed"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write figures in JSON, pictures")
    parser.add_argument("--json", action="store_true", help="print JSON")


def release_config(
    options: argparse.Namespace,
    *,
    statistics_of: int | None = None,
    network: Mapping[str, Any] | None = None,
) -> RunConfig:
    """The client's run; checks every option of the release. `statistics_of` and `network` as
    `attack_config`."""
    from fedpdm.engines.one_client import attack_config

    if options.epsilon is not None and options.t0 is not None:
        raise ValueError("give --epsilon or --t0, not both")
    if options.components != 1 and statistics_of is None:
        raise ValueError("--components: is for --release statistics")
    epsilon = 10.0 if options.epsilon is None and options.t0 is None else options.epsilon
    for name in ("seed", "seeded"):
        if (value := getattr(options, name)) is not None and value < 0:
            raise ValueError(f"--{name}: must be at least 0, got {value}")
    if options.seed is None:
        import secrets

        options.seed = secrets.randbits(32)
    return attack_config(
        epsilon=epsilon,
        t0=options.t0,
        delta=options.delta,
        clip_norm=options.clip_norm,
        shift=options.shift,
        schedule=options.schedule,
        num_steps=options.steps,
        seed=options.seeded,
        statistics_of=statistics_of,
        components=options.components,
        network=network,
    )


def public_images(options: argparse.Namespace) -> ImageSet:
    """The images of --data."""
    import numpy as np

    from fedpdm.data import ImageSet
    from fedpdm.data.open_images import open_public_images

    source = open_public_images(options.data, option="--data", resolution=options.resolution)
    return ImageSet(
        images=source.read(np.arange(len(source))),
        labels=source.labels,
        class_names=source.class_names,
        background=source.background,
    )


def given_shape(text: str) -> tuple[int, int, int]:
    """--shape."""
    try:
        channels, height, width = (int(part) for part in text.split("x"))
    except ValueError:
        raise ValueError(f"--shape: must be like 3x32x32, got {text!r}") from None
    return channels, height, width


def tell(options: argparse.Namespace, name: str, facts: dict[str, Any], text: str) -> None:
    """Print the result as text or JSON, and write it where asked."""
    from fedpdm.storage.files import write_atomic

    if options.out is not None:
        write_atomic(options.out / name, (json_text(facts) + "\n").encode())
    show(json_text(facts) if options.json else text)
