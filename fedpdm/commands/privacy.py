"""`fedpdm privacy`: of epsilon, t0 and clip norm give two, get the third, and what it means."""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpdm.commands.privacy_network import (
    NETWORK_OPTIONS,
    add_network_options,
    describe_network,
    numbers,
)
from fedpdm.config.schema import ScheduleConfig
from fedpdm.text import json_text

if TYPE_CHECKING:
    from fedpdm.diffusion.schedule import NoiseSchedule
    from fedpdm.privacy.calibration import Calibration

__all__ = ["add_privacy_parser"]

SAMPLE_WARNING = (
    "norms are computed without noise: they, and a clip norm chosen from them, are NOT covered by "
    "the privacy guarantee. Give public images only, never private ones."
)
PICTURE_WARNING = (
    "the picture shows the images themselves, and many releases of them with seeded noise: it "
    "protects nobody. Give public images only, never private ones."
)
EXAMPLES = """\
examples:
  fedpdm privacy --epsilon 10 --clip-norm 10                the smallest t0
  fedpdm privacy --epsilon 10 --t0 690                      the largest clip norm
  fedpdm privacy --t0 690 --clip-norm 10 --curve            epsilon, also at other deltas
  fedpdm privacy --epsilon 10 --clip-norm 10 --releases 4   for 4 noisings of the same image
  fedpdm privacy --public-sample public.npz --clip-quantile 0.5 --epsilon 10
  fedpdm privacy --epsilon 10 --clip-norm 10 --picture releases.png --data digits
  fedpdm privacy --network --epsilon 10                     noise of a network by DP-SGD
"""
# Multiples of epsilon, and deltas, of the curve.
CURVE_EPSILONS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
DRAWING = {"data": "digits", "epsilons": "1,3,10,30", "num": 8, "seed": 0}
CURVE_DELTAS = (1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8, 1e-10, 1e-12)


def add_privacy_parser(commands: Any) -> None:
    """Add the command to the subparsers of `fedpdm`."""
    keys = {field.name: field for field in dataclasses.fields(ScheduleConfig)}
    parser = commands.add_parser(
        "privacy",
        help="of epsilon, t0 and clip norm give two, get the third",
        description="Of epsilon, t0 and clip norm give two, get the third, under both "
        "accountings: exact (analytic Gaussian) and the paper's bound.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--epsilon", type=float, help="of all releases of one image")
    parser.add_argument("--t0", type=int, help="noising steps")
    parser.add_argument("--clip-norm", type=float, help="L2 bound C of an image in [-1, 1] - shift")
    parser.add_argument("--delta", type=float, help="default: 1e-5")
    parser.add_argument(
        "--images", type=int, metavar="N",
        help="images of a client: delta should be below 1 / N; default: 1000",
    )  # fmt: skip
    parser.add_argument(
        "--schedule", choices=keys["kind"].metadata["choices"], default=keys["kind"].default,
        help="abar of cosine is ~ cos, of squared_cosine ~ cos^2 (Nichol and Dhariwal 2021); "
        "default: %(default)s",
    )  # fmt: skip
    for option, key, what in (
        ("--steps", "num_steps", "T"),
        ("--beta-start", "beta_start", "of the linear schedule"),
        ("--beta-end", "beta_end", "of the linear schedule"),
    ):
        default = keys[key].default
        parser.add_argument(
            option, type=type(default), default=default, help=f"{what}; default: %(default)s"
        )
    parser.add_argument(
        "--releases", type=int, default=1, metavar="K",
        help="times that the same image is noised afresh, all within epsilon; default: 1",
    )  # fmt: skip
    parser.add_argument(
        "--group-sizes", default="1,2,5,10", metavar="K,K,...",
        help="images of one person in one client; default: %(default)s",
    )  # fmt: skip
    parser.add_argument("--curve", action="store_true", help="also epsilon against delta")
    add_network_options(parser)
    public = parser.add_argument_group(
        "public images",
        "IMAGES is a data set by name, a folder with one folder per class, or a .npz file.\n"
        "What is computed from them is NOT private: never give private images.",
    )
    public.add_argument(
        "--public-sample", metavar="IMAGES", help="quantiles of the norms of at most 20,000"
    )
    public.add_argument(
        "--clip-quantile", type=float, metavar="Q", help="the clip norm is this quantile, e.g. 0.5"
    )
    public.add_argument(
        "--picture", type=Path, metavar="FILE.png", help="draw them clean, clipped and released"
    )
    public.add_argument("--data", metavar="IMAGES", help="what to draw; default: digits")
    public.add_argument("--epsilons", metavar="E,E,...", help="to draw; default: 1,3,10,30")
    public.add_argument("--num", type=int, help="images to draw, 1 to 64; default: 8")
    public.add_argument("--seed", type=int, help="of the drawn noise; default: 0")
    public.add_argument("--resolution", type=int, help="pixels, 1 to 1024; default: as they are")
    public.add_argument("--shift", type=float, help="default: the set's background")
    parser.set_defaults(action=run_privacy)


def run_privacy(options: argparse.Namespace) -> None:
    """The command's action. `ValueError` with one line for bad input."""
    _check_options(options)
    answer: dict[str, Any] = {}
    if options.network:
        answer["network"] = network = describe_network(options)
        _warn_of_delta(answer, network["delta"], options)
        _tell(answer, options)
        return
    clip_norm = options.clip_norm
    if options.public_sample is not None:
        _warn(f"--public-sample: {SAMPLE_WARNING}")
        answer["public_sample"] = sample = _describe_sample(options)
        clip_norm = sample.get("clip_norm", clip_norm)
        if options.epsilon is None and options.t0 is None and clip_norm is None:
            _tell(answer, options)
            return

    from fedpdm.diffusion.schedule import make_schedule
    from fedpdm.privacy.calibration import ACCOUNTINGS, UnreachableEpsilonError, calibrate

    schedule = make_schedule(
        options.schedule,
        num_steps=options.steps,
        beta_start=options.beta_start,
        beta_end=options.beta_end,
    )
    exact: Calibration | None = None
    for accounting in ACCOUNTINGS:
        try:
            found = calibrate(
                schedule,
                epsilon=options.epsilon,
                t0=options.t0,
                clip_norm=clip_norm,
                delta=options.delta,
                accounting=accounting,
                releases=options.releases,
                group_sizes=options.group_sizes,
            )
        except UnreachableEpsilonError as error:
            if exact is None:
                raise
            answer[accounting] = {"accounting": accounting, "error": str(error)}
            continue
        exact = exact or found
        answer[accounting] = dataclasses.asdict(found)
        if options.curve:
            answer[accounting]["curve"] = _curve(found, exact, options)
    assert exact is not None
    _warn_of_delta(answer, options.delta, options)
    answer["schedule"] = {"kind": schedule.kind, "num_steps": schedule.num_steps}
    if options.picture is not None:
        _warn(f"--picture: {PICTURE_WARNING}")
        answer["picture"] = _draw(options, schedule, exact.clip_norm)
    _tell(answer, options)


def _check_options(options: argparse.Namespace) -> None:
    """Checks, default values that depend on each other, and lists of numbers."""
    if options.clip_quantile is not None:
        if options.public_sample is None:
            raise ValueError("--clip-quantile: needs --public-sample")
        if options.clip_norm is not None:
            raise ValueError("--clip-quantile: give it or --clip-norm, not both")
        if not 0.0 <= options.clip_quantile <= 1.0:
            raise ValueError(f"--clip-quantile: must be in [0, 1], got {options.clip_quantile}")
    for name in NETWORK_OPTIONS:
        if not options.network and getattr(options, name) is not None:
            raise ValueError(f"--{name}: needs --network")
    for name in DRAWING:
        if options.picture is None and getattr(options, name) is not None:
            raise ValueError(f"--{name}: needs --picture")
    if options.picture is None and options.public_sample is None:
        for name in ("resolution", "shift"):
            if getattr(options, name) is not None:
                raise ValueError(f"--{name}: needs --public-sample or --picture")
    for name, default in DRAWING.items():
        if getattr(options, name) is None:
            setattr(options, name, default)
    options.group_sizes = numbers(int, "--group-sizes", options.group_sizes)
    options.epsilons = numbers(float, "--epsilons", options.epsilons)
    if options.delta is None and not options.network:
        options.delta = 1e-5
    if options.images is not None and options.images < 1:
        raise ValueError(f"--images: must be at least 1, got {options.images}")
    if options.resolution is not None and not 1 <= options.resolution <= 1024:
        raise ValueError(f"--resolution: must be in [1, 1024], got {options.resolution}")
    if not 1 <= options.num <= 64:
        raise ValueError(f"--num: must be in [1, 64], got {options.num}")
    if options.seed < 0:
        raise ValueError(f"--seed: must be at least 0, got {options.seed}")
    if options.picture is not None and options.picture.suffix.lower() != ".png":
        raise ValueError(f"--picture: must end in .png, got {options.picture}")


def _warn_of_delta(answer: dict[str, Any], delta: float, options: argparse.Namespace) -> None:
    from fedpdm.privacy.accountant import delta_warning

    if warning := delta_warning(delta, images=options.images):
        _warn(f"--delta: {warning}")
        answer["delta_warning"] = warning


def _warn(text: str) -> None:
    print(f"WARNING: {text}", file=sys.stderr, flush=True)


def _describe_sample(options: argparse.Namespace) -> dict[str, Any]:
    import numpy as np

    from fedpdm.data.open_images import QUANTILES, open_public_images, sorted_norms

    images = open_public_images(
        options.public_sample, option="--public-sample", resolution=options.resolution
    )
    shift = images.background if options.shift is None else options.shift
    norms = sorted_norms(images, shift=shift)
    sample = {
        "source": options.public_sample,
        "images": len(images),
        "shift": shift,
        "norm_quantiles": {f"{q:g}": float(np.quantile(norms, q)) for q in QUANTILES},
        "covered_by_guarantee": False,
        "warning": SAMPLE_WARNING,
    }
    if options.clip_quantile is not None:
        sample["clip_quantile"] = options.clip_quantile
        sample["clip_norm"] = float(np.quantile(norms, options.clip_quantile))
    return sample


def _curve(
    calibration: Calibration, exact: Calibration, options: argparse.Namespace
) -> dict[str, list[dict[str, float]]]:
    """Points of delta(epsilon), at multiples of the (exact) epsilon, and of epsilon(delta)."""
    middle = options.epsilon or float(f"{exact.epsilon:.3g}")
    return {
        "epsilon_at_delta": [
            {"delta": delta, "epsilon": calibration.epsilon_at(delta)}
            for delta in sorted({*CURVE_DELTAS, options.delta}, reverse=True)
        ],
        "delta_at_epsilon": [
            {"epsilon": factor * middle, "delta": calibration.delta_at(factor * middle)}
            for factor in CURVE_EPSILONS
        ],
    }


def _draw(options: argparse.Namespace, schedule: NoiseSchedule, clip_norm: float) -> dict[str, Any]:
    from fedpdm.commands.release_picture import draw_release_picture
    from fedpdm.data.open_images import open_public_images

    images = open_public_images(options.data, option="--data", resolution=options.resolution)
    rows = draw_release_picture(
        options.picture,
        images,
        schedule=schedule,
        clip_norm=clip_norm,
        shift=images.background if options.shift is None else options.shift,
        epsilons=options.epsilons,
        delta=options.delta,
        releases=options.releases,
        num=options.num,
        seed=options.seed,
    )
    return {
        "path": str(options.picture),
        "source": options.data,
        "clip_norm": clip_norm,
        "rows": [dataclasses.asdict(row) for row in rows],
        "covered_by_guarantee": False,
        "warning": PICTURE_WARNING,
    }


def _tell(answer: dict[str, Any], options: argparse.Namespace) -> None:
    if options.json:
        print(json_text(answer))
        return
    from fedpdm.commands.privacy_tables import answer_lines

    print("\n".join(answer_lines(answer)))
