"""FID's Inception v3, through torch-fidelity: the only features whose distance is called FID.

The weights are those that TensorFlow published in December 2015 and every reported FID is made
with. torch-fidelity downloads them; where there is no network they are given as a file. Features of
any other weights get another name, so that their distances are never printed as FID.
"""

from __future__ import annotations

import hashlib
import os
import pickle
import urllib.error
import warnings
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray

from fedpdm.evaluation.features.extractor import check_images
from fedpdm.jobs.progress import sum_progress

__all__ = ["FID_FEATURES", "InceptionFeatures"]

FID_FEATURES: Final = "inception-2048"
WEIGHTS_VARIABLE: Final = "FEDPDM_INCEPTION"
WEIGHTS_FILE: Final = "weights-inception-2015-12-05-6726825d.pth"
# First digits of the file's SHA-256, which torch-fidelity's file name ends with.
_WEIGHTS_SHA: Final = "6726825d"
_BATCH: Final = 32


class InceptionFeatures:
    """The 2048 values of the last pooling layer, as FID takes them; grey becomes three channels.

    Attributes:
        name: `inception-2048`, or `inception-2048-XXXXXXXX` with the start of the file's SHA-256
            for a file of other weights.
        digest: SHA-256 of the weights file.
    """

    def __init__(self, weights: Path | None = None, *, device: torch.device | str = "cpu") -> None:
        """Load the weights.

        Args:
            weights: a file of torch-fidelity's; default: the environment variable
                FEDPDM_INCEPTION, or a download into torch's hub directory.

        Raises:
            ValueError: one line that says what is missing or wrong with the file, and the remedy.
        """
        given = weights or os.environ.get(WEIGHTS_VARIABLE) or None
        path = None if given is None else Path(given).expanduser()
        network, path = _load(path)
        self.digest = _sha256(path)
        genuine = self.digest.startswith(_WEIGHTS_SHA)
        self.name = FID_FEATURES if genuine else f"{FID_FEATURES}-{self.digest[:8]}"
        self._network = network.to(device)
        self._device = device

    @torch.no_grad()
    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        """(N, 2048) of uint8 (N, C, H, W), C 1 or 3, any size; about 5 GMAC an image."""
        check_images(images)
        features = []
        show = sum_progress("Inception features", "image", len(images))
        for start in range(0, len(images), _BATCH):
            batch = torch.from_numpy(np.array(images[start : start + _BATCH]))
            colored = batch.expand(-1, 3, -1, -1).to(self._device)
            features.append(self._network(colored)[0].cpu().numpy())
            show(len(batch))
        return np.concatenate(features).astype(np.float64)


def _load(path: Path | None) -> tuple[Any, Path]:
    """torch-fidelity's extractor and the file that its weights are from."""
    from torch_fidelity import feature_extractor_inceptionv3 as library

    if path is None:
        path = Path(torch.hub.get_dir()) / "checkpoints" / Path(library.URL_INCEPTION_V3).name
        try:
            # The file that is there already, or a download to it.
            network = library.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
        except (urllib.error.URLError, OSError, TimeoutError) as error:
            raise ValueError(
                f"evaluation: the Inception weights cannot be downloaded ({error}); set "
                f"{WEIGHTS_VARIABLE} to the file {WEIGHTS_FILE} of torch-fidelity"
            ) from None
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise _unsuitable(path, error) from None
        return network, path
    try:
        # torch-fidelity reads pickles of any content: first see that it holds tensors alone.
        with warnings.catch_warnings(action="ignore"):  # of pickles that torch did not write
            torch.load(path, map_location="cpu", weights_only=True)
        network = library.FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)
        )
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(f"{path}: Inception weights cannot be read: {reason}") from None
    except (
        RuntimeError, EOFError, pickle.UnpicklingError, TypeError, AttributeError, ValueError,
    ) as error:  # fmt: skip
        raise _unsuitable(path, error) from None
    return network, path


def _unsuitable(path: Path, error: Exception) -> ValueError:
    reason = " ".join(str(error).split())[:120] or type(error).__name__
    return ValueError(f"{path}: not torch-fidelity's file of Inception weights: {reason}")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
