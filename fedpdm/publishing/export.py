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
from fedpdm.diffusion.gaussian import ClassGaussians, GaussianDenoiser
from fedpdm.diffusion.sampling import make_scheduler
from fedpdm.diffusion.training import select_device
from fedpdm.privacy.mechanism import mechanism_named
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.privacy.statement import client_statement
from fedpdm.publishing.class_counts import exported_share
from fedpdm.publishing.class_gaussians import GaussianClasses
from fedpdm.publishing.labels import label_of
from fedpdm.publishing.model_card import model_card
from fedpdm.publishing.pfdm_sampling import TwoStageSampling
from fedpdm.publishing.pipeline import PFDMPipeline
from fedpdm.reporting.pictures import draw_image_grid
from fedpdm.reporting.pictures.files import png_path
from fedpdm.rng import Purpose, torch_generator
from fedpdm.setup.choice import load_choice
from fedpdm.setup.pair import check_finished, client_weights, load_pair, shared_weights
from fedpdm.setup.run_setup import RunSetup, set_up_for
from fedpdm.storage.client_store import ClientStore, store_label
from fedpdm.storage.files import StoreError, clear_leftovers
from fedpdm.storage.run_directory import RunDirectory
from fedpdm.text import json_text

__all__ = ["export_pipeline", "load_pipeline", "sample_grid"]

BATCH_SIZE = 256
COMPONENT = GaussianClasses.__module__  # as `model_index.json` names it
SAMPLING = "pfdm_sampling.py"  # as `pipeline.py` imports it
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
    mechanism_named(config.privacy.release)  # the ledger may name a custom one
    check_finished(run, config)
    privacy, shared = run.read_json("privacy.json"), shared_weights(run)
    folder = Path(store or run.client_path(client_id))
    client_store = ClientStore(folder, store_label(config, client_id))
    own, ledger = _client(run, client_store, privacy, client_id=client_id)
    shape, shift = ledger["image_shape"], float(privacy["shift"])
    num_classes = _num_classes(own)
    spec = ImageSpec(channels=shape[0], resolution=shape[1], num_classes=num_classes, shift=shift)
    setup, who = set_up_for(config, spec), f"client {client_id}"
    _check_release(setup, privacy, ledger.pop("known_releases"), where=f"{folder}: {who}")
    schedule = setup.schedule
    pair = load_pair(
        setup,
        coarse=shared,
        fine=own,
        device=torch.device("cpu"),
        choice=load_choice(client_store, round=client_store.last_round()),
        who=f" for {who}",
    )
    settings, fine = pair.settings, pair.fine
    assert fine is not None
    scheduler = make_scheduler(config.sampling.scheduler, schedule.betas)
    # In float64, as trained: schedulers round them to float32, the pipeline's x0_hat does not.
    scheduler.register_to_config(trained_betas=schedule.betas.tolist())
    fine_unet: Any = fine.network
    pipeline = PFDMPipeline(
        fine_unet=fine_unet,
        scheduler=scheduler,
        t0=settings.t0,
        chain=settings.chain,
        fine_prediction=fine.spec.prediction,
        num_classes=num_classes,
        resolution=spec.resolution,
        fine_patch=fine.spec.preset.patch,
        shift=shift,
        guidance_scale=settings.guidance,
        coarse_share=exported_share(
            config, client_store, num_classes=num_classes, epsilon=counts_epsilon
        ),
        fine_t_max=schedule.num_steps if config.fine.t_range == "all" else setup.handover,
        id2label=_class_names(config, num_classes=num_classes),
        fine_labels=settings.fine_labels,
        candidates=settings.candidates,
        own_classes=list(settings.own_classes) or None,
        **_shared_part(pair.coarse),
    )
    card = model_card(
        pipeline, name=config.name, run=privacy, client=ledger, counts_epsilon=counts_epsilon
    )
    statement = {key: value for key, value in privacy.items() if key not in _KEPT_HERE}
    _write(pipeline, statement, card, out)
    return out


def _num_classes(fine: Mapping[str, torch.Tensor]) -> int:
    """Of the fine model's weights: it embeds every class and no label, for whole images and for
    clipped ones."""
    return len(fine.get("class_embedding.weight", ())) // 2 - 1


def gaussian_component(gaussians: ClassGaussians) -> GaussianClasses:
    """The Gaussians as a component of a pipeline."""
    tensors = gaussians.tensors()
    classes, tensors["frames"] = tensors.pop("classes").tolist(), tensors.pop("directions")
    count, dimensions = tensors["frames"].shape[1:]
    made = GaussianClasses(dimensions=dimensions, directions=count, classes=classes)
    made.load_state_dict(tensors)
    return made.eval()


def _shared_part(coarse: Any) -> dict[str, Any]:
    """What the pipeline takes of the shared model: its U-Net, or its Gaussians."""
    if isinstance(coarse, GaussianDenoiser):
        return {"coarse_unet": None, "gaussians": gaussian_component(coarse.gaussians)}
    return {
        "coarse_unet": coarse.network,
        "coarse_prediction": coarse.spec.prediction,
        "coarse_patch": coarse.spec.preset.patch,
    }


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


def sample_grid(
    path: Path,
    *,
    labels: Sequence[int | str] | None,
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
        labels: classes to draw, by number or by name; None for all.
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
    names = {int(k): v for k, v in (pipeline.config["id2label"] or {}).items()}
    known = range(pipeline.config["num_classes"])
    classes = list(known) if labels is None else [label_of(each, names, known) for each in labels]
    if not classes or num < len(classes):
        raise ValueError(f"num must be at least 1 for each of {len(classes)} labels, got {num}")
    if scheduler is not None:
        pipeline.scheduler = make_scheduler(scheduler, pipeline.betas)
    pipeline.to(select_device(device))
    counts = [num // len(classes) + (k < num % len(classes)) for k in range(len(classes))]
    wanted = np.repeat(classes, counts)
    options: Any = {"num_inference_steps": num_steps, "guidance_scale": guidance, "method": method}
    images = []
    size = max(1, BATCH_SIZE // pipeline.config["candidates"])
    for start in range(0, num, size):
        part = wanted[start : start + size].tolist()
        title = f"images {start + 1} to {start + len(part)} of {num}"
        pipeline.set_progress_bar_config(desc=title, leave=False, disable=None)
        drawn: Any = pipeline(part, generator=generator, output_type="pt", **options).images
        images.append((drawn * 255.0).round().to(torch.uint8).numpy())
    names[-1] = "no label"
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
    return weights, {**released, "known_releases": known_releases or [released["latest_release"]]}


def _check_release(setup: RunSetup, privacy: Mapping[str, Any], known: Any, *, where: str) -> None:
    """`StoreError` unless one of the client's releases was made as the run's."""
    planned = [asdict(parameters) for parameters in setup.release_plan.rounds]
    if "t0" in privacy:
        planned = [{**each, "t0": int(privacy["t0"])} for each in planned]
    names = ("t0", "stage", "clip_norm", "shift", "dimensions")

    def differs(record: Mapping[str, Any], plan: Mapping[str, Any]) -> list[str]:
        return [name for name in names if name in plan and record.get(name) != plan[name]]

    if all(differs(record, plan) for record in known for plan in planned):
        record = known[-1]
        plan = min(planned, key=lambda each: len(differs(record, each)))
        name = differs(record, plan)[0]
        raise StoreError(
            f"{where} released with {name} = {record.get(name)}, this run has {plan[name]}; the "
            "store belongs to another run"
        )


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
