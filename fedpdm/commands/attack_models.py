"""`fedpdm attack RUN`, `fedpdm attack --unet PATH`: attacks on finished models."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpdm.commands.terminal import say, show
from fedpdm.config import ConfigError

if TYPE_CHECKING:
    from fedpdm.attacks.jobs.running import AttackJob, EndedAttack
    from fedpdm.data import ImageSet
    from fedpdm.storage.run_directory import RunDirectory

__all__ = [
    "add_model_attacks",
    "check_numbers",
    "finish_attacks",
    "membership_names",
    "route_attack",
]

MODELS = """\
Attacks on the models of a finished simulation, or on any diffusers U-Net. Writes attacks.json,
summary.md (one page), ROC curves and pictures into --out; each finished attack is kept there, so
a rerun does what is left.

attacks: loss, pia, pian, secmi, secmi_neural, clid, gsa (together: membership), memorisation,
reconstruction, collusion, linkage. See docs/attacks.md.
"""


def route_attack(arguments: Sequence[str]) -> list[str]:
    """`attack RUN ...` and `attack --unet ...` as `attack models ...`; all else as it is."""
    words = list(arguments)
    kinds = ("linkage", "audit", "controls", "models", "-h", "--help")
    if words[:1] == ["attack"] and len(words) > 1 and words[1] not in kinds:
        return ["attack", "models", *words[1:]]
    return words


def add_model_attacks(kinds: Any) -> None:
    """Add `models` to the subparsers of `fedpdm attack`."""
    models = kinds.add_parser(
        "models",
        help="RUN [--attacks ...]: membership, memorisation, reconstruction, collusion, linkage "
        "(the word models may be left out)",
        description=MODELS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    models.add_argument("run", nargs="?", type=Path, help="directory of a finished simulation")
    models.add_argument("--attacks", metavar="A,A,...", help="default: all that can be made")
    models.add_argument("--clients", default="0", help="with commas; default: %(default)s")
    models.add_argument("--out", type=Path, required=True, metavar="DIR")
    models.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    models.add_argument(
        "--subjects", type=int, default=2000, metavar="N",
        help="members, and as many non-members, at most; default: %(default)s",
    )  # fmt: skip
    models.add_argument(
        "--samples", type=int, default=10_000, metavar="N",
        help="generated images for memorisation; default: %(default)s",
    )  # fmt: skip
    models.add_argument(
        "--uploads", type=int, default=500, metavar="N",
        help="uploads to reconstruct, at most; default: %(default)s",
    )  # fmt: skip
    models.add_argument(
        "--public", metavar="IMAGES",
        help="a public look-alike set by name, folder or .npz: an attacker trains on it",
    )  # fmt: skip
    models.add_argument(
        "--public-steps", type=int, default=2000, metavar="N",
        help="gradient steps of that attacker; default: %(default)s",
    )  # fmt: skip
    models.add_argument("--releases", type=Path, metavar="DIR", help="if not kept in the run")
    models.add_argument("--json", action="store_true", help="print attacks.json")
    unet = models.add_argument_group("any diffusers U-Net")
    unet.add_argument("--unet", type=Path, metavar="PATH", help="a UNet2DModel directory")
    unet.add_argument("--members", type=Path, help="folder or .npz of images it was trained on")
    unet.add_argument("--non-members", type=Path, help="and of images it was not")
    unet.add_argument("--prediction", help="epsilon, sample or v_prediction; default: as scheduled")
    unet.add_argument("--betas", metavar="FIRST,LAST", help="linear; default: the scheduler's")
    unet.add_argument("--steps", type=int, default=1000, help="T, with --betas")
    unet.add_argument("--null-label", type=int, metavar="K", help='label of "none", for clid')
    models.set_defaults(action=run_attacks)


def check_numbers(options: argparse.Namespace, *names: str) -> None:
    """`ConfigError` unless these options are at least 1 (the seed: 0) and --out may be a folder."""
    for name in names:
        least = 0 if name == "seed" else 1
        if getattr(options, name) < least:
            shown = name.replace("_", "-")
            raise ConfigError(f"--{shown}: must be at least {least}, got {getattr(options, name)}")
    if options.out.exists() and not options.out.is_dir():
        raise ConfigError(f"--out: {options.out} is not a directory")


def run_attacks(options: argparse.Namespace) -> None:
    """The action of `attack RUN` and `attack --unet`."""
    check_numbers(options, "seed", "subjects", "samples", "uploads", "steps", "public_steps")
    if (options.run is None) == (options.unet is None):
        raise ConfigError("attack: give a run directory, or --unet with images, not both")
    jobs, title, facts = _of_unet(options) if options.unet else _of_run(options)
    finish_attacks(options, jobs, title, facts)


def finish_attacks(
    options: argparse.Namespace, jobs: Sequence[AttackJob], title: str, facts: dict[str, Any]
) -> list[EndedAttack]:
    """Make the attacks, write what a reader gets into --out; results in the order of `jobs`."""
    from fedpdm.attacks.jobs.report import write_report
    from fedpdm.attacks.jobs.running import run_attack_jobs
    from fedpdm.reporting.attack_words import verdicts
    from fedpdm.storage.holding import held

    with held(options.out):
        done = run_attack_jobs(jobs, options.out, say=say)
        path = write_report(done, options.out, title=title, facts={"seed": options.seed, **facts})
    if getattr(options, "json", False):
        print((options.out / "attacks.json").read_text(), end="")
    else:
        for words in verdicts(json.loads((options.out / "attacks.json").read_text())["attacks"]):
            show(words)
        show(f"{len(done)} attacks, summary in {path}")
    return done


def _of_run(options: argparse.Namespace) -> tuple[list[AttackJob], str, dict[str, Any]]:
    clients = _numbers(options.clients)
    if options.members or options.non_members:
        raise ConfigError("--members, --non-members: are for --unet; a run has recorded its own")
    from fedpdm.attacks.jobs.plan import chosen_attacks, plan_run
    from fedpdm.storage.holding import check_not_held
    from fedpdm.storage.run_directory import RunDirectory

    attacks = chosen_attacks(options.attacks)
    check_not_held(options.run)
    run = RunDirectory(options.run)
    jobs = plan_run(
        run,
        clients=clients,
        attacks=attacks,
        out=options.out,
        seed=options.seed,
        num_subjects=options.subjects,
        num_samples=options.samples,
        num_uploads=options.uploads,
        releases=options.releases,
        public=_public_set(options, run) if options.public else None,
        public_steps=options.public_steps,
        say=say,
    )
    config = run.config()
    privacy = run.read_json("privacy.json")
    if config.kind.releases:
        promise = (
            f"each image is ({privacy['epsilon']:.4g}, {privacy['delta']:g})-locally "
            "differentially private in what its client sent"
        )
    else:
        promise = f"baseline: {privacy['guarantee']}"
    names = ", ".join(map(str, clients))
    what = (
        f"Attacked: the models of run `{config.name}`, client {names} of "
        f"{config.partition.num_clients}, data {config.data.name}; {promise}. `coarse` is what the "
        "server and all clients see, `fine` is private unless its owner publishes it, `combined` "
        "is both in one chain, as the client samples."
    )
    return jobs, f"Attacks on {config.name}", {"what": what, "config": dataclasses.asdict(config)}


def _public_set(options: argparse.Namespace, run: RunDirectory) -> ImageSet:
    """The look-alike set at the run's size; grey images become colour ones where that is needed."""
    import numpy as np

    from fedpdm.data import ImageSet
    from fedpdm.data.open_images import open_public_images
    from fedpdm.data.spec import build_image_spec

    spec = build_image_spec(run.config())
    source = open_public_images(options.public, option="--public", resolution=spec.resolution)
    images = source.read(np.arange(len(source)))
    if images.shape[1] == 1 and spec.channels == 3:
        images = images.repeat(3, axis=1)
    if images.shape[1:] != spec.shape:
        raise ConfigError(f"--public: images must be {spec.shape}, got {images.shape[1:]}")
    return ImageSet(
        images=images,
        labels=source.labels,
        class_names=source.class_names,
        background=source.background,
    )


def _of_unet(options: argparse.Namespace) -> tuple[list[AttackJob], str, dict[str, Any]]:
    if not (options.members and options.non_members):
        raise ConfigError("--unet: needs --members and --non-members")
    from fedpdm.attacks.jobs.plan import chosen_attacks, plan_unet
    from fedpdm.attacks.jobs.unet import file_digest, open_unet
    from fedpdm.diffusion.training import select_device

    names, groups = chosen_attacks(options.attacks)
    if options.attacks and groups:
        raise ConfigError(
            f"--attacks: {groups[0]} needs a run; for --unet there are {membership_names()}"
        )
    betas = None
    if options.betas:
        try:
            first, last = (float(part) for part in options.betas.split(","))
        except ValueError:
            raise ConfigError(f"--betas: must be like 1e-4,0.02, got {options.betas!r}") from None
        betas = (first, last)
    model = open_unet(
        options.unet,
        prediction=options.prediction,
        betas=betas,
        num_steps=options.steps,
        null_label=options.null_label,
        device=select_device("auto"),
    )
    jobs, subjects = plan_unet(
        model,
        options.members,
        options.non_members,
        attacks=names,
        num_subjects=options.subjects,
        null_label=options.null_label,
        settings={
            "unet": file_digest(options.unet),
            "prediction": options.prediction,
            "betas": betas,
            "null_label": options.null_label,
        },
        seed=options.seed,
        say=say,
    )
    what = (
        f"Attacked: the U-Net in `{options.unet.name}`, {len(subjects)} members and as many "
        "non-members, matched per class where the model takes labels. Whether the members trained "
        "it, and the others did not, is what was said, not checked."
    )
    return jobs, f"Attacks on {options.unet.name}", {"what": what}


def membership_names() -> str:
    """The membership attacks, with commas."""
    from fedpdm.attacks.membership import ATTACKS

    return ", ".join(ATTACKS)


def _numbers(text: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--clients: must be whole numbers with commas, got {text!r}") from None
    if len(set(numbers)) < len(numbers):
        raise ConfigError(f"--clients: must be distinct, got {text!r}")
    return numbers
