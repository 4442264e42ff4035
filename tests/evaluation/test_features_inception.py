"""FID's Inception with random weights (no download), against torch-fidelity's own use of it."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch_fidelity import feature_extractor_inceptionv3 as library

from fedpdm.evaluation.features import InceptionFeatures, inception


class RandomWeights(library.FeatureExtractorInceptionV3):  # type: ignore[misc]
    """The library's class with the weights that its layers start with."""

    def load_state_dict(self, *_: Any, **__: Any) -> None:
        pass


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("inception")
    torch.save({}, folder / "nothing.pth")
    torch.manual_seed(0)
    network = RandomWeights(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=folder / "nothing.pth"
    )
    torch.save(network.state_dict(), folder / "random.pth")
    yield folder / "random.pth"
    (folder / "random.pth").unlink()  # 95 MB


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No file is given, none was downloaded, and the download is from a place that is not there."""
    monkeypatch.delenv("FEDPDM_INCEPTION", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    missing = tmp_path / "missing" / inception.WEIGHTS_FILE
    monkeypatch.setattr(library, "URL_INCEPTION_V3", missing.as_uri())
    return missing


@pytest.mark.slow
def test_features_are_torch_fidelitys(weights: Path) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, size=(3, 3, 16, 16), dtype=np.uint8)
    extractor = InceptionFeatures(weights)
    got = extractor(images)
    own = library.FeatureExtractorInceptionV3(
        "inception-v3-compat", ["2048"], feature_extractor_weights_path=str(weights)
    )
    wanted = own(torch.from_numpy(images))[0].numpy()
    assert got.shape == (3, 2048)
    assert got.dtype == np.float64
    assert np.allclose(got, wanted, rtol=1e-4, atol=1e-6)
    assert np.abs(got[0] - got[1]).max() > 100 * np.abs(got - wanted).max()
    # Grey is three equal channels.
    grey = extractor(images[:2, :1])
    assert np.allclose(grey, extractor(np.repeat(images[:2, :1], 3, axis=1)), atol=1e-6)
    with pytest.raises(ValueError, match=r"C 1 or 3, got uint8 of shape \(3, 2, 16, 16\)$"):
        extractor(images[:, :2])


@pytest.mark.slow
def test_only_the_published_weights_are_called_fids(
    weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDPDM_INCEPTION", str(weights))
    random = InceptionFeatures()
    assert random.name == f"inception-2048-{random.digest[:8]}"
    assert random.name != inception.FID_FEATURES
    monkeypatch.setattr(inception, "_WEIGHTS_SHA", random.digest[:8])
    assert InceptionFeatures().name == inception.FID_FEATURES


@pytest.mark.slow
def test_downloaded_where_none_is_given(
    weights: Path, no_weights: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_weights.parent.mkdir()
    os.link(weights, no_weights)
    monkeypatch.setattr(torch.hub, "download_url_to_file", copy_of_url)
    first = InceptionFeatures()
    no_weights.unlink()
    assert InceptionFeatures().digest == first.digest  # from the hub directory


def copy_of_url(url: str, place: str, *_: Any, **__: Any) -> None:
    os.link(url.removeprefix("file://"), place)


def test_one_line_without_weights(no_weights: Path) -> None:
    with pytest.raises(ValueError, match=r"^evaluation: .* cannot be downloaded") as raised:
        InceptionFeatures()
    assert "set FEDPDM_INCEPTION to the file" in str(raised.value)
    assert "\n" not in str(raised.value)


class Planted:
    """A pickle that would make a directory."""

    def __init__(self, place: str) -> None:
        self.place = place

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.place,)


@pytest.mark.slow
@pytest.mark.parametrize("content", ["text", "empty", "other", "list", "pickle"])
def test_one_line_for_another_file(tmp_path: Path, content: str) -> None:
    path = tmp_path / "weights.pth"
    if content == "other":
        torch.save({"a": torch.zeros(2)}, path)
    elif content == "list":
        torch.save([1, 2], path)
    elif content == "pickle":
        path.write_bytes(pickle.dumps(Planted(str(tmp_path / "made"))))
    else:
        path.write_text({"text": "no weights", "empty": ""}[content])
    start = re.escape(f"{path}: not torch-fidelity's file of Inception weights: ")
    with pytest.raises(ValueError, match=f"^{start}[^\n]+$"):
        InceptionFeatures(path)
    assert not (tmp_path / "made").exists()


def test_one_line_for_a_missing_file(tmp_path: Path) -> None:
    message = f"{tmp_path / 'none'}: Inception weights cannot be read: No such file or directory"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        InceptionFeatures(tmp_path / "none")
