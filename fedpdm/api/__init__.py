"""The library's front door: what people do with fedpdm, on a config and on arrays.

`from fedpdm import release, train_coarse, ...` gives the names below. Every function here
calls the code that a federation runs: settings are those of the YAML files (`configure`), images
are noised once for ever by a client's store (`release`), models are trained with the configured
objectives, and samples and attacks are those of the command line. It may import every room but
`commands`; nothing in fedpdm imports it.

Where `run.simulation` is true (the default), noise is seeded and protects from nobody who knows the
seed: set it to false for real images of people.
"""

from fedpdm.api.models import gaussian_classifier as gaussian_classifier
from fedpdm.api.models import sample as sample
from fedpdm.api.models import train_coarse as train_coarse
from fedpdm.api.models import train_fine as train_fine
from fedpdm.api.releasing import account as account
from fedpdm.api.releasing import configure as configure
from fedpdm.api.releasing import load_images as load_images
from fedpdm.api.releasing import release as release
from fedpdm.api.releasing import share_out as share_out
from fedpdm.api.running import attack_model as attack_model
from fedpdm.api.running import attack_uploads as attack_uploads
from fedpdm.api.running import export_client as export_client
from fedpdm.api.running import run as run
from fedpdm.diffusion.schedule import make_schedule as make_schedule
from fedpdm.privacy.calibration import calibrate as calibrate
from fedpdm.publishing.export import load_pipeline as load_pipeline
