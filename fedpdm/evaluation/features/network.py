"""A small convolutional classifier and its training, for feature extractors and for judging.

About 200,000 parameters and, whatever the resolution, at most 7 MMAC an image: the first
convolution brings every image to at most 16x16. Training takes a given number of steps, so its
time is bounded whatever the number of images.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from fedpdm.data.augment import random_affine
from fedpdm.evaluation.features.extractor import check_images
from fedpdm.jobs.progress import sum_progress

__all__ = ["FEATURES", "FitReport", "Progress", "SmallClassifier", "fit_classifier", "predict"]

FEATURES: Final = 64
BATCH_SIZE: Final = 64
REDRAWN: Final = 64  # batches whose images are drawn at once
_EVAL_BATCH: Final = 256

Progress = Callable[[int, int, float], None]
"""(steps done, steps in all, current loss) -> None."""


class SmallClassifier(nn.Module):
    """Convolutions with batch norm, mean over positions, 64 features, linear classifier.

    Each feature is normalised over training batches before its rectifier, without learned scale:
    of training images it has mean 0 and variance 1, so that distances have a fixed unit.

    Attributes:
        channels: 1 or 3.
        resolution: side of the images, 4 to 128.
        num_classes: K >= 1.
    """

    def __init__(self, *, channels: int, resolution: int, num_classes: int) -> None:
        super().__init__()
        if not 4 <= resolution <= 128:
            raise ValueError(f"image side must be in [4, 128], got {resolution}")
        self.channels, self.resolution, self.num_classes = channels, resolution, num_classes
        stride = -(-resolution // 16)
        self.convolutions = nn.Sequential(
            *_block(channels, 32, kernel=2 * stride + 1, stride=stride),
            *_block(32, 64, kernel=3, stride=2),
            *_block(64, 96, kernel=3, stride=2),
            *_block(96, 128, kernel=3, stride=1),
        )
        self.to_features = nn.Sequential(
            nn.Linear(128, FEATURES, bias=False), nn.BatchNorm1d(FEATURES, affine=False)
        )
        self.to_classes = nn.Linear(FEATURES, num_classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """(B, 64) of float images (B, C, H, W), 0..255."""
        maps = self.convolutions(x / 127.5 - 1.0)
        values: torch.Tensor = self.to_features(maps.mean(dim=(2, 3)))
        return values

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, K) logits of float images (B, C, H, W), 0..255."""
        logits: torch.Tensor = self.to_classes(torch.relu(self.features(x)))
        return logits


def _block(before: int, after: int, *, kernel: int, stride: int) -> list[nn.Module]:
    padding = kernel // 2
    return [
        nn.Conv2d(before, after, kernel, stride=stride, padding=padding, bias=False),
        nn.BatchNorm2d(after),
        nn.ReLU(),
    ]


@dataclass(frozen=True, kw_only=True)
class FitReport:
    """Loss over the last tenth of the steps, and how many steps of how many images."""

    loss: float
    num_steps: int
    batch_size: int


def fit_classifier(
    images: NDArray[np.uint8],
    labels: NDArray[np.int64],
    *,
    num_classes: int,
    num_steps: int,
    seed: np.random.SeedSequence,
    device: torch.device | str = "cpu",
    lr: float = 3e-3,
    chances: NDArray[np.float64] | None = None,
    affine: bool = False,
    progress: Progress | None = None,
    what: str = "classifier",
) -> tuple[SmallClassifier, FitReport]:
    """Train a `SmallClassifier` with AdamW and one rise and fall of the learning rate.

    Batches of 64 (fewer where there are fewer images) run through the images in a new random order
    each time. Every image is shifted by up to an eighth of its side, its border repeated; there are
    no mirror images, which for digits are other things.

    Args:
        images: (N, C, H, H) uint8, N >= 2, H in [4, 128], C 1 or 3.
        labels: (N,) int64 in [0, num_classes).
        num_steps: >= 1.
        seed: of initial weights, order and shifts; the same seed gives the same network on the
            same machine and number of threads.
        chances: (N,) float, at least 0: images are drawn in proportion to these, with replacement,
            instead of each in turn.
        affine: images are turned, stretched and sheared too (`fedpdm.data.augment`).
        progress: called about every 20 steps.
        what: named in errors.

    Returns:
        The network in evaluation mode, and a report.

    Raises:
        ValueError: for arrays that are not what is said above.
        FloatingPointError: the loss became NaN or infinite; names the step.
    """
    _check_labelled(images, labels, num_classes=num_classes, what=what)
    if num_steps < 1:
        raise ValueError(f"{what}: num_steps must be at least 1, got {num_steps}")
    model_seed, data_seed = (int(word) for word in seed.generate_state(2, np.uint64))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(model_seed % 2**63)
        model = SmallClassifier(
            channels=images.shape[1], resolution=images.shape[2], num_classes=num_classes
        )
    model = model.to(device).to(memory_format=torch.channels_last)
    rng = np.random.default_rng(data_seed)
    batch_size = min(BATCH_SIZE, len(images))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=lr, total_steps=num_steps + 1, pct_start=0.2, cycle_momentum=False
    )
    model.train()
    moves = torch.Generator(device).manual_seed(data_seed % 2**63)
    order = np.empty(0, dtype=np.int64)
    share = None if chances is None else chances / chances.sum()
    losses: list[float] = []
    for step in range(1, num_steps + 1):
        if len(order) < batch_size:
            order = (
                rng.permutation(len(images))
                if share is None
                else rng.choice(len(images), size=REDRAWN * batch_size, p=share)
            )
        index, order = order[:batch_size], order[batch_size:]
        chosen = images[index] if affine else _shifted(images[index], rng)
        x = torch.from_numpy(chosen).to(device).float()
        y = torch.from_numpy(labels[index]).to(device)
        if affine:
            x = random_affine(x, generator=moves)
        x = x.contiguous(memory_format=torch.channels_last)
        loss = nn.functional.cross_entropy(model(x), y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
        if not np.isfinite(losses[-1]):
            raise FloatingPointError(f"{what}: loss is {losses[-1]} at step {step}")
        if progress is not None and (step % 20 == 0 or step == num_steps):
            progress(step, num_steps, losses[-1])
    model.eval()
    recent = losses[-max(1, num_steps // 10) :]
    return model, FitReport(loss=float(np.mean(recent)), num_steps=num_steps, batch_size=batch_size)


def _check_labelled(
    images: NDArray[np.uint8], labels: NDArray[np.int64], *, num_classes: int, what: str
) -> None:
    check_images(images)
    if images.shape[2] != images.shape[3]:
        raise ValueError(f"{what}: images must be square, got {images.shape[2:]}")
    if len(images) < 2:
        raise ValueError(f"{what}: needs at least 2 images, got {len(images)}")
    if labels.shape != (len(images),) or labels.dtype != np.int64:
        raise ValueError(
            f"{what}: labels must be int64 of shape ({len(images)},), "
            f"got {labels.dtype} of shape {labels.shape}"
        )
    if labels.min() < 0 or labels.max() >= num_classes:
        worst = labels.min() if labels.min() < 0 else labels.max()
        raise ValueError(f"{what}: labels must be in [0, {num_classes}), got {worst}")


def _shifted(images: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    """Each image (B, C, H, H) moved by its own whole number of pixels, its border repeated."""
    side = images.shape[2]
    reach = side // 8
    down, right = rng.integers(-reach, reach + 1, size=(2, len(images), 1))
    rows = np.clip(np.arange(side) + down, 0, side - 1)  # (B, H)
    columns = np.clip(np.arange(side) + right, 0, side - 1)
    example = np.arange(len(images))[:, None, None]
    moved = images.transpose(0, 2, 3, 1)[example, rows[:, :, None], columns[:, None, :]]
    return np.ascontiguousarray(moved.transpose(0, 3, 1, 2))


@torch.no_grad()
def predict(
    model: SmallClassifier, images: NDArray[np.uint8], *, features: bool = False
) -> NDArray[np.float32]:
    """Logits (N, K), or features (N, 64), of uint8 images (N, C, H, W).

    Raises:
        ValueError: if the images are not of the size that the network is for.
    """
    check_images(images)
    wanted = (model.channels, model.resolution, model.resolution)
    if images.shape[1:] != wanted:
        raise ValueError(f"images must have shape (N, C, H, W) with {wanted}, got {images.shape}")
    device = next(model.parameters()).device
    call = model.features if features else model
    answers = []
    show = sum_progress("features" if features else "classes", "image", len(images))
    for start in range(0, len(images), _EVAL_BATCH):
        x = torch.from_numpy(np.array(images[start : start + _EVAL_BATCH])).to(device)
        answers.append(call(x.float().contiguous(memory_format=torch.channels_last)).cpu().numpy())
        show(len(x))
    return np.concatenate(answers)
