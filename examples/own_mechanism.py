"""A custom release mechanism: images are averaged over 2x2 blocks before they are released.

What `prepare` returns is clipped, so an image costs what it costs without. [FOLDER] to run in.
"""

import sys
from typing import ClassVar

import numpy as np

import fedpdm
from fedpdm.privacy.mechanism import ImageMechanism, register
from fedpdm.privacy.types import ReleaseParameters


class BlockParameters(ReleaseParameters):
    mechanism: ClassVar[str] = "block_means"


@register
class BlockMeans(ImageMechanism):
    parameters = BlockParameters

    def prepare(self, x: np.ndarray) -> np.ndarray:
        n, c, h, w = x.shape
        return x.reshape(n, c, h // 2, 2, w // 2, 2).mean((3, 5)).repeat(2, 2).repeat(2, 3)

    def sentence(self, parameters: ReleaseParameters) -> str:
        return f"Images are first averaged over blocks of 2x2. {super().sentence(parameters)}"


if __name__ == "__main__":
    small = {"steps_per_round": 5, "preset": "nano"}
    config = fedpdm.configure(
        run={"rounds": 1}, partition={"kind": "iid"}, coarse=small, fine=small,
        privacy={"release": "block_means"}, evaluation={"image_metrics": False},
    )  # fmt: skip
    run = fedpdm.run(config, *sys.argv[1:] or ["own-mechanism"])
    print(run.read_json("privacy.json")["released"])
    print(f"epsilon {fedpdm.account(run.client_path(0)).largest:.3f} per image, by the ledger")
