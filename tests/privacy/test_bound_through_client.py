"""The clip norm holds for what a client sends, for every kind of images that a run can have.

The noise is replaced by zeros, so that a client's release shows the clipped image itself.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clients.local import LocalClient, open_local_client
from clients.training import LocalTraining
from fedpdm import wire
from fedpdm.privacy.noise import SeededNoise, SystemNoise
from tests.support.deployments import Federation, deployed_config
from tests.support.federations import client_of, flat, small_config

SIZES = ((4, 4), (8, 8), (16, 16), (32, 32))  # images are square
CLIP_NORM = 2.0


def pictures(channels: int, size: tuple[int, int]) -> np.ndarray:
    """uint8 (40, C, H, W): black, white, checks, one bright pixel, noise, near the background."""
    rng = np.random.default_rng(channels)
    shape = (channels, *size)
    fixed = [np.full(shape, 0), np.full(shape, 255), np.indices(shape).sum(0) % 2 * 255]
    fixed += [np.where(np.arange(math.prod(shape)) == k, 255, 128).reshape(shape) for k in (0, 7)]
    wild = [rng.integers(0, 256, shape) for _ in range(20)]
    calm = [rng.integers(126, 131, shape) for _ in range(15)]
    return np.stack([*fixed, *wild, *calm]).astype(np.uint8)


def as_folder(root: Path, images: np.ndarray) -> None:
    for at, image in enumerate(images):
        path = root / "train" / "ab"[at % 2] / f"{at:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)).save(path)


def as_npz(path: Path, images: np.ndarray, layout: str) -> None:
    moved = {"NCHW": images, "NHWC": images.transpose(0, 2, 3, 1), "NHW": images[:, 0]}[layout]
    labels = np.arange(len(images)) % 2
    np.savez(path, images=moved, labels=labels, images_test=moved[:1], labels_test=labels[:1])


def cases() -> Iterator[tuple[str, int, tuple[int, int]]]:
    for channels, size in itertools.product((1, 3), SIZES):
        yield "folder", channels, size
        for layout in ("NCHW", "NHWC", *(("NHW",) if channels == 1 else ())):
            yield layout, channels, size


def released(local: LocalClient) -> tuple[np.ndarray, np.ndarray]:
    """(clipped images float64 (N, D), what was clipped float64 (N, D)) of a release without noise.

    Read back from the message that the client would send.
    """
    message = wire.encode_release(LocalTraining(local).release(), client_id=local.client_id)
    sent = wire.decode_release(message, who="it", client_id=local.client_id)
    scale = math.sqrt(sent.parameters.alpha_bar)
    clipped = sent.x_tilde.numpy().reshape(len(sent.x_tilde), -1).astype(np.float64) / scale
    pixels = local.held.images.images.reshape(len(clipped), -1).astype(np.float64)
    return clipped, pixels / 127.5 - 1.0 - sent.parameters.shift


def check(clipped: np.ndarray, shifted: np.ndarray, *, clip_norm: float, sigma: float) -> None:
    """Never longer than C; the image itself where that is shorter; its direction where not."""
    grid, size = sigma / 4096, clipped.shape[1]
    lengths, before = np.linalg.norm(clipped, axis=1), np.linalg.norm(shifted, axis=1)
    assert (lengths <= clip_norm * (1.0 + 1e-6)).all()
    assert (before > clip_norm).any()  # else nothing was at stake
    room = grid * (math.sqrt(size) + size / 12.0 / max(1.0, clip_norm / grid) + 8.0)
    wanted = shifted * np.minimum(1.0, clip_norm / np.maximum(before, 1e-12))[:, None]
    assert (np.linalg.norm(clipped - wanted, axis=1) <= room).all()


@pytest.fixture
def silent(monkeypatch: pytest.MonkeyPatch) -> None:
    """Noise of zeros, in place of a deployment's and of a simulation's."""
    for kind in (SystemNoise, SeededNoise):
        monkeypatch.setattr(kind, "fill", lambda _, out: out.fill(0.0))


@pytest.mark.slow
def test_the_bound_holds_for_all_images_that_a_client_can_have(
    tmp_path: Path, silent: None
) -> None:
    for layout, channels, size in cases():
        root = tmp_path / f"{layout}-{channels}-{size[0]}x{size[1]}"
        images = pictures(channels, size)
        if layout == "folder":
            as_folder(root / "images", images)
            data = root / "images"
        else:
            root.mkdir()
            data = root / "images.npz"
            as_npz(data, images, layout)
        name = "image_folder" if layout == "folder" else "npz"
        config = deployed_config(
            data,
            data={"name": name, "root": str(data)},
            privacy={"clip_norm": CLIP_NORM},
        )
        node = {"partition-id": 0, "data-dir": str(data), "store-dir": str(root / "store")}
        federation = Federation({0: node}, flat(config, root / "server"))
        local = open_local_client(node, federation.run_config, 0)
        assert local.held.images.images.shape[1:] == (channels, *size), root.name
        (parameters,) = local.setup.release_plan.rounds
        check(*released(local), clip_norm=CLIP_NORM, sigma=parameters.sigma)


PREPARED = {
    "grey made smaller": {"resolution": 4},
    "grey in the class's colour": {"coloring": "by_label"},
    "grey in any colour": {"coloring": "independent"},
    "grey in a colour, smaller": {"coloring": "independent", "resolution": 4},
}


@pytest.mark.parametrize("what", PREPARED)
def test_the_bound_holds_after_every_preparation(tmp_path: Path, silent: None, what: str) -> None:
    as_folder(tmp_path / "images", pictures(1, (8, 8)))
    config = deployed_config(
        tmp_path / "images",
        data={"root": str(tmp_path / "images"), **PREPARED[what]},
        privacy={"clip_norm": CLIP_NORM},
    )
    data, store = str(tmp_path / "images"), str(tmp_path / "store")
    node = {"partition-id": 0, "data-dir": data, "store-dir": store}
    local = open_local_client(node, flat(config, tmp_path / "server"), 0)
    colors = 3 if "coloring" in PREPARED[what] else 1
    assert local.held.images.images.shape[1] == colors
    (parameters,) = local.setup.release_plan.rounds
    check(*released(local), clip_norm=CLIP_NORM, sigma=parameters.sigma)


@pytest.mark.parametrize("shift", [-1.0, 0.0, 0.5])
def test_the_bound_holds_in_a_simulation(tmp_path: Path, silent: None, shift: float) -> None:
    config = small_config(privacy={"clip_norm": 2.0, "shift": shift}, partition={"num_clients": 2})
    local = client_of(config, tmp_path, 1).local
    (parameters,) = local.setup.release_plan.rounds
    clipped, shifted = released(local)
    check(clipped, shifted, clip_norm=2.0, sigma=parameters.sigma)
    assert len(clipped) == len(local.held.images)


@pytest.mark.parametrize("channels", [1, 3])
def test_the_check_finds_an_image_that_is_not_clipped(
    tmp_path: Path, silent: None, monkeypatch: pytest.MonkeyPatch, channels: int
) -> None:
    """Planted: images of so many channels pass as they are."""
    from fedpdm.privacy.mechanism import gaussian

    real = gaussian.clip_to_grid

    def careless(x: np.ndarray, *, bound: float, steps: float, out: np.ndarray) -> np.ndarray:
        if x.shape[1] == channels * 64:
            out[:] = np.rint(x * steps)
            return out
        return real(x, bound=bound, steps=steps, out=out)

    as_folder(tmp_path / "images", pictures(channels, (8, 8)))
    config = deployed_config(
        tmp_path / "images",
        data={"root": str(tmp_path / "images")},
        privacy={"clip_norm": CLIP_NORM},
    )
    data, store = str(tmp_path / "images"), str(tmp_path / "store")
    node = {"partition-id": 0, "data-dir": data, "store-dir": store}
    local = open_local_client(node, flat(config, tmp_path / "server"), 0)
    monkeypatch.setattr(gaussian, "clip_to_grid", careless)
    sigma = local.setup.release_plan.rounds[0].sigma
    with pytest.raises(AssertionError):
        check(*released(local), clip_norm=CLIP_NORM, sigma=sigma)
    assert torch.is_tensor(LocalTraining(local).release().x_tilde)
