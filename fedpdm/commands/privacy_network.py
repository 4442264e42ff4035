"""`fedpdm privacy --network`: what noise a network needs that clients train by DP-SGD.

The privacy loss is that of all rounds together, beside class statistics that keep a share of mu^2.
"""

from __future__ import annotations

import argparse
import itertools
from pathlib import Path
from typing import Any

__all__ = ["NETWORK_OPTIONS", "add_network_options", "describe_network", "numbers"]

MOST_CELLS = 100  # of the table: each takes about a second
DEFAULTS = {"rates": "0.05,0.2", "rounds": "120,500", "shares": "0,0.3,0.6"}
NETWORK_OPTIONS = ("config", "rates", "rounds", "shares", "clients", "parameters")
OTHERS = ("t0", "clip_norm", "public_sample", "clip_quantile", "picture")


def add_network_options(parser: argparse.ArgumentParser) -> None:
    """Add what `describe_network` reads."""
    group = parser.add_argument_group(
        "a private network",
        "With --network: the noise of gradients that clients send in rounds over Poisson samples "
        "of their images.\nWith --images and --parameters also against the clipped gradients.",
    )
    group.add_argument(
        "--network", action="store_true", help="print its noise by rate, rounds and share"
    )
    group.add_argument(
        "--config", type=Path, metavar="FILE.yaml",
        help="an experiment, for what is not given of epsilon, delta and clients",
    )  # fmt: skip
    for name, metavar, what in (
        ("rates", "Q,Q,...", "probabilities with which a round draws an image"),
        ("rounds", "T,T,...", "numbers of rounds"),
        ("shares", "S,S,...", "of mu^2 that class statistics keep; 0: there are none"),
    ):
        group.add_argument(f"--{name}", metavar=metavar, help=f"{what}; default: {DEFAULTS[name]}")
    group.add_argument("--clients", type=int, metavar="M", help="default: 1")
    group.add_argument("--parameters", type=int, metavar="D", help="weights of the network")


def describe_network(options: argparse.Namespace) -> dict[str, Any]:
    """The noise for each rate, number of rounds and share; `ValueError` for bad input."""
    for name in OTHERS:
        if getattr(options, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')}: not with --network")
    if options.releases != 1:
        raise ValueError("--releases: not with --network")
    _take_config(options)
    if options.epsilon is None:
        raise ValueError("--network: give --epsilon, or --config with privacy.epsilon")
    kinds = {"rates": float, "rounds": int, "shares": float}
    rates, rounds, shares = (
        numbers(kind, f"--{name}", getattr(options, name) or DEFAULTS[name])
        for name, kind in kinds.items()
    )
    for name in ("clients", "parameters"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise ValueError(f"--{name}: must be at least 1, got {value}")
    if options.parameters is not None and options.images is None:
        raise ValueError("--parameters: needs --images, those of a client")
    cells = list(itertools.product(rates, rounds, shares))
    if len(cells) > MOST_CELLS:
        raise ValueError(
            f"--rates, --rounds and --shares: {len(cells)} values to find, at most {MOST_CELLS}"
        )
    return {
        "epsilon": options.epsilon,
        "delta": options.delta,
        "clients": options.clients,
        "images": options.images,
        "parameters": options.parameters,
        "rows": [_row(options, *cell) for cell in cells],
    }


def _row(options: argparse.Namespace, rate: float, rounds: int, share: float) -> dict[str, Any]:
    from fedpdm.privacy.calibration import calibrate_rounds, noise_per_step

    multiplier = calibrate_rounds(
        epsilon=options.epsilon,
        delta=options.delta,
        sample_rate=rate,
        rounds=rounds,
        share=share,
    )
    row = {
        "sample_rate": rate,
        "rounds": rounds,
        "share": share,
        "passes": rate * rounds,
        "noise_multiplier": multiplier,
    }
    if options.parameters is not None:
        row["noise_per_step"] = noise_per_step(
            multiplier,
            sample_rate=rate,
            images=options.images,
            clients=options.clients,
            parameters=options.parameters,
        )
    return row


def _take_config(options: argparse.Namespace) -> None:
    """Fill in what is not given: from the experiment, then by default."""
    if options.config is not None:
        from fedpdm.config import load_config

        config = load_config(options.config, [])
        if options.epsilon is None:
            options.epsilon = config.privacy.epsilon
        if options.delta is None:
            options.delta = config.privacy.delta
        if options.clients is None:
            options.clients = config.partition.num_clients
    options.delta = 1e-5 if options.delta is None else options.delta
    options.clients = 1 if options.clients is None else options.clients


def numbers(kind: type[Any], option: str, text: str) -> tuple[Any, ...]:
    """Numbers separated by commas; `ValueError` that names the option."""
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise ValueError(f"{option}: must be {what} separated by commas, got {text!r}") from None
