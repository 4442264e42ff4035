"""A custom data set: drawn here, read by name in every process of a run.

python examples/own_data_set.py [FOLDER]
cd examples; fedpdm run ../experiments/digits.yaml --set data.name=own_data_set:shapes
"""

import sys

import numpy as np

import fedpdm
from fedpdm.data import ArrayReader, DataSet, RawSplit, Request


def draw(request: Request) -> RawSplit:
    """Bars and squares on black; the same images whenever a split is read."""
    rng = np.random.default_rng({"train": 0, "test": 1}[request.split])
    labels = np.arange(400 if request.split == "train" else 100) % 2
    pixels = np.zeros((len(labels), 1, 8, 8), dtype=np.uint8)
    for image, label in zip(pixels[:, 0], labels, strict=True):
        row, column = rng.integers(0, 5, 2)
        image[row : row + (1 if label == 0 else 3), column : column + 3] = rng.integers(128, 256)
    names = ("bars", "squares")
    return RawSplit(labels=labels, class_names=names, read=ArrayReader(images=pixels))


shapes = DataSet(
    read=draw, description="two shapes", num_classes=2, channels=1, resolution=8, background=-1.0
)

if __name__ == "__main__":
    few = {"preset": "nano", "steps_per_round": 5}
    config = fedpdm.configure(
        run={"rounds": 1}, data={"name": "own_data_set:shapes"}, coarse=few, fine=few,
        partition={"kind": "iid", "num_clients": 2}, privacy={"clip_norm": 6},
        sampling={"num_steps": 5, "per_class": 2}, evaluation={"image_metrics": False},
    )  # fmt: skip
    run = fedpdm.run(config, (sys.argv[1:] or ["own-data-set"])[0])
    print(f"held-out loss {run.read_json('metrics.json')['final']['heldout_coarse_loss']:.3f}")
