"""Finished models as a diffusers pipeline on disk, and pictures drawn with one.

An exported directory needs diffusers and torch alone: U-Nets and scheduler as diffusers saves them,
`pipeline.py` (a copy of `fedpdm.publishing.pipeline`), `privacy.json` (the run's statement) and a
model card with the client's ledger. It can be uploaded to the Hugging Face Hub as it is.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from diffusers.utils import logging as diffusers_logging

from fedpdm.config import RunConfig
from fedpdm.data.loading import load_split
from fedpdm.data.spec import ImageSpec
from fedpdm.diffusion.sampling import make_scheduler
from fedpdm.diffusion.training import select_device
from fedpdm.privacy.counts import noised_counts
from fedpdm.privacy.mechanism import ClassStatistics, mechanism_named
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.privacy.statement import client_statement
from fedpdm.publishing.model_card import model_card
from fedpdm.publishing.pipeline import PFDMPipeline
from fedpdm.reporting.pictures import draw_image_grid
from fedpdm.reporting.pictures.files import png_path
from fedpdm.rng import Purpose, torch_generator
from fedpdm.setup.build import coarse_share
from fedpdm.setup.chosen import find_objective
from fedpdm.setup.pair import check_finished, client_weights, load_pair, shared_weights
from fedpdm.setup.run_setup import set_up_for
from fedpdm.storage.client_store import ClientStore, store_label
from fedpdm.storage.files import StoreError, clear_leftovers
from fedpdm.storage.run_directory import RunDirectory
from fedpdm.text import json_text

__all__ = ["export_pipeline", "load_pipeline", "sample_grid"]

BATCH_SIZE = 256
# Of a run's statement: how many images paid what, and places on this machine.
_KEPT_HERE = ("epsilon_distribution", "unreadable_stores")


def export_pipeline(
    run: RunDirectory,
    *,
    client_id: int,
    out: Path,
    store: Path | None = None,
    counts_epsilon: float | None = None,
) -> Path:
    """Write one client's models of a finished run as a diffusers pipeline directory.

    The directory appears complete or not at all. It holds EMA weights only: no optimiser state
    and no release.

    Args:
        run: read are `config.yaml`, `coarse.safetensors` and `privacy.json`.
        client_id: whose fine model.
        out: directory to make; it may exist if it is empty. It is returned.
        store: the client's store; default `clients/<client_id>` of the run (simulation).
        counts_epsilon: with `sampling.coarse_worth`, noise the numbers of images per class that the
            export's `coarse_share` gives away; default: they are exact. The noise is drawn once and
            kept in the store.

    Raises:
        ValueError: one line, if the run has not finished, the client has no fine model there, its
            store belongs to another run, or `out` is taken or cannot be written.
    """
    out = Path(out)
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise ValueError(f"{out}: exists already and is not an empty directory; choose another")
    config = run.config()
    if not config.kind.releases:
        raise ValueError(f"{run.root}: this run is a baseline, without a coarse and a fine model")
    mechanism = mechanism_named(config.privacy.release)  # the ledger may name a custom one
    if isinstance(mechanism, ClassStatistics):
        raise ValueError(f"{run.root}: class Gaussians cannot be exported as a pipeline")
    check_finished(run, config)
    privacy, shared = run.read_json("privacy.json"), shared_weights(run)
    folder = Path(store or run.client_path(client_id))
    client_store = ClientStore(folder, store_label(config, client_id))
    own, ledger = _client(run, client_store, privacy, client_id=client_id)
    shape = ledger["image_shape"]
    t0, shift = int(privacy["t0"]), float(privacy["shift"])
    num_classes = len(shared.get("class_embedding.weight", ())) - 1  # the last is "no label"
    spec = ImageSpec(channels=shape[0], resolution=shape[1], num_classes=num_classes, shift=shift)
    setup, who = set_up_for(config, spec), f" for client {client_id}"
    schedule = setup.schedule
    pair = load_pair(setup, coarse=shared, fine=own, device=torch.device("cpu"), who=who)
    coarse, fine = pair.coarse, pair.fine
    assert coarse is not None
    assert fine is not None
    unets: tuple[Any, Any] = coarse.network, fine.network
    scheduler = make_scheduler(config.sampling.scheduler, schedule.betas)
    # In float64, as trained: schedulers round them to float32, the pipeline's x0_hat does not.
    scheduler.register_to_config(trained_betas=schedule.betas.tolist())
    pipeline = PFDMPipeline(
        *unets,
        scheduler,
        t0=t0,
        chain=find_objective(config).chain,
        coarse_prediction=coarse.spec.prediction,
        fine_prediction=fine.spec.prediction,
        num_classes=num_classes,
        resolution=spec.resolution,
        coarse_patch=coarse.spec.preset.patch,
        fine_patch=fine.spec.preset.patch,
        shift=shift,
        guidance_scale=config.sampling.guidance,
        coarse_share=_share(config, client_store, num_classes, counts_epsilon),
        fine_t_max=schedule.num_steps if config.fine.t_range == "all" else t0,
        id2label=_class_names(config, num_classes=num_classes),
    )
    card = model_card(
        pipeline, name=config.name, run=privacy, client=ledger, counts_epsilon=counts_epsilon
    )
    statement = {key: value for key, value in privacy.items() if key not in _KEPT_HERE}
    _write(pipeline, statement, card, out)
    return out


def load_pipeline(path: Path) -> PFDMPipeline:
    """An exported directory as a pipeline on the CPU; code in the directory is not executed.

    `ValueError`, in one line, if it is no such directory or a file in it is damaged.
    """
    if not (Path(path) / "model_index.json").is_file():
        raise ValueError(f"{path}: is not an exported pipeline (model_index.json is missing)")
    shows_bars = diffusers_logging.is_progress_bar_enabled()
    diffusers_logging.disable_progress_bar()
    try:
        return PFDMPipeline.from_pretrained(
            str(path), local_files_only=True, low_cpu_mem_usage=False
        )
    except (OSError, ValueError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        line = " ".join(str(error).split())[:300]
        raise ValueError(f"{path}: cannot be loaded: {line}") from None
    finally:
        if shows_bars:
            diffusers_logging.enable_progress_bar()


def sample_grid(
    path: Path,
    *,
    labels: Sequence[int] | None,
    num: int,
    out: Path,
    seed: int = 0,
    num_steps: int = 25,
    guidance: float | None = None,
    scheduler: str | None = None,
    method: str = "pfdm",
    device: str = "auto",
) -> Path:
    """Draw samples of an export as one PNG, about square, with rows of their own for each class.

    Args:
        path: the exported directory.
        labels: classes to draw; None for all.
        num: images in all, shared evenly between the classes, at least one each.
        out: file name that ends in .png; an old file is replaced. It is returned.
        seed: the same seed gives the same picture, up to a device's rounding.
        num_steps, guidance, method: as `PFDMPipeline`'s call.
        scheduler: as `fedpdm.diffusion.sampling.make_scheduler`; default the export's.
        device: "auto", "cpu", "cuda", ...

    Raises:
        ValueError: if an argument is out of range; the line names it and its bound.
    """
    target = png_path(out)
    generator = torch_generator(seed, Purpose.SAMPLING)
    pipeline = load_pipeline(path)
    classes = list(range(pipeline.config["num_classes"])) if labels is None else list(labels)
    if not classes or num < len(classes):
        raise ValueError(f"num must be at least 1 for each of {len(classes)} labels, got {num}")
    if scheduler is not None:
        pipeline.scheduler = make_scheduler(scheduler, pipeline.betas)
    pipeline.to(select_device(device))
    counts = [num // len(classes) + (k < num % len(classes)) for k in range(len(classes))]
    wanted = np.repeat(classes, counts)
    options: Any = {"num_inference_steps": num_steps, "guidance_scale": guidance, "method": method}
    images = []
    for start in range(0, num, BATCH_SIZE):
        part = wanted[start : start + BATCH_SIZE].tolist()
        title = f"images {start + 1} to {start + len(part)} of {num}"
        pipeline.set_progress_bar_config(desc=title, leave=False, disable=None)
        drawn: Any = pipeline(part, generator=generator, output_type="pt", **options).images
        images.append((drawn * 255.0).round().to(torch.uint8).numpy())
    names = {-1: "no label"} | {int(k): v for k, v in (pipeline.config["id2label"] or {}).items()}
    _draw(np.concatenate(images), [names.get(k, str(k)) for k in classes], counts, target)
    return target


def _client(
    run: RunDirectory, store: ClientStore, privacy: Mapping[str, Any], *, client_id: int
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """EMA weights of the client's last round, and its statement, from its ledger where that lies
    in the store (else as it was written beside the ledger's releases); `ValueError` if there are
    none, or not of this run."""
    folder = store.root
    weights, released = client_weights(store), store.load_statement()
    known_releases = [asdict(r.parameters) for r in ReleaseStore(folder).ledger().releases()]
    if known_releases:
        released = client_statement(ReleaseStore(folder), delta=float(privacy["delta"]))
    if not weights or released is None:
        folders = (run.root / "clients").glob("[0-9]*")
        known = sorted(int(p.name) for p in folders if ClientStore(p).last_round() > 0)
        raise ValueError(
            f"{folder}: client {client_id} has no fine model there; clients that have one: "
            f"{', '.join(map(str, known)) or 'none'}"
        )
    wanted = {key: privacy[key] for key in ("t0", "clip_norm", "shift")}
    if not any(wanted.items() <= r.items() for r in known_releases or [released["latest_release"]]):
        other = released["latest_release"]
        key = next((key for key in wanted if other[key] != wanted[key]), "t0")
        raise StoreError(
            f"{folder}: client {client_id} released with {key} = {other[key]:g}, this run has "
            f"{wanted[key]:g}; the store belongs to another run"
        )
    return weights, released


def _share(
    config: RunConfig, store: ClientStore, num_classes: int, epsilon: float | None
) -> list[float] | None:
    """`coarse_share` of the client, by class and for no label; with `epsilon` of noised counts."""
    if config.sampling.coarse_worth is None:
        if epsilon is not None:
            raise ValueError(
                "counts_epsilon: sampling.coarse_worth is not set, so the export holds no counts"
            )
        return None
    counts = store.load_class_counts()
    if counts is None or len(counts) != num_classes:
        raise StoreError(
            f"{store.root / 'classes.json'}: sampling.coarse_worth needs {num_classes} counts of "
            f"images, found {'no file' if counts is None else len(counts)}"
        )
    if epsilon is not None:
        drawn = functools.partial(noised_counts, counts.tolist(), epsilon=epsilon)
        with store.lock():
            counts = store.noised_class_counts(counts, epsilon, drawn)
    labels = np.repeat(np.arange(num_classes), counts)
    share = coarse_share(config, labels, num_classes=num_classes)
    return None if share is None else share.tolist()


def _class_names(config: RunConfig, *, num_classes: int) -> dict[str, str] | None:
    """Names of the configured data set's classes by label, if it can be read here."""
    data = replace(config.data, max_images=num_classes, download=False)
    try:
        names = load_split(replace(config, data=data), "train").class_names
    except (ValueError, OSError):
        return None
    return {str(k): v for k, v in enumerate(names)} if len(names) == num_classes else None


def _write(pipeline: PFDMPipeline, privacy: Mapping[str, Any], card: str, out: Path) -> None:
    """Write the directory under a temporary name beside `out`, then rename it."""
    target = out.absolute()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    clear_leftovers(target.parent, of=target.name)
    try:
        temporary.mkdir(parents=True)
        pipeline.save_pretrained(temporary, safe_serialization=True)
        source = inspect.getsource(sys.modules[PFDMPipeline.__module__])
        (temporary / "pipeline.py").write_text(source, encoding="utf-8")
        (temporary / "privacy.json").write_text(json_text(privacy) + "\n")
        (temporary / "README.md").write_text(card, encoding="utf-8")
        os.replace(temporary, target)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StoreError(f"{out}: cannot be written: {reason}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _draw(images: np.ndarray, names: Sequence[str], counts: Sequence[int], target: Path) -> None:
    """Each class's images, uint8 (n, C, H, W), in as many rows as make the picture square."""
    widest = math.ceil(math.sqrt(len(images)))
    width = math.ceil(counts[0] / math.ceil(counts[0] / widest))
    rows, row_labels = [], []
    for own, name in zip(np.split(images, np.cumsum(counts)[:-1]), names, strict=True):
        cut = [own[at : at + width] for at in range(0, len(own), width)]
        rows += cut
        row_labels += [name, *[""] * (len(cut) - 1)]
    draw_image_grid(target, rows, row_labels=row_labels)
