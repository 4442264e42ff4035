"""From a folder of images, one folder per class, to a diffusers pipeline.

    python examples/bring_your_own_images.py IMAGES OUT [--resolution 32] [--clients 2] ...

Simulates a federation that shares the images out, and exports client 0's pipeline to OUT/pipeline
and samples to OUT/samples.png. The noise of a simulation is seeded: see docs/deployment.md for
protection of real images.
"""

import argparse
from pathlib import Path

import fedpdm
from fedpdm.publishing.export import sample_grid

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("images", type=Path, help="CLASS/*.png, or train/CLASS/* and test/CLASS/*")
parser.add_argument("out", type=Path, help="directory to make")
parser.add_argument("--resolution", type=int, default=32, help="pixels; default: %(default)s")
parser.add_argument("--clients", type=int, default=2, help="default: %(default)s")
parser.add_argument("--epsilon", type=float, default=10.0, help="default: %(default)s")
parser.add_argument(
    "--clip-norm", type=float, default=12.0,
    help="about the median norm of PUBLIC images like these, scaled to [-1, 1]; "
    "default: %(default)s",
)  # fmt: skip
parser.add_argument("--preset", default="small", help="U-Net; default: %(default)s")
parser.add_argument("--rounds", type=int, default=10, help="default: %(default)s")
parser.add_argument("--steps", type=int, default=200, help="per round; default: %(default)s")
options = parser.parse_args()

model = {"preset": options.preset, "steps_per_round": options.steps, "batch_size": 32}
config = fedpdm.configure(
    name="own-images",
    run={"rounds": options.rounds},
    data={
        "name": "image_folder",
        "root": str(options.images.absolute()),
        "resolution": options.resolution,
    },
    partition={"kind": "iid", "num_clients": options.clients},
    privacy={"epsilon": options.epsilon, "clip_norm": options.clip_norm},
    coarse=model,
    fine=model,
    evaluation={"image_metrics": False},
)
run = fedpdm.run(config, options.out / "run")
pipeline = fedpdm.export_client(run, options.out / "pipeline", client=0)
num_classes = len(fedpdm.load_images(config).class_names)
sample_grid(pipeline, labels=None, num=4 * num_classes, out=options.out / "samples.png")
print(f"{pipeline}: load it with diffusers, as its README.md says")
