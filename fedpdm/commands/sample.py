"""`fedpdm sample`: images of an exported pipeline, a run or a node's store."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from fedpdm.commands.terminal import tell

__all__ = ["add_sample_parser"]

DESCRIPTION = """\
Draw images with a client's models: an exported pipeline, a run directory of a simulation, or a
node's own store. --out draws one picture to look at. --files and --npz write the images themselves,
for another program to train on, with the settings and what is promised of the images beside them.
Give the same command again after an interruption, and it goes on, to the same images; with a larger
--num it adds to those that are there. A whole number as --label is a label, whatever classes are
called.
"""
EXAMPLES = """\
examples:
  fedpdm sample pipeline0 --label 3 --num 64 --out grid.png
  fedpdm sample pipeline0 --method alone --steps 50 --guidance 2 --out alone.png
  fedpdm sample pipeline0 --num 2000 --files samples          (samples/CLASS/000000.png, a table)
  fedpdm sample STORE --label malignant --num 500 --npz malignant.npz
"""


def add_sample_parser(commands: Any) -> None:
    """Add the command to the subparsers of `fedpdm`."""
    parser = commands.add_parser(
        "sample", help="sample from an exported pipeline, a run or a node's store",
        description=DESCRIPTION, epilog=EXAMPLES,
    )  # fmt: skip
    parser.add_argument(
        "pipeline", type=Path, metavar="FROM",
        help="an exported pipeline, a run directory, or a node's store",
    )  # fmt: skip
    parser.add_argument(
        "--client", type=int, help="whose models of a run; default: a node's own, else 0"
    )
    parser.add_argument(
        "--label", action="append", metavar="CLASS",
        help="class, by number or name (repeatable); default: all in turn",
    )  # fmt: skip
    parser.add_argument("--num", type=int, default=64, help="images in all; default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="one picture of them")
    parser.add_argument(
        "--files", type=Path, metavar="DIR", help="a PNG file for each, in a folder per class"
    )
    parser.add_argument("--npz", type=Path, metavar="FILE.npz", help="all of them in one file")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; default: %(default)s")
    parser.add_argument(
        "--steps", type=int, default=25, help="denoiser calls per image; default: %(default)s"
    )
    parser.add_argument("--guidance", type=float, help="default: the exported")
    parser.add_argument("--scheduler", help="a diffusers scheduler class; default: the exported")
    parser.add_argument(
        "--method", choices=("pfdm", "alone", "coarse"), default="pfdm",
        help="coarse then fine model, or the fine or the coarse one alone; default: %(default)s",
    )  # fmt: skip
    parser.set_defaults(action=run_sample)


def run_sample(options: argparse.Namespace) -> int:
    """The command's action. `ValueError`, one line, for arguments that are out of range."""
    outs = {name: getattr(options, name) for name in ("out", "files", "npz")}
    given = {name: path for name, path in outs.items() if path is not None}
    if len(given) != 1:
        raise ValueError(
            "--out, --files, --npz: give one of them, got "
            f"{' and '.join(f'--{name}' for name in given) or 'none'}"
        )
    ((kind, path),) = given.items()
    if kind != "out":
        return _sample_data(options, kind, path)
    from fedpdm.publishing.export import sample_grid

    sample_grid(
        options.pipeline,
        client=options.client,
        labels=options.label,
        num=options.num,
        out=path,
        seed=options.seed,
        num_steps=options.steps,
        guidance=options.guidance,
        scheduler=options.scheduler,
        method=options.method,
    )
    line = f"{options.num} samples written to {path}"
    tell(options, line, {"out": str(path), "num": options.num, "method": options.method})
    return 0


def _sample_data(options: argparse.Namespace, kind: str, path: Path) -> int:
    """Samples as data; 130 if it was interrupted."""
    from fedpdm.publishing.export import open_source, prepare
    from fedpdm.publishing.sample_data import (
        SampleSettings,
        sample_files,
        sample_npz,
        samples_statement,
    )

    source = open_source(options.pipeline, client=options.client)
    settings = SampleSettings(
        labels=source.labels(options.label),
        seed=options.seed,
        num_steps=options.steps,
        guidance=options.guidance,
        scheduler=options.scheduler,
        method=options.method,
    )
    prepare(source, scheduler=options.scheduler, device="auto")
    write = sample_files if kind == "files" else sample_npz
    try:
        drawn = write(source, path, settings=settings, num=options.num)
    except KeyboardInterrupt:
        print("interrupted; nothing is lost, the same command goes on", file=sys.stderr)
        return 130
    covered = samples_statement(source, options.method)[0]["covered"]
    words = "the run's guarantee covers them" if covered else "no guarantee covers them"
    beside = path / "privacy.txt" if kind == "files" else path.with_suffix(".privacy.txt")
    facts = {
        kind: str(path), "num": options.num, "drawn": drawn, "method": options.method,
        "covered": covered, "statement": str(beside),
    }  # fmt: skip
    tell(
        options,
        f"{options.num} samples in {path}, {drawn} of them drawn now; {words}: {beside}",
        facts,
    )
    return 0
