"""Finished models as a diffusers pipeline on disk, and pictures drawn with one.

An exported directory needs diffusers and torch alone: U-Nets and scheduler as diffusers saves them,
`pipeline.py` and `pfdm_sampling.py` (copies of the modules in `fedpdm.publishing`), `privacy.json`
(the run's statement) and a model card with the client's ledger. It can be uploaded to the Hugging
Face Hub as it is.
"""

from __future__ import annotations

import inspect
import math
import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
from diffusers.utils import logging as diffusers_logging

from fedpdm.diffusion.sampling import make_scheduler
from fedpdm.diffusion.training import select_device
from fedpdm.publishing.building import client_pipeline
from fedpdm.publishing.class_gaussians import GaussianClasses
from fedpdm.publishing.pfdm_sampling import TwoStageSampling
from fedpdm.publishing.pipeline import PFDMPipeline
from fedpdm.publishing.source import Source
from fedpdm.reporting.pictures import draw_image_grid
from fedpdm.reporting.pictures.files import png_path
from fedpdm.rng import Purpose, torch_generator
from fedpdm.storage.files import StoreError, clear_leftovers, read_json
from fedpdm.storage.node_run import open_run
from fedpdm.storage.run_directory import RunDirectory
from fedpdm.text import json_text

__all__ = ["export_pipeline", "load_pipeline", "open_source", "prepare", "sample_grid"]

COMPONENT = GaussianClasses.__module__  # as `model_index.json` names it
SAMPLING = "pfdm_sampling.py"  # as `pipeline.py` imports it


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
        run: read are `config.yaml`, `coarse.safetensors` and the statement. A node's own
            (`fedpdm.storage.node_run`) does as well.
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
    made = client_pipeline(run, client_id=client_id, store=store, counts_epsilon=counts_epsilon)
    _write(made.pipeline, made.statement, made.card, out)
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
        options: dict[str, Any] = {"local_files_only": True, "low_cpu_mem_usage": False}
        if (Path(path) / "gaussians").is_dir():
            options["gaussians"] = GaussianClasses.from_pretrained(
                str(Path(path) / "gaussians"), **options
            )
        return PFDMPipeline.from_pretrained(str(path), **options)
    except (OSError, ValueError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        line = " ".join(str(error).split())[:300]
        raise ValueError(f"{path}: cannot be loaded: {line}") from None
    finally:
        if shows_bars:
            diffusers_logging.enable_progress_bar()


def open_source(path: Path, *, client: int | None = None) -> Source:
    """What to draw samples from: an exported directory, a run directory or a node's store.

    Args:
        path: the folder.
        client: whose models of a run; default a node's own, else 0. An export has one client's.

    Raises:
        ValueError: one line, if the folder is none of them, or has no such client's models.
    """
    path = Path(path)
    if not (path / "model_index.json").is_file():
        run = open_run(path)
        if not (run.root / "config.yaml").is_file():
            raise ValueError(
                f"{path}: is not an exported pipeline (model_index.json is missing), no run "
                "directory and no node's store"
            )
        chosen = run.first_client() if client is None else client
        made = client_pipeline(run, client_id=chosen)
        what = f"client {chosen} of {run.config().name}"
        return Source(pipeline=made.pipeline, what=what, statement=made.statement)
    if client is not None:
        raise ValueError(f"client: {path} is an export, of one client, got {client}")
    pipeline, beside = load_pipeline(path), path / "privacy.json"
    statement = read_json(beside) if beside.is_file() else {}
    return Source(pipeline=pipeline, what=f"the export {path.absolute().name}", statement=statement)


def sample_grid(
    path: Path,
    *,
    labels: Sequence[int | str] | None,
    num: int,
    out: Path,
    client: int | None = None,
    seed: int = 0,
    num_steps: int = 25,
    guidance: float | None = None,
    scheduler: str | None = None,
    method: str = "pfdm",
    device: str = "auto",
) -> Path:
    """Draw samples as one PNG, about square, with rows of their own for each class.

    Args:
        path, client: as of `open_source`.
        labels: classes to draw, by number or name; None for all.
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
    source = open_source(path, client=client)
    classes = source.labels(labels)
    if num < len(classes):
        raise ValueError(f"num must be at least 1 for each of {len(classes)} labels, got {num}")
    prepare(source, scheduler=scheduler, device=device)
    counts = [num // len(classes) + (k < num % len(classes)) for k in range(len(classes))]
    wanted = np.repeat(classes, counts)
    options: Any = {"num_steps": num_steps, "guidance": guidance, "method": method}
    images = []
    for start in range(0, num, source.batch_size()):
        part = wanted[start : start + source.batch_size()].tolist()
        title = f"images {start + 1} to {start + len(part)} of {num}"
        images.append(source.draw(part, generator=generator, title=title, **options))
    _draw(np.concatenate(images), [source.class_name(k) for k in classes], counts, target)
    return target


def prepare(source: Source, *, scheduler: str | None, device: str) -> None:
    """Move the pipeline to a device, and give it another scheduler; `ValueError` for none such."""
    if scheduler is not None:
        source.pipeline.scheduler = make_scheduler(scheduler, source.pipeline.betas)
    source.pipeline.to(select_device(device))


def _write(pipeline: PFDMPipeline, privacy: Mapping[str, Any], card: str, out: Path) -> None:
    """Write the directory under a temporary name beside `out`, then rename it."""
    target = out.absolute()
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    clear_leftovers(target.parent, of=target.name)
    try:
        temporary.mkdir(parents=True)
        pipeline.save_pretrained(temporary, safe_serialization=True)
        _copy_source(PFDMPipeline, temporary / "pipeline.py")
        _copy_source(TwoStageSampling, temporary / SAMPLING)
        if pipeline.gaussians is not None:  # diffusers finds a component's code by its module
            _copy_source(GaussianClasses, temporary / "gaussians" / f"{COMPONENT}.py")
        (temporary / "privacy.json").write_text(json_text(privacy) + "\n")
        (temporary / "README.md").write_text(card, encoding="utf-8")
        os.replace(temporary, target)
    except (OSError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise StoreError(f"{out}: cannot be written: {reason}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _copy_source(kind: type, path: Path) -> None:
    path.write_text(inspect.getsource(sys.modules[kind.__module__]), encoding="utf-8")


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
