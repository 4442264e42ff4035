"""The libraries that training, accounting and Flower need, imported all at once.

That takes seconds. A process that imports this module and then forks spares its children the wait.
Nothing of our own is imported, so a child finds our code as it is when the child starts.
"""

import cryptography.hazmat.primitives.ciphers  # noqa: F401
import diffusers.models.unets.unet_2d  # noqa: F401
import dp_accounting.mechanism_calibration
import dp_accounting.pld  # noqa: F401
import flwr.client.mod
import flwr.supernode.cli  # noqa: F401
import PIL.Image  # noqa: F401
import safetensors.torch  # noqa: F401
import scipy.signal
import scipy.stats  # noqa: F401
import torch._dynamo  # noqa: F401 (optimisers import it)
import torchvision  # noqa: F401
