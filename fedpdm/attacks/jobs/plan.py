"""The attacks against a finished run, or on a U-Net: their targets, attackers and jobs."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpdm.attacks.jobs.model_attacks import (
    collusion_job,
    membership_job,
    memorisation_job,
    seed_of,
)
from fedpdm.attacks.jobs.models import ModelTarget, run_targets
from fedpdm.attacks.jobs.running import AttackJob
from fedpdm.attacks.jobs.subjects import Subjects, open_subjects, read_records
from fedpdm.attacks.jobs.sum_attacks import sum_jobs
from fedpdm.attacks.jobs.unet import unet_subjects
from fedpdm.attacks.jobs.uploads import (
    Against,
    pretrained_attacker,
    release_jobs,
    stored_release,
)
from fedpdm.attacks.membership import ATTACKS, MIN_FITTED
from fedpdm.config import ConfigError
from fedpdm.data import ImageSet
from fedpdm.data.loading import load_public, load_split
from fedpdm.evaluation.scoring import build_extractor
from fedpdm.evaluation.synthesis import Synthesizer, open_synthesizer
from fedpdm.storage.run_directory import RunDirectory

__all__ = ["GROUPS", "chosen_attacks", "plan_run", "plan_unet"]

GROUPS = ("membership", "memorisation", "reconstruction", "collusion", "linkage")
Say = Callable[[str], None]


def chosen_attacks(text: str | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(membership attacks, other groups) that a list with commas names; all for None.

    A name of `ATTACKS` or of `GROUPS`, `membership` meaning all of the former. `ConfigError` else.
    """
    if text is None:
        return tuple(ATTACKS), GROUPS[1:]
    names = [name.strip() for name in text.split(",") if name.strip()]
    known = (*ATTACKS, *GROUPS)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ConfigError(
            f"--attacks: must be of {', '.join(known)}, got {(unknown or [text])[0]!r}"
        )
    membership = [name for name in ATTACKS if name in names or "membership" in names]
    return tuple(membership), tuple(name for name in GROUPS[1:] if name in names)


def plan_run(
    run: RunDirectory,
    *,
    clients: Sequence[int],
    attacks: tuple[tuple[str, ...], tuple[str, ...]],
    out: Path,
    seed: int,
    num_subjects: int = 2000,
    num_samples: int = 10_000,
    num_uploads: int = 500,
    releases: Path | None = None,
    public: ImageSet | None = None,
    public_steps: int = 2000,
    cache: Path | None = None,
    say: Say = print,
) -> list[AttackJob]:
    """The jobs against these clients of a finished run of a simulation.

    Args:
        attacks: of `chosen_attacks`; what a run cannot be asked (a baseline has no uploads) is
            left out and said.
        num_subjects: members, and as many non-members, at most; num_samples: for memorisation;
            num_uploads: for reconstruction, at most.
        releases: where clients keep their releases if not in the run.
        public: a look-alike set of the run's size; an attacker is trained on it for `public_steps`.

    Raises:
        ValueError: one line: an unfinished run, a client or record of members that is not there,
            data that have changed, no non-members, or nothing to do.
    """
    config = run.config()
    if not config.run.simulation:
        raise ConfigError("run.simulation: false; only a simulation's clients can be attacked here")
    for client in clients:
        if not 0 <= client < config.partition.num_clients:
            raise ConfigError(
                f"--clients: must be in [0, {config.partition.num_clients - 1}], got {client}"
            )
    images = load_split(config, "train")
    opened = {client: open_synthesizer(run, client, images=images) for client in clients}
    names, groups = attacks
    settings = {"models": _digest_of(run, clients)}
    role = "coarse" if config.kind.has_shared_model else "fine"
    records = {role: read_records(run, images, role=role)}
    if config.kind.has_fine_model:
        records["fine"] = read_records(run, images, role="fine")
    jobs: list[AttackJob] = []

    def subjects_of(role: str, chosen: Sequence[int]) -> Subjects:
        rng = np.random.default_rng(seed_of(seed, f"subjects {role} {list(chosen)}"))
        return open_subjects(run, images, records[role], chosen, most=num_subjects, rng=rng)

    shared_name = "coarse" if config.kind.releases else "shared"
    first = run_targets(opened[clients[0]])
    against = []
    if shared_name in first:
        against.append((shared_name, first[shared_name], subjects_of("coarse", clients)))
    for client, one in opened.items():
        for name, target in run_targets(one).items():
            if name != shared_name:
                subjects = subjects_of("fine", [client])
                against.append((f"{name}, client {client}", target, subjects))
    for label, target, subjects in against:
        for attack in names:
            if ATTACKS[attack].needs_gradients and not target.target.parameters:
                say(
                    f"{attack} on {label} is left out: it needs gradients, and class Gaussians are "
                    "computed, not trained"
                )
                continue
            if ATTACKS[attack].fitted and len(subjects) < MIN_FITTED:
                say(f"{attack} on {label} is left out: it needs {MIN_FITTED} members to fit on")
                continue
            jobs.append(
                membership_job(
                    target, subjects, attack=attack, label=label, settings=settings, seed=seed
                )
            )
    if "memorisation" in groups:
        extractor, _ = build_extractor(config, load_split(config, "test"), cache=cache, say=say)
        for client, one in opened.items():
            for label, sampler in _samplers(one).items():
                shared = label in ("coarse", "shared")
                if shared and client != clients[0]:
                    continue
                known = records["coarse" if shared else "fine"]
                held = [r for r in known if shared or r.client_id == client]
                jobs.append(
                    memorisation_job(
                        sampler,
                        images.images[np.concatenate([r.train.positions for r in held])],
                        images.images[np.concatenate([r.heldout.positions for r in held])],
                        extractor=extractor,
                        label=label if shared else f"{label}, client {client}",
                        num_samples=num_samples,
                        picture=out / f"memorised-{label}-client{client}.png",
                        settings=settings,
                        seed=seed,
                    )
                )
    wanted = [name for name in ("linkage", "reconstruction", "collusion") if name in groups]
    if wanted and not config.kind.releases:
        say(f"{', '.join(wanted)} left out: this baseline releases no images")
        wanted = []
    if config.has_statistics and wanted and public is not None:
        say("--public is left out: class statistics have no network for an attacker to train")
    if config.has_network and {"linkage", "reconstruction"} & {*wanted}:
        say("linkage and reconstruction are of class statistics alone: gradients are not kept")
    if wanted and config.kind.has_shared_model:
        lengths = _public(run)
        for client, one in opened.items():
            released = None if config.has_statistics else stored_release(run, one, releases)
            late = None
            if public is not None and released is not None:
                late = functools.partial(
                    pretrained_attacker, one, released, public, num_steps=public_steps, seed=seed
                )
            others = {
                other: open_synthesizer(run, other, images=images)
                for other in range(config.partition.num_clients)
                if other != client
            }
            uploaded = Against(
                one=one, others=others, public=lengths, wanted=wanted, settings=settings,
                out=out, seed=seed, num_uploads=num_uploads,
            )  # fmt: skip
            if released is None:
                strangers = _strangers(images, one)
                jobs += sum_jobs(run, uploaded, strangers, releases=releases, say=say)
            else:
                jobs += release_jobs(uploaded, released, late=late)
            if "collusion" in wanted and others:
                colluders = {"coarse": first["coarse"]} | {
                    f"fine of client {other}": run_targets(each)["fine"]
                    for other, each in others.items()
                }
                for attack in [name for name in names if not ATTACKS[name].fitted] or ["pia"]:
                    jobs.append(
                        collusion_job(
                            colluders,
                            subjects_of("coarse", [client]),
                            attack=attack,
                            label=f"client {client}",
                            settings=settings,
                            seed=seed,
                        )
                    )
    if not jobs:
        raise ConfigError("--attacks: none of these can be made against this run")
    return jobs


def plan_unet(
    model: ModelTarget,
    members: Path,
    non_members: Path,
    *,
    attacks: Sequence[str],
    num_subjects: int,
    null_label: int | None,
    settings: Mapping[str, Any],
    seed: int,
    say: Say = print,
) -> tuple[list[AttackJob], Subjects]:
    """The membership attacks on a U-Net of `open_unet`, and the images they are made on.

    `members` and `non_members` are folders or .npz files. What cannot be asked of this model is
    left out and said; `ConfigError` if nothing is left.
    """
    rng = np.random.default_rng(seed_of(seed, "subjects"))
    subjects = unet_subjects(model, members, non_members, most=num_subjects, rng=rng)
    jobs = []
    for name in attacks:
        spec = ATTACKS[name]
        if spec.needs_labels and not (model.target.labels_known and null_label is not None):
            say(f"{name} is left out: it needs a model with labels and --null-label")
        elif spec.fitted and len(subjects) < MIN_FITTED:
            say(f"{name} is left out: it needs {MIN_FITTED} members to fit on")
        else:
            jobs.append(
                membership_job(
                    model, subjects, attack=name, label="unet", settings=settings, seed=seed
                )
            )
    if not jobs:
        raise ConfigError("--attacks: none of these can be made against this model")
    return jobs, subjects


def _samplers(one: Synthesizer) -> dict[str, Any]:
    """Ways to draw samples (num, seed) -> uint8: as the run does, and the shared model alone."""

    def labels_of(num: int, seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed_of(seed, "labels"))
        return rng.choice(one.own.train_labels, size=num)

    def as_run(num: int, seed: int) -> np.ndarray:
        labels = labels_of(num, seed)
        return one.shown("samples to attack", labels).sample(labels, seed=seed)

    def coarse_only(num: int, seed: int) -> np.ndarray:
        generator = torch.Generator(one.device).manual_seed(seed)
        labels = labels_of(num, seed)
        coarse = replace(one, fine=None).shown("samples of the coarse model", labels)
        return coarse.draw_pixels(labels, generator=generator)

    if one.coarse is None or one.fine is None:
        return {"shared" if one.fine is None else "fine": as_run}
    if one.settings.chain == "noise_to_noise":
        return {"combined": as_run}  # the coarse model's own samples are as noisy as uploads
    return {"combined": as_run, "coarse": coarse_only}


def _public(run: RunDirectory) -> np.ndarray:
    """Images whose length may be known: those that nobody holds, else test images."""
    try:
        return load_public(run.config(), count=1000).images
    except ConfigError:
        return load_split(run.config(), "test").images


def _strangers(images: ImageSet, one: Synthesizer) -> ImageSet:
    """Images of the split that the client does not hold, nor any of equal pixels."""
    own = {bytes(row) for row in one.own.images.image_digests()}
    every = images.image_digests()
    return images.subset(np.flatnonzero([bytes(row) not in own for row in every]))


def _digest_of(run: RunDirectory, clients: Sequence[int]) -> str:
    """SHA-256 over the config and every model of the run that an attack may use."""
    sha = hashlib.sha256((run.root / "config.yaml").read_bytes())
    paths = [run.root / "coarse.safetensors"]
    for client in range(run.config().partition.num_clients):
        paths += sorted(run.client_path(client).glob("rounds/*/fine.safetensors"))[-1:]
    for path in paths:
        if path.exists():
            with open(path, "rb") as file:
                sha.update(hashlib.file_digest(file, "sha256").digest())
    return sha.hexdigest()
