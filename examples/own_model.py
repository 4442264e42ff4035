"""A custom U-Net, loss weight and coarse objective, each named in the config.

python examples/own_model.py [FOLDER]
cd examples; fedpdm run ../experiments/digits.yaml --set coarse.preset=own_model:slim
"""

import sys
from typing import Any

import torch

import fedpdm
from fedpdm.diffusion.objectives import TRUNCATED, CoarseObjective
from fedpdm.diffusion.presets import Preset, unet
from fedpdm.diffusion.weightings import Weighting

net = unet("RA", (16, 32), layers=1, groups=8, head=16)  # a letter and a width for each level
slim = Preset(unet=net, prediction="v", resolutions=(8, 16), description="half as wide as tiny")


@Weighting
def gentle(snr: torch.Tensor) -> torch.Tensor:
    """sqrt(SNR + 1): less weight than v on the steps with little noise."""
    return (snr + 1.0).sqrt()


def robust(*arguments: Any, **options: Any) -> torch.Tensor:
    """The truncated objective; no image counts for more than five."""
    return TRUNCATED.loss(*arguments, **options).clamp_max(5.0)


clamped = CoarseObjective(loss=robust, chain="truncated")

if __name__ == "__main__":
    coarse = {"preset": "own_model:slim", "objective": "own_model:clamped", "steps_per_round": 5}
    fine = {"preset": "own_model:slim", "weighting": "own_model:gentle", "steps_per_round": 5}
    few = {"run": {"rounds": 1}, "partition": {"kind": "iid", "num_clients": 2}}
    config = fedpdm.configure(coarse=coarse, fine=fine, evaluation={"image_metrics": False}, **few)
    run = fedpdm.run(config, (sys.argv[1:] or ["own-model"])[0])
    print(f"held-out loss {run.read_json('metrics.json')['final']['heldout_coarse_loss']:.3f}")
