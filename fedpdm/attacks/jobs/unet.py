"""Any diffusers `UNet2DModel` directory as a target, and folders or .npz files of images for it."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from diffusers import DDPMScheduler, UNet2DModel
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from fedpdm.attacks.jobs.models import ModelTarget
from fedpdm.attacks.jobs.subjects import Subjects, matched_pairs
from fedpdm.attacks.membership import AttackTarget
from fedpdm.diffusion.denoisers import NO_LABEL
from fedpdm.diffusion.schedule import NoiseSchedule
from fedpdm.storage.files import StoreError, read_json

__all__ = ["UNetDenoiser", "file_digest", "open_unet", "read_images", "unet_subjects"]

PREDICTIONS = ("epsilon", "sample", "v_prediction")
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


class UNetDenoiser(torch.nn.Module):
    """A `UNet2DModel` with its prediction type as a `DenoisingFunction`; t counts from 1.

    Labels are passed on where the model has a label table; `null_label` is its index for "no
    label". Of a model that predicts variances too, the first channels are the prediction.
    """

    def __init__(
        self,
        network: Any,
        schedule: NoiseSchedule,
        *,
        prediction: str,
        null_label: int | None = None,
    ) -> None:
        super().__init__()
        if prediction not in PREDICTIONS:
            raise ValueError(f"--prediction: must be of {', '.join(PREDICTIONS)}, got {prediction}")
        self.network: Any = network
        self.schedule, self.prediction, self.null_label = schedule, prediction, null_label
        self.takes_labels = getattr(network, "class_embedding", None) is not None

    def forward(
        self,
        x_t: torch.Tensor,
        t: torch.Tensor,
        *,
        labels: torch.Tensor,
        clipped: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x0_hat of x_t's shape (B, C, H, W); t int (B,) in [1, T]; labels int (B,)."""
        extra: dict[str, Any] = {}
        if self.takes_labels:
            if bool((labels == NO_LABEL).any()):
                if self.null_label is None:
                    raise ValueError(
                        "--null-label: the model takes labels, give its no-label index"
                    )
                labels = torch.where(labels == NO_LABEL, self.null_label, labels)
            extra["class_labels"] = labels
        raw = self.network(x_t, t - 1, **extra).sample[:, : x_t.shape[1]]
        if self.prediction == "sample":
            return raw
        abar = self.schedule.gather(t, x_t)
        signal, noise = abar.sqrt().to(x_t.dtype), (1.0 - abar).sqrt().to(x_t.dtype)
        if self.prediction == "epsilon":
            return (x_t - noise * raw) / signal
        return signal * x_t - noise * raw


def open_unet(
    path: Path,
    *,
    prediction: str | None = None,
    betas: tuple[float, float] | None = None,
    num_steps: int | None = None,
    null_label: int | None = None,
    device: torch.device | str = "cpu",
) -> ModelTarget:
    """The model in a directory (or its `unet` folder) as a target; images in [-1, 1].

    Its scheduler is looked for in the directory and in `scheduler` in and beside it. What is given
    here replaces what it says; without one `prediction` and `betas` (first and last, linear) must
    be given.

    Raises:
        ValueError: one line, if it cannot be loaded or what it needs is not given.
    """
    folder = path / "unet" if (path / "unet" / "config.json").is_file() else path
    if not (folder / "config.json").is_file():
        raise ValueError(f"--unet: {path} is no diffusers model directory (config.json is missing)")
    try:
        loaded: Any = UNet2DModel.from_pretrained(
            str(folder), local_files_only=True, low_cpu_mem_usage=False
        )
    except (
        OSError, ValueError, TypeError, RuntimeError, KeyError, safetensors.SafetensorError,
    ) as error:  # fmt: skip
        line = " ".join(str(error).split())[:200]
        raise ValueError(f"--unet: {folder} cannot be loaded: {line}") from None
    known = _scheduler(folder)
    prediction = prediction or known.get("prediction_type")
    if prediction is None:
        raise ValueError(
            f"--prediction: {path} has no scheduler_config.json, so it must be given "
            f"({', '.join(PREDICTIONS)})"
        )
    if betas is not None:
        values = np.linspace(*betas, num_steps or 1000, dtype=np.float64)
    elif known:
        values = DDPMScheduler.from_config(known).betas.double().numpy()
    else:
        raise ValueError(f"--betas: {path} has no scheduler_config.json, so they must be given")
    if not bool(((values > 0) & (values < 1)).all()):
        raise ValueError(f"--betas: must be in (0, 1), got {values.min():g} to {values.max():g}")
    alphas_cumprod = np.concatenate([[1.0], np.cumprod(1.0 - values)])
    schedule = NoiseSchedule(kind="given", betas=values, alphas_cumprod=alphas_cumprod)
    denoiser = UNetDenoiser(loaded, schedule, prediction=prediction, null_label=null_label)
    denoiser = denoiser.to(device).eval()
    target = AttackTarget(
        denoiser=denoiser,
        schedule=schedule,
        t_range=(1, schedule.num_steps),
        parameters=tuple(denoiser.network.parameters()),
        labels_known=denoiser.takes_labels,
        device=device,
    )
    return ModelTarget(name="unet", target=target, shift=0.0)


def file_digest(path: Path) -> str:
    """SHA-256 over the files below a model's directory, with their names."""
    sha = hashlib.sha256()
    for file in sorted(path.rglob("*")):
        if file.is_file():
            with open(file, "rb") as handle:
                digest = hashlib.file_digest(handle, "sha256").digest()
            sha.update(file.relative_to(path).as_posix().encode() + digest)
    return sha.hexdigest()


def _scheduler(folder: Path) -> dict[str, Any]:
    """The scheduler's config, {} where there is none."""
    for place in (folder, folder / "scheduler", folder.parent / "scheduler"):
        path = place / "scheduler_config.json"
        if path.is_file():
            try:
                return read_json(path)
            except StoreError:
                raise ValueError(f"{path}: is not a scheduler's configuration") from None
    return {}


def read_images(
    path: Path, *, option: str, channels: int
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(images uint8 (N, C, H, W), labels int64 (N,)) of a folder or a .npz file.

    A .npz holds `images` and may hold `labels`, else they are 0. In a folder, images lie at any
    depth, in the order of their names; the label is the number of the file's own folder among the
    sorted folders. Grey becomes colour, or colour grey, as `channels` asks.

    Raises:
        ValueError: one line naming `option`.
    """
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix.lower() in _SUFFIXES)
        if not files:
            raise ValueError(f"{option}: {path} has no images ({', '.join(_SUFFIXES)})")
        folders = sorted({file.parent for file in files})
        arrays = []
        for file in files:
            try:
                with Image.open(file) as picture:
                    mode = "RGB" if channels == 3 else "L"
                    arrays.append(np.asarray(picture.convert(mode)))
            except (OSError, UnidentifiedImageError) as error:
                raise ValueError(f"{option}: {file} cannot be read: {error}") from None
        if len(shapes := {array.shape for array in arrays}) > 1:
            raise ValueError(f"{option}: images must be of one size, got {sorted(shapes)[:2]}")
        labels = np.array([folders.index(file.parent) for file in files], dtype=np.int64)
        images = np.stack(arrays)
    else:
        try:
            with np.load(path, allow_pickle=False) as archive:
                images = archive["images"]
                given = archive["labels"] if "labels" in archive else np.zeros(len(images))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(
                f"{option}: {path} must be a folder of images, or a .npz file with an array "
                f"images: {error}"
            ) from None
        labels = np.asarray(given).astype(np.int64)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim == 4 and images.shape[1] not in (1, 3) and images.shape[-1] in (1, 3):
        images = images.transpose(0, 3, 1, 2)
    if images.dtype != np.uint8 or images.ndim != 4 or len(images) == 0:
        raise ValueError(
            f"{option}: images must be uint8 (N, H, W), (N, H, W, C) or (N, C, H, W), "
            f"got {images.dtype} {images.shape}"
        )
    if labels.shape != (len(images),):
        raise ValueError(f"{option}: labels must be ({len(images)},), got {labels.shape}")
    if images.shape[1] == 1 and channels == 3:
        images = images.repeat(3, axis=1)
    return np.ascontiguousarray(images), labels


def unet_subjects(
    model: ModelTarget, members: Path, non_members: Path, *, most: int, rng: np.random.Generator
) -> Subjects:
    """Members and non-members from two places, matched per class where the model takes labels.

    `ValueError`, one line, for images of another shape than the model's, or if none match.
    """
    denoiser = model.target.denoiser
    assert isinstance(denoiser, UNetDenoiser)
    config: Mapping[str, Any] = denoiser.network.config
    channels, size = int(config["in_channels"]), config["sample_size"]
    found = []
    for path, option in ((members, "--members"), (non_members, "--non-members")):
        images, labels = read_images(path, option=option, channels=channels)
        height, width = (size, size) if isinstance(size, int) else (size or images.shape[2:])
        if images.shape[1:] != (channels, height, width):
            raise ValueError(
                f"{option}: images must be of the model's shape {(channels, height, width)}, "
                f"got {images.shape[1:]}"
            )
        table = getattr(denoiser.network.class_embedding, "num_embeddings", None)
        if table is not None and not 0 <= labels.min() <= labels.max() < table:
            raise ValueError(f"{option}: labels must be in [0, {table - 1}], got {labels.max()}")
        found.append((images, labels))
    (a, a_labels), (b, b_labels) = found
    seen = {image.tobytes() for image in a}
    if overlap := sum(image.tobytes() in seen for image in b):
        raise ValueError(f"--non-members: {overlap} images are members too")
    cells = (a_labels, b_labels) if denoiser.takes_labels else (0 * a_labels, 0 * b_labels)
    rows, others = matched_pairs(*cells, most=most, rng=rng)
    if len(rows) == 0:
        raise ValueError("--non-members: no non-members of the members' classes")
    return Subjects(
        members=a[rows],
        member_labels=a_labels[rows],
        non_members=b[others],
        non_member_labels=b_labels[others],
        source="given",
    )
