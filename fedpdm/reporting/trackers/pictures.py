"""Pictures for trackers: samples after a round, and what the server drew at the end.

After a round the server has the shared model (its checkpoint); in simulation the clients' fine
models lie in their stores beside it. Labels and noise are the same for every round, so that what
changes between two pictures is what the models have learnt. Nothing is drawn from the run's own
random streams.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image

from fedpdm.config import RunConfig
from fedpdm.data.loading import load_split
from fedpdm.diffusion.weights import ema_weights
from fedpdm.evaluation.synthesis import open_synthesizer
from fedpdm.evaluation.trajectory import record_states
from fedpdm.reporting.pictures.tiles import tile_images
from fedpdm.setup.pair import shared_pair
from fedpdm.storage.run_directory import RunDirectory

__all__ = ["final_pictures", "round_pictures"]

MOST_CLASSES = 10
ROWS = 2
CLIENTS_SHOWN = 4


def round_pictures(run: RunDirectory, config: RunConfig, round: int) -> dict[str, np.ndarray]:
    """Samples of the models as `round` has left them, uint8 RGB (H, W, 3) by name.

    `coarse_samples` are the shared model's; in simulation `client_0_samples` and so on are those of
    the first clients that were trained, as they would draw them. A column for each class. Empty
    where the run's checkpoint is of another round.

    Raises:
        ValueError, OSError: a file cannot be read or is damaged.
    """
    kept = run.load_checkpoint()
    if kept is None or kept[0] != round:
        return {}
    weights = ema_weights(kept[1])
    found: dict[str, np.ndarray] = {}
    if config.kind.has_shared_model and not weights:
        return {}  # class statistics whose sums are not in yet
    if config.kind.has_shared_model:
        found["coarse_samples"] = _shared(config, weights)
    if not (config.run.simulation and config.kind.has_fine_model):
        return found
    images = load_split(config, "train")
    labels = _labels(images.num_classes)
    for client in range(min(CLIENTS_SHOWN, config.partition.num_clients)):
        try:
            one = open_synthesizer(run, client, images=images, coarse=weights)
        except ValueError:
            continue  # it was never chosen for training, or has failed
        pixels = one.sample(labels, seed=config.run.seed)
        found[f"client_{client}_samples"] = _tiled(pixels)
    return found


def final_pictures(
    config: RunConfig, run: RunDirectory, weights: Mapping[str, torch.Tensor]
) -> dict[str, np.ndarray]:
    """Pictures of the finished run, as in `round_pictures`; `weights` are the shared model's.

    In simulation the server has drawn the clients' samples, with each method; elsewhere it has the
    shared model alone.
    """
    if not config.run.simulation:
        return {"coarse_samples": _shared(config, weights)}
    path = run.root / "samples.png"
    if not path.exists():
        return {}
    with Image.open(path) as picture:
        return {"samples": np.asarray(picture.convert("RGB"))}


def _labels(num_classes: int) -> np.ndarray:
    """Row by row, a column for each of the first classes."""
    return np.tile(np.arange(min(num_classes, MOST_CLASSES), dtype=np.int64), ROWS)


def _shared(config: RunConfig, weights: Mapping[str, torch.Tensor]) -> np.ndarray:
    pair = shared_pair(config, weights)
    states = record_states(pair, _labels(pair.spec.num_classes), seed=config.run.seed)
    return _tiled(states[-1].noisy)


def _tiled(images: np.ndarray) -> np.ndarray:
    return tile_images(images, columns=len(images) // ROWS)
