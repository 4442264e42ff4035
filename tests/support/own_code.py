"""Custom code in its own module, as a user of fedpdm would write it."""

from __future__ import annotations

from pathlib import Path

__all__ = ["MODULE", "write_module"]

MODULE = "mine_for_tests"

SOURCE = '''
import numpy as np
import torch

from fedpdm.data import ArrayReader, DataSet, RawSplit
from fedpdm.diffusion.objectives import NOISE_TO_NOISE, CoarseObjective
from fedpdm.diffusion.presets import Preset, unet
from fedpdm.diffusion.weightings import Weighting
from strategies.coarse import CoarseStrategy


class PlainMean(CoarseStrategy):
    """The unweighted mean, with how far all rounds have moved as state of its own."""

    moved = torch.zeros(())

    def merge(self, round):
        length = torch.zeros(())
        for name, before in self.weights.items():
            mean = torch.stack([update.weights[name] for update in self.updates]).mean(dim=0)
            length += (mean - before).square().sum()
            self.weights[name] = mean
        self.moved = self.moved + length.sqrt()
        return {"moved": float(self.moved)}

    def extra_state(self):
        return {"moved": self.moved}

    def load_extra_state(self, tensors):
        self.moved = tensors["moved"].clone()


class NoMerge(CoarseStrategy):
    pass


def _stripes(request):
    labels = np.arange(160 if request.split == "train" else 40) % 2
    rng = np.random.default_rng(len(labels))
    pixels = np.zeros((len(labels), 1, 8, 8), dtype=np.uint8)
    for image, label in zip(pixels[:, 0], labels):
        bright = rng.integers(100, 256, size=(4, 8))
        image[::2] = bright
        if label:
            image[:] = image.T
    return RawSplit(labels=labels, class_names=("rows", "columns"), read=ArrayReader(images=pixels))


stripes = DataSet(
    read=_stripes, description="stripes", num_classes=2, channels=1, resolution=8,
    background=-1.0, colorable=True,
)
three = DataSet(read=_stripes, description="says three", num_classes=3, channels=1, resolution=8)
slim = Preset(
    unet=unet("RA", (16, 32), 1, 8, 16), prediction="v", resolutions=(8, 16), description="slim"
)
flat = Weighting(lambda snr: snr.new_ones(snr.shape))
halved = CoarseObjective(
    loss=lambda *a, **o: NOISE_TO_NOISE.loss(*a, **o) / 2, chain="noise_to_noise"
)
'''


def write_module(folder: Path) -> None:
    """Write `MODULE` to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{MODULE}.py").write_text(SOURCE, encoding="utf-8")
