"""Everything private that a client has, in the forms in which it could leave, and a search."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clients.local import LocalClient, open_local_client
from fedpdm.data import normalize
from fedpdm.privacy.mechanism import clip_l2
from fedpdm.storage.files import read_tensors

WINDOW = 64
STRIDE = 4096  # of windows into weights, besides each tensor's first


def windows(data: bytes, *, stride: int = WINDOW) -> Iterator[bytes]:
    """A piece of 64 bytes from each `stride` that cannot be there by chance.

    Zeros, ones and black prove nothing; such a stretch is left out.
    """
    for start in range(0, len(data) - WINDOW + 1, stride):
        for shift in range(min(WINDOW, len(data) - WINDOW + 1 - start)):
            piece = data[start + shift : start + shift + WINDOW]
            if len(set(piece[:8])) >= 3 and len(set(piece)) > 8:
                yield piece
                break


def image_forms(images: np.ndarray, *, shift: float, clip_norm: float) -> Iterator[np.ndarray]:
    """uint8 (N, C, H, W) as it is, channels last, and in the scales of models, in three floats."""
    pixels = torch.from_numpy(images.copy())
    yield images
    yield np.ascontiguousarray(images.transpose(0, 2, 3, 1))
    scaled = normalize(pixels, shift=shift)
    clipped = clip_l2(scaled, clip_norm=clip_norm)
    for form in (scaled, clipped, pixels / 255.0, normalize(pixels, shift=0.0)):
        for dtype in (np.float16, np.float32, np.float64):
            yield form.numpy().astype(dtype)


def weights(tensors: Mapping[str, torch.Tensor]) -> Iterator[bytes]:
    """Pieces of every tensor of 16 values or more, in single and half precision."""
    for tensor in tensors.values():
        if tensor.numel() >= 16:
            values = tensor.numpy()
            yield from windows(values.tobytes(), stride=STRIDE)
            yield from windows(values.astype(np.float16).tobytes(), stride=STRIDE)


def private_things(node: Mapping[str, Any], run_config: Mapping[str, Any]) -> dict[str, set[bytes]]:
    """What a client has after a run, by kind."""
    local = open_local_client(dict(node), dict(run_config), 0)
    images = local.held.images.images
    held = local.held.images
    digests = (*held.image_digests(), *held.image_identities())
    things: dict[str, set[bytes]] = {"images": set(), "fine model": set(), "samples": set()}
    for form in image_forms(images, shift=local.setup.spec.shift, clip_norm=8.0):
        things["images"] |= {piece for image in form for piece in windows(image.tobytes())}
    things["digests"] = {form for row in digests for form in _texts(row.tobytes())}
    for round in (1, 2):
        things["fine model"] |= set(weights(local.store.load_state(round, "fine")))
    samples = local.store.load_samples() or {}
    for array in (array for name, array in samples.items() if name != "labels"):
        things["samples"] |= set(windows(array.tobytes()))
    ledger = local.releases.ledger()
    lines = ledger.text().encode().splitlines()
    things["ledger"] = {*lines, *(record.chain.encode() for record in ledger.records)}
    things["ledger"] |= {record.sha256.encode() for record in ledger.releases()}
    places = [local.store.root, *(Path(v) for k, v in node.items() if k.endswith("-dir"))]
    names = [path.name for place in places for path in place.rglob("*.png")]
    things["paths"] = {text.encode() for text in (*map(str, places), *names)}
    return things


def _texts(digest: bytes) -> Iterator[bytes]:
    yield digest
    yield digest.hex().encode()
    yield base64.b64encode(digest)


def release_rows(local: LocalClient, rows: np.ndarray) -> set[bytes]:
    """Pieces of some rows of a client's one release."""
    (record,) = local.releases.ledger().releases()
    x_tilde = read_tensors(local.releases.root / "releases" / record.file)[0]["x_tilde"].numpy()
    return {piece for row in x_tilde[rows] for piece in windows(row.tobytes())}


class Search:
    """Finds any of many pieces at any position of a message."""

    def __init__(self, things: Mapping[str, Iterable[bytes]]) -> None:
        self._pieces: dict[int, list[tuple[str, bytes]]] = {}
        for kind, pieces in things.items():
            for piece in pieces:
                key = int.from_bytes(piece[:8], "little")
                assert len(piece) >= 8, piece
                self._pieces.setdefault(key, []).append((kind, piece))
        self._keys = np.array(sorted(self._pieces), dtype=np.uint64)

    def found(self, data: bytes) -> set[str]:
        """The kinds of things of which a piece is in `data`."""
        kinds: set[str] = set()
        for offset in range(min(8, max(0, len(data) - 7))):
            words = np.frombuffer(data, "<u8", count=(len(data) - offset) // 8, offset=offset)
            at = np.searchsorted(self._keys, words).clip(max=len(self._keys) - 1)
            for index in np.flatnonzero(self._keys[at] == words):
                start = offset + 8 * int(index)
                for kind, piece in self._pieces[int(words[index])]:
                    if data.startswith(piece, start):
                        kinds.add(kind)
        return kinds
