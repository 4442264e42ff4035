"""Features of a trained classifier, of pixels, and what is kept of them on disk."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedpdm.data import ImageSet, load_image_set
from fedpdm.evaluation.features import (
    PixelExtractor,
    SmallClassifier,
    TrainedFeatures,
    cache_directory,
    fit_classifier,
    predict,
    reference_features,
    train_feature_network,
)
from fedpdm.evaluation.features.network import _shifted
from fedpdm.evaluation.metrics import PixelFeatures
from fedpdm.jobs import progress
from fedpdm.storage.files import StoreError
from tests.support.pixels import exactly

RNG = np.random.default_rng
STEPS = 200


@pytest.fixture(scope="module")
def digits() -> dict[str, ImageSet]:
    return {
        split: load_image_set("digits", split=split, coloring="none") for split in ("train", "test")
    }


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def network(digits: dict[str, ImageSet], shared_cache: Path) -> TrainedFeatures:
    return train_feature_network(digits["train"], seed=0, num_steps=STEPS, cache=shared_cache)


# --- the network ----------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "side"), [(1, 8), (3, 16), (1, 28), (3, 32), (3, 64)])
def test_sizes_and_shapes(channels: int, side: int) -> None:
    model = SmallClassifier(channels=channels, resolution=side, num_classes=7).eval()
    assert 100_000 <= sum(p.numel() for p in model.parameters()) <= 300_000
    x = torch.zeros(2, channels, side, side)
    assert model(x).shape == (2, 7)
    assert model.features(x).shape == (2, 64)
    maps = model.convolutions[:3](x)
    assert max(maps.shape[2:]) <= 16


def test_images_are_shifted_and_nothing_else() -> None:
    images = RNG(0).integers(0, 256, size=(40, 3, 16, 16), dtype=np.uint8)
    moved = _shifted(images, RNG(1))
    padded = np.pad(images, ((0, 0), (0, 0), (2, 2), (2, 2)), mode="edge")
    found = set()
    for before, after in zip(padded, moved, strict=True):
        places = [
            (y, x)
            for y in range(5)
            for x in range(5)
            if np.array_equal(before[:, y : y + 16, x : x + 16], after)
        ]
        assert len(places) == 1
        found.add(places[0])
    assert len(found) > 10
    tiny = images[..., :4, :4]
    assert np.array_equal(_shifted(tiny, RNG(1)), tiny)  # an eighth of 4 is no whole pixel


@pytest.mark.slow
def test_it_learns_digits(digits: dict[str, ImageSet], network: TrainedFeatures) -> None:
    test = digits["test"]
    assert (network.classify(test.images) == test.labels).mean() > 0.93
    assert network.num_held_out == 144
    assert network.accuracy > 0.93
    # What it calls features is what its classifier sees.
    features = torch.from_numpy(network(test.images)).float()
    with torch.no_grad():
        logits = network.model.to_classes(features.relu())
    assert np.array_equal(logits.argmax(dim=1).numpy(), network.classify(test.images))
    assert network(test.images).shape == (len(test), 64)
    assert network(test.images).dtype == np.float64
    assert network.name == "trained-64"
    # Of training images each feature has mean 0 and variance 1, up to the shifts of training.
    values = network(digits["train"].images)
    assert np.abs(values.mean(axis=0)).max() < 0.5
    assert np.allclose(values.std(axis=0), 1, atol=0.5)


def test_batches_do_not_matter(digits: dict[str, ImageSet], network: TrainedFeatures) -> None:
    images = digits["test"].images[:300]
    assert np.allclose(network(images)[280:], network(images[280:]), atol=1e-4)


def test_same_seed_same_network(digits: dict[str, ImageSet]) -> None:
    few = digits["train"].subset(np.arange(100))

    def weights(seed: int) -> torch.Tensor:
        model, _ = fit_classifier(
            few.images, few.labels, num_classes=10, num_steps=5, seed=np.random.SeedSequence(seed)
        )
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    state = torch.random.get_rng_state()
    first = weights(0)
    assert torch.equal(state, torch.random.get_rng_state())  # the global generator is left alone
    torch.manual_seed(123)
    assert torch.equal(first, weights(0))
    assert not torch.equal(first, weights(1))


def test_training_refuses(digits: dict[str, ImageSet], tmp_path: Path) -> None:
    train = digits["train"]
    with pytest.raises(ValueError, match=r"at least 20 images of 2 classes .*, got 19 of \d+$"):
        train_feature_network(train.subset(np.arange(19)), seed=0, cache=tmp_path)
    zeros = np.flatnonzero(train.labels == 0)[:30]
    with pytest.raises(ValueError, match=r"got 30 of 1$"):
        train_feature_network(train.subset(zeros), seed=0, cache=tmp_path)
    seed = np.random.SeedSequence(0)
    for labels, message in (
        (train.labels[:10].astype(np.int32), "labels must be int64 of shape (10,)"),
        (train.labels[:10] + 5, "labels must be in [0, 10), got 14"),
        (train.labels[:10] - 1, "labels must be in [0, 10), got -1"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            fit_classifier(train.images[:10], labels, num_classes=10, num_steps=1, seed=seed)
    wide = np.zeros((4, 1, 8, 16), np.uint8)
    with pytest.raises(ValueError, match=exactly("classifier: images must be square, got (8, 16)")):
        fit_classifier(wide, train.labels[:4], num_classes=10, num_steps=1, seed=seed)
    with pytest.raises(ValueError, match=exactly("image side must be in [4, 128], got 200")):
        SmallClassifier(channels=1, resolution=200, num_classes=2)
    with pytest.raises(FloatingPointError, match=r"^classifier: loss is (nan|inf) at step \d+$"):
        fit_classifier(train.images, train.labels, num_classes=10, num_steps=9, seed=seed, lr=1e38)


def test_other_images_are_refused(network: TrainedFeatures) -> None:
    with pytest.raises(ValueError, match=r"with \(1, 8, 8\), got \(2, 1, 9, 9\)$"):
        network(np.zeros((2, 1, 9, 9), np.uint8))
    with pytest.raises(ValueError, match=r"C 1 or 3, got float64 of shape \(2, 1, 8, 8\)$"):
        predict(network.model, np.zeros((2, 1, 8, 8)))  # type: ignore[arg-type]


# --- the cache of networks ------------------------------------------------------------------


def trained(images: ImageSet, cache: Path, *, seed: int = 0) -> tuple[TrainedFeatures, int]:
    """A network of few steps, and how many were taken (0: from the cache)."""
    taken = [0]

    def progress(step: int, total: int, loss: float) -> None:
        assert step <= total == 10
        assert loss > 0
        taken[0] = step

    return train_feature_network(
        images, seed=seed, num_steps=10, cache=cache, progress=progress
    ), taken[0]


@pytest.mark.slow
def test_networks_are_trained_once(digits: dict[str, ImageSet], tmp_path: Path) -> None:
    few = digits["train"].subset(np.arange(60))
    first, steps = trained(few, tmp_path)
    again, none = trained(few, tmp_path)
    assert (steps, none) == (10, 0)
    assert first.digest == again.digest
    assert np.array_equal(first(few.images), again(few.images))
    assert (first.accuracy, first.num_held_out) == (again.accuracy, again.num_held_out)
    # Everything in the key changes the network.
    for other, seed in ((few, 1), (few.subset(np.arange(59)), 0)):
        network, steps = trained(other, tmp_path, seed=seed)
        assert steps == 10
        assert network.digest != first.digest
    relabelled = ImageSet(
        images=few.images,
        labels=(few.labels + 1) % 10,
        class_names=few.class_names,
        background=few.background,
    )
    assert trained(relabelled, tmp_path)[1] == 10
    assert not [path for path in tmp_path.rglob("*") if path.suffix == ".tmp"]


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["cut", "empty", "value", "text"])
def test_damaged_networks_are_trained_anew(
    digits: dict[str, ImageSet], tmp_path: Path, damage: str
) -> None:
    few = digits["train"].subset(np.arange(40))
    first, _ = trained(few, tmp_path)
    (path,) = tmp_path.rglob("*.safetensors")
    content = bytearray(path.read_bytes())
    if damage == "value":
        content[-40] ^= 0x10
    path.write_bytes(
        {"cut": content[:-100], "empty": b"", "value": content, "text": b"no network"}[damage]
    )
    again, steps = trained(few, tmp_path)
    assert steps == 10
    assert again.digest == first.digest
    assert trained(few, tmp_path)[1] == 0


def test_cache_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FEDPDM_CACHE", str(tmp_path / "there"))
    assert cache_directory() == tmp_path / "there"
    assert cache_directory(tmp_path) == tmp_path
    monkeypatch.delenv("FEDPDM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "fedpdm"


def test_unwritable_cache_is_refused_before_training(
    digits: dict[str, ImageSet], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a directory")
    with pytest.raises(StoreError, match=r"file.*store cannot be written"):
        trained(digits["train"], tmp_path / "file")


# --- pixels and references ------------------------------------------------------------------


def test_pixel_extractor_is_pixel_features(digits: dict[str, ImageSet]) -> None:
    images = digits["test"].images
    extractor = PixelExtractor.fit(images, num_components=9)
    wanted = PixelFeatures.fit(images, num_components=9)
    assert extractor.name == "pixel-9"
    assert np.array_equal(extractor(images), wanted(images))
    assert extractor.digest == PixelExtractor(wanted).digest
    assert extractor.digest != PixelExtractor.fit(images[1:], num_components=9).digest
    with pytest.raises(ValueError, match="images must be uint8 of shape"):
        extractor(images[0])


class Counting:
    """The first three pixels, and how often they were asked for."""

    name, digest = "first-3", "0"

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        self.calls += 1
        return images.reshape(len(images), -1)[:, :3].astype(np.float64) / 3


def test_references_are_computed_once(tmp_path: Path) -> None:
    images = RNG(0).integers(0, 256, size=(30, 1, 4, 4), dtype=np.uint8)
    extractor = Counting()
    first, again = (reference_features(images, extractor, cache=tmp_path) for _ in range(2))
    assert extractor.calls == 1
    rows = images.reshape(30, -1)[:, :3] / 3
    for got in (first, again):
        assert np.array_equal(got.features, rows)  # thirds are kept in full
        assert np.allclose(got.statistics.mean, rows.mean(axis=0))
        assert np.allclose(got.statistics.cov, np.cov(rows, rowvar=False))
        assert got.statistics.num_examples == 30
        assert (got.extractor_name, got.extractor_digest) == ("first-3", "0")
    part = first.rows(np.arange(5, 12))
    assert np.allclose(part.statistics.cov, np.cov(rows[5:12], rowvar=False))
    # Another image, another extractor: computed.
    reference_features(images[::-1].copy(), extractor, cache=tmp_path)
    extractor.digest = "1"
    reference_features(images, extractor, cache=tmp_path)
    assert extractor.calls == 3
    with pytest.raises(ValueError, match=exactly("reference images must be at least 2, got 1")):
        reference_features(images[:1], extractor, cache=tmp_path)


def test_damaged_references_are_made_anew(tmp_path: Path) -> None:
    images = RNG(0).integers(0, 256, size=(30, 1, 4, 4), dtype=np.uint8)
    extractor = Counting()
    first = reference_features(images, extractor, cache=tmp_path)
    (path,) = tmp_path.rglob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-5] ^= 0x40
    for damaged in (bytes(content), content[:-8], b""):
        path.write_bytes(damaged)
        again = reference_features(images, extractor, cache=tmp_path)
        assert np.array_equal(again.features, first.features)
        assert np.array_equal(again.statistics.cov, first.statistics.cov)
    assert extractor.calls == 4


def test_how_far_features_are_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    images = np.zeros((2500, 1, 8, 8), dtype=np.uint8)
    predict(SmallClassifier(channels=1, resolution=8, num_classes=2), images, features=True)
    lines = capsys.readouterr().err.splitlines()
    assert lines
    assert all(line.startswith("features: image ") and "/2500, " in line for line in lines)
    done = [int(line.split()[2].split("/")[0]) for line in lines]
    assert done == sorted(set(done))
