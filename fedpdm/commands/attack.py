"""`fedpdm attack`: try to break the release, with the code that clients run."""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpdm.commands.attack_controls import add_controls
from fedpdm.commands.attack_models import add_model_attacks
from fedpdm.commands.terminal import say, show
from fedpdm.config.schema import ScheduleConfig
from fedpdm.text import json_text

if TYPE_CHECKING:
    from fedpdm.config import RunConfig
    from fedpdm.data import ImageSet

__all__ = ["add_attack_parser"]

EXAMPLES = """\
examples:
  fedpdm attack runs/eps3 --attacks pia,gsa,memorisation --clients 0,1 --out attacks
  fedpdm attack --unet model --members a.npz --non-members b.npz --out attacks
  fedpdm attack controls --out controls
  fedpdm attack linkage --data mnist --epsilon 10 --clip-norm 10 --out linkage
  fedpdm attack audit --data cifar10 --epsilon 10 --clip-norm 10 --canaries 10000
  fedpdm attack audit --epsilon 10 --clip-norm 10 --seeded 0 --known-seed 0     (must fail)
"""
LINKAGE = """\
The server's best test: from which of two known images was an upload made? Images of a data set go
through a client's real release path; the likelihood ratio's ROC curve is compared with the one that
follows from the noise. Exit code 1 if the two disagree.
"""
AUDIT = """\
One-run audit: a client is given one of each of many pairs of canaries, by a secret coin; everything
it uploads in two rounds, with a restart between them, is used to guess the coins. What the right
guesses prove about epsilon, and checks of the noise itself, are held against the client's ledger.
Exit code 1 if the release leaks more than the ledger says.
"""


def add_attack_parser(commands: Any) -> None:
    """Add the command to the subparsers of `fedpdm`."""
    attack = commands.add_parser(
        "attack",
        help="attack the release (linkage, audit) or the models of a run or any U-Net",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = attack.add_subparsers(required=True, metavar="ATTACK")
    linkage = kinds.add_parser(
        "linkage",
        help="from which of two images was an upload made?",
        description=LINKAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    linkage.add_argument(
        "--data", default="digits", metavar="IMAGES",
        help="a data set by name, a folder with one folder per class, or a .npz file; "
        "default: %(default)s",
    )  # fmt: skip
    linkage.add_argument("--pairs", type=int, help="default: as many as there are, at most 10,000")
    linkage.set_defaults(action=run_linkage)
    audit = kinds.add_parser(
        "audit",
        help="what do a client's uploads prove about epsilon?",
        description=AUDIT,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    audit.add_argument("--canaries", type=int, default=5000, help="default: %(default)s")
    audit.add_argument(
        "--data", metavar="IMAGES",
        help="canaries in the shape of these images, around their background; as for linkage",
    )  # fmt: skip
    audit.add_argument("--shape", metavar="CxHxW", help="default: that of --data, else 3x32x32")
    audit.add_argument(
        "--known-seed", type=int, action="append", default=[], metavar="SEED",
        help="a seed that somebody else may know (repeatable)",
    )  # fmt: skip
    audit.set_defaults(action=run_audit)
    add_model_attacks(kinds)
    add_controls(kinds)
    for parser in (linkage, audit):
        parser.add_argument("--resolution", type=int, help="pixels; default: as they are")
        _add_release_options(parser)


def _add_release_options(parser: argparse.ArgumentParser) -> None:
    kind = next(f for f in dataclasses.fields(ScheduleConfig) if f.name == "kind")
    parser.add_argument("--epsilon", type=float, help="give it or --t0; default: 10")
    parser.add_argument("--t0", type=int, help="noising steps")
    parser.add_argument("--clip-norm", type=float, default=10.0, help="default: %(default)s")
    parser.add_argument("--delta", type=float, default=1e-5, help="default: %(default)s")
    parser.add_argument("--shift", type=float, help="default: the set's background")
    parser.add_argument("--schedule", choices=kind.metadata["choices"], default=kind.default)
    parser.add_argument("--steps", type=int, default=1000, help="T; default: %(default)s")
    parser.add_argument("--seed", type=int, help="of pairs and coins; default: drawn and reported")
    parser.add_argument(
        "--seeded", type=int, metavar="SEED", help="seeded noise, as in a simulation with this seed"
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="write figures in JSON, pictures")
    parser.add_argument("--json", action="store_true", help="print JSON")


def _config(options: argparse.Namespace) -> RunConfig:
    """The client's run; checks every option of the release."""
    from fedpdm.engines.one_client import attack_config

    if options.epsilon is not None and options.t0 is not None:
        raise ValueError("give --epsilon or --t0, not both")
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
    )


def run_linkage(options: argparse.Namespace) -> int:
    """The action of `attack linkage`: 0 if measured and analytic AUC agree, else 1."""
    import numpy as np

    from fedpdm.attacks import linkage_attack
    from fedpdm.attacks.jobs.release_report import draw_linkage, linkage_text
    from fedpdm.engines.one_client import upload_releases

    config, images = _config(options), _images(options)
    most = len(images.distinct()) // 2
    pairs = min(10_000, most) if options.pairs is None else options.pairs
    say(f"linkage: {pairs:,} pairs of {options.data}, through a client's release path ...")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="fedpdm-attack-") as folder:
        result = linkage_attack(
            images,
            lambda chosen: upload_releases(config, chosen, Path(folder))[0][0],
            num_pairs=pairs,
            rng=np.random.default_rng(options.seed),
        )
    say(f"linkage: done in {time.perf_counter() - started:.1f} s")
    summary = result.summary
    facts = {
        "data": options.data,
        "seed": options.seed,
        "t0": result.parameters.t0,
        "shift": result.parameters.shift,
        **dataclasses.asdict(summary),
    }
    if options.out is not None:
        draw_linkage(result, options.out / "linkage.png", facts)
    _tell(options, "linkage.json", facts, linkage_text(facts))
    return 0 if summary.agrees else 1


def _images(options: argparse.Namespace) -> ImageSet:
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


def run_audit(options: argparse.Namespace) -> int:
    """The action of `attack audit`: 0 if the release keeps to its ledger, else 1."""
    import numpy as np

    from fedpdm.attacks import audit, draw_game
    from fedpdm.attacks.jobs.release_report import audit_text
    from fedpdm.engines.one_client import upload_releases
    from fedpdm.privacy.planning import build_noise

    config = _config(options)
    shape, background = (3, 32, 32), 0.0
    if options.data is not None:
        images = _images(options)
        shape, background = images.images.shape[1:], images.background
    if options.shape is not None:
        shape = _shape(options.shape)
    options.shape = "x".join(map(str, shape))
    game = draw_game(
        options.canaries,
        shape=shape,
        rng=np.random.default_rng(options.seed),
        background=background if options.shift is None else options.shift,
    )
    say(f"audit: {options.canaries:,} canaries of {options.shape}, two rounds ...")
    started = time.perf_counter()
    suspects = []
    for seed in options.known_seed:
        run = dataclasses.replace(config.run, simulation=True, seed=seed)
        suspects.append(build_noise(dataclasses.replace(config, run=run), client=0, release=1))
    with tempfile.TemporaryDirectory(prefix="fedpdm-attack-") as folder:
        uploads, store = upload_releases(config, game.images, Path(folder), rounds=2)
        spent = store.spent(delta=options.delta)
        report = audit(
            game,
            uploads,
            claimed_epsilon=spent.largest,
            delta=options.delta,
            recorded=spent.releases_per_image,
            suspects=suspects,
        )
    say(f"audit: done in {time.perf_counter() - started:.1f} s")
    facts = {"seed": options.seed, **dataclasses.asdict(report)}
    _tell(options, "audit.json", facts, audit_text(report, seed=options.seed))
    return 0 if report.passed else 1


def _shape(text: str) -> tuple[int, int, int]:
    try:
        channels, height, width = (int(part) for part in text.split("x"))
    except ValueError:
        raise ValueError(f"--shape: must be like 3x32x32, got {text!r}") from None
    return channels, height, width


def _tell(options: argparse.Namespace, name: str, facts: dict[str, Any], text: str) -> None:
    """Print the result as text or JSON, and write it where asked."""
    from fedpdm.storage.files import write_atomic

    if options.out is not None:
        write_atomic(options.out / name, (json_text(facts) + "\n").encode())
    show(json_text(facts) if options.json else text)
