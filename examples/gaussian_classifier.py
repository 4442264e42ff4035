"""A client's own classifier, and what all clients released read as one: alone and together.

python examples/gaussian_classifier.py [DIRECTORY]
"""

import sys

import numpy as np
import torch

import fedpdm
from fedpdm.evaluation.features import fit_classifier, predict

config = fedpdm.configure(
    run={"rounds": 3}, data={"coloring": "none"},
    partition={"num_clients": 2, "majority_classes": 5, "majority_ratio": 20},
    privacy={"release": "statistics", "clip_norm": 6}, coarse={"training": "server"},
    fine={"preset": "nano", "steps_per_round": 5}, evaluation={"image_metrics": False},
    sampling={"handover": 150, "fine_labels": False, "candidates": 1},  # else clients choose
)  # fmt: skip
run = fedpdm.run(config, *sys.argv[1:] or ["gaussian-classifier"])
own = fedpdm.share_out(config, fedpdm.load_images(config))[0]
test = fedpdm.load_images(config, "test")
seed = np.random.SeedSequence(0)
model, _ = fit_classifier(own.images, own.labels, num_classes=10, num_steps=500, seed=seed)
alone = torch.from_numpy(predict(model, test.images)).log_softmax(dim=1).numpy()
gaussians = fedpdm.gaussian_classifier(run).log_probabilities(test.images)
rows = {"own": alone, "Gaussians": gaussians, "together": alone + 0.75 * gaussians}
for name, scores in rows.items():
    print(f"{name}: right in {np.mean(scores.argmax(axis=1) == test.labels):.3f}")
