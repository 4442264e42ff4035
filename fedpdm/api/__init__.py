"""The library's front door: what people do with fedpdm, on a config and on arrays.

`from fedpdm import release, train_coarse, ...` gives the names of `__all__`. Every function here
calls the code that a federation runs: settings are those of the YAML files (`configure`), images
are noised once for ever by a client's store (`release`), models are trained with the configured
objectives, and what is drawn or attacked is what the run's own commands would draw or attack.

Where `run.simulation` is true (the default), noise is seeded and protects from nobody who knows the
seed: set it to false for real images of people.
"""

from fedpdm.api.models import sample, train_coarse, train_fine
from fedpdm.api.releasing import account, configure, load_images, release, share_out
from fedpdm.api.running import attack_model, attack_uploads, export_client, run
from fedpdm.calibration import calibrate
from fedpdm.export import load_pipeline
from fedpdm.schedule import make_schedule

__all__ = [
    "account",
    "attack_model",
    "attack_uploads",
    "calibrate",
    "configure",
    "export_client",
    "load_images",
    "load_pipeline",
    "make_schedule",
    "release",
    "run",
    "sample",
    "share_out",
    "train_coarse",
    "train_fine",
]
