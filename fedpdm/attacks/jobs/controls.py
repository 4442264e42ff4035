"""Controls: a model that was overfitted on purpose, and one that never saw the members.

An attack that fails on the first or succeeds on the second is no evidence of anything. The images
are the 8x8 digits that come with scikit-learn, in grey.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from fedpdm.attacks.jobs.model_attacks import membership_job, memorisation_job, seed_of
from fedpdm.attacks.jobs.models import ModelTarget
from fedpdm.attacks.jobs.running import AttackJob, EndedAttack
from fedpdm.attacks.jobs.subjects import Subjects, matched_pairs
from fedpdm.attacks.membership import AttackTarget
from fedpdm.data import ImageSet, denormalize, load_image_set, normalize
from fedpdm.diffusion.denoisers import Denoiser, DenoiserSpec
from fedpdm.diffusion.objectives import denoising_loss, drop_labels
from fedpdm.diffusion.presets import PRESETS
from fedpdm.diffusion.schedule import make_schedule
from fedpdm.diffusion.training import OptimizerSettings, Progress, Trainer, select_device
from fedpdm.diffusion.twostage import SamplerSettings, sample_in_batches
from fedpdm.diffusion.weights import load_named
from fedpdm.jobs.progress import sum_progress
from fedpdm.storage.files import StoreError, read_tensors, write_tensors

__all__ = ["as_it_must_be", "control_images", "plan_controls", "train_control"]

SAMPLING_STEPS = 50
OVERFITTED, UNSEEN = "overfitted", "never saw them"  # the models, by what they know of the members


def control_images(num_images: int, *, seed: int) -> tuple[ImageSet, Subjects, ImageSet]:
    """(images to train on, subjects, images of the negative control): three disjoint thirds.

    Subjects are the images to train on and others, as many of each class; the last set has the
    number of the first and none of the subjects.
    """
    splits = [load_image_set("digits", split=split, coloring="none") for split in ("train", "test")]
    digits = replace(
        splits[0],
        images=np.concatenate([split.images for split in splits]),
        labels=np.concatenate([split.labels for split in splits]),
        identities=np.concatenate([split.image_identities() for split in splits]),
    )
    distinct = digits.subset(digits.distinct())
    if not 10 <= num_images <= len(distinct) // 3:
        raise ValueError(f"--images: must be in [10, {len(distinct) // 3}], got {num_images}")
    rng = np.random.default_rng(seed_of(seed, "control images"))
    order = rng.permutation(len(distinct))
    inside, free = order[:num_images], order[num_images:]
    rows, others = matched_pairs(
        distinct.labels[inside], distinct.labels[free], most=num_images, rng=rng
    )
    rest = np.setdiff1d(free, free[others])
    subjects = Subjects(
        members=distinct.images[inside[rows]],
        member_labels=distinct.labels[inside[rows]],
        non_members=distinct.images[free[others]],
        non_member_labels=distinct.labels[free[others]],
        source="digits that the model never saw",
    )
    unseen = distinct.subset(rng.permutation(rest)[:num_images])
    return distinct.subset(inside), subjects, unseen


def train_control(
    images: ImageSet,
    *,
    num_steps: int,
    seed: int,
    preset: str = "micro",
    batch_size: int = 64,
    lr: float = 2e-3,
    progress: Progress | None = None,
    device: torch.device | str = "cpu",
    kept: Path | None = None,
) -> ModelTarget:
    """A denoiser trained on `images` for `num_steps`, long for few images; its EMA weights.

    The target that the attacks were published for (DDPM): it predicts the noise, t is uniform in
    [1, T], every error in the noise counts alike. That weighs low noise, where models differ by
    what they know by heart. The weights are written to `kept`, or read from there where they were
    trained from the same arguments.
    """
    schedule, where = make_schedule("linear"), torch.device(device)
    spec = DenoiserSpec(
        preset=PRESETS[preset],
        resolution=images.images.shape[-1],
        channels=images.images.shape[1],
        num_classes=images.num_classes,
        prediction="epsilon",
        knows_clipping=False,
    )
    stream = seed_of(seed, "control training").generate_state(2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(stream[0]))
        model = Denoiser(spec, schedule)
    settings = OptimizerSettings(
        lr=lr, batch_size=batch_size, total_steps=num_steps, warmup_steps=min(50, num_steps // 2),
        decay="cosine", weight_decay=0.0, grad_clip=1.0, ema_decay=0.995, precision="float32",
    )  # fmt: skip
    recipe = {
        "images": hashlib.sha256(images.images.tobytes() + images.labels.tobytes()).hexdigest(),
        "model": json.dumps(asdict(spec), sort_keys=True),
        "training": json.dumps(asdict(settings), sort_keys=True),
        "seed": str(seed),
    }
    weights = None if kept is None else _kept_weights(kept, recipe)
    trainer = Trainer(model, settings, device=where)
    pixels = normalize(images.images, shift=images.background).to(where)
    labels = torch.tensor(images.labels, device=where)

    def loss(indices: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        return denoising_loss(
            trainer.model, schedule, pixels[indices],
            labels=drop_labels(labels[indices], probability=0.1, generator=generator),
            t_max=schedule.num_steps, weighting="snr", generator=generator,
        )  # fmt: skip

    if weights is None:
        trainer.train(
            loss,
            sample_weights=torch.ones(len(images), dtype=torch.float64),
            num_steps=num_steps,
            generator=torch.Generator(where).manual_seed(int(stream[1])),
            progress=progress,
            what="control",
        )
        weights = trainer.ema()
        if kept is not None:
            write_tensors(kept, weights, metadata=recipe)
    load_named(trainer.weights(), weights, what="EMA weights")
    target = AttackTarget(
        denoiser=trainer.model.eval(),
        schedule=schedule,
        t_range=(1, schedule.num_steps),
        parameters=tuple(trainer.model.network.parameters()),
        device=where,
    )
    return ModelTarget(name="control", target=target, shift=images.background)


def _kept_weights(path: Path, recipe: Mapping[str, str]) -> dict[str, torch.Tensor] | None:
    """The weights at `path`, if they are whole and of this recipe."""
    try:
        weights, metadata = read_tensors(path) if path.exists() else ({}, {})
    except StoreError:
        return None  # damaged: train again
    same = all(metadata.get(name) == value for name, value in recipe.items())
    return weights if weights and same else None


def as_it_must_be(done: EndedAttack) -> bool:
    """Whether an attack succeeded on the overfitted model, or failed on the other one.

    Membership: an AUC of at least 0.9, against an interval that does not lie above 0.5.
    Memorisation: at least half of the samples are flagged, against fewer than half.
    """
    overfitted = done.job.target == OVERFITTED
    if done.job.group == "memorisation":
        return bool((done.result["pixels"]["flagged_fraction"] >= 0.5) == overfitted)
    auc = done.result["scores"]["auc"]
    return bool(auc["value"] >= 0.9 if overfitted else auc["low"] <= 0.5)


def draw_samples(
    model: ModelTarget, labels: np.ndarray, num: int, seed: int, *, shape: tuple[int, int, int]
) -> np.ndarray:
    """uint8 (num, C, H, W) by steps of DPM-Solver, of classes drawn from `labels`."""
    wanted = np.random.default_rng(seed_of(seed, "labels")).choice(labels, size=num)
    target = model.target
    watch = sum_progress("samples to attack", "step", num * SAMPLING_STEPS)
    output = sample_in_batches(
        target.denoiser,
        None,
        SamplerSettings(
            schedule=target.schedule,
            t0=0,
            scheduler="dpm_solver",
            num_steps=SAMPLING_STEPS,
            watch=watch,
        ),
        image_shape=shape,
        labels=torch.from_numpy(wanted).to(target.device),
        generator=torch.Generator(target.device).manual_seed(seed),
    )
    return denormalize(output.images.cpu(), shift=model.shift).numpy()


def plan_controls(
    *,
    attacks: Sequence[str],
    num_images: int,
    num_steps: int,
    num_samples: int,
    out: Path,
    seed: int,
    device: str = "auto",
    show: Callable[[str], Progress] | None = None,
) -> list[AttackJob]:
    """Train both models; returns the jobs: membership attacks and memorisation, on each.

    Pictures, and the weights of models, are written into `out`. `show` makes the progress of a
    training from what it is called.
    """
    trained, subjects, unseen = control_images(num_images, seed=seed)
    where = select_device(device)
    jobs = []
    for label, images in ((OVERFITTED, trained), (UNSEEN, unseen)):
        model = train_control(
            images,
            num_steps=num_steps,
            seed=seed,
            progress=show(f"training a control ({label})") if show else None,
            device=where,
            kept=out / "models" / f"{label.split()[0]}.safetensors",
        )
        settings = {"images": num_images, "steps": num_steps, "model": label}
        jobs += [
            membership_job(
                model, subjects, attack=attack, label=label, settings=settings, seed=seed
            )
            for attack in attacks
        ]
        jobs.append(
            memorisation_job(
                functools.partial(_samples, model, trained),
                trained.images,
                subjects.non_members,
                extractor=None,
                label=label,
                num_samples=num_samples,
                picture=out / f"memorised-{label.split()[0]}.png",
                settings=settings,
                seed=seed,
            )
        )
    return jobs


def _samples(model: ModelTarget, images: ImageSet, num: int, seed: int) -> np.ndarray:
    channels, height, width = images.images.shape[1:]
    return draw_samples(model, images.labels, num, seed, shape=(channels, height, width))
