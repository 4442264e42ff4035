"""What travels: named tensors in, named tensors out, and nothing else.

Flower's NumPyClient moves a list of arrays. Every message here is one uint8 array that holds a
safetensors file: names, shapes and dtypes travel with the values, and a header says what kind of
message it is. Only three kinds can be encoded: the coarse model (server to client), a
`CoarseUpdate` and a `Release` (client to server); metrics pass `metrics.check_metrics`, a fixed
list of scalars. Anything else raises `WireError`.

Numbers are float32, or fewer bits (`fedpdm.wire.quantize`); a header says which. Weights in fewer
bits are sent as their difference from the weights that the client received.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import torch

from fedpdm.privacy.mechanism import (
    IMAGES,
    mechanism_named,
    release_metadata,
    restore_release,
)
from fedpdm.privacy.types import Release
from fedpdm.storage.tensorfile import TensorFileError, pack, unpack
from fedpdm.wire.quantize import dequantize, quantize
from fedpdm.wire.types import CoarseUpdate, WireError

__all__ = [
    "LARGEST_WEIGHT",
    "Message",
    "decode_model",
    "decode_release",
    "decode_update",
    "encode_model",
    "encode_nothing",
    "encode_release",
    "encode_update",
    "fingerprint",
    "message_bytes",
]

VERSION = "1"
Message = list[np.ndarray]

WHOLE = (torch.int32, torch.int64)  # sent as they are, whatever the encoding

# Weights of a network that works are far from it; sums of such numbers stay finite in float32.
LARGEST_WEIGHT = 1e6


def _pack(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Message:
    payload = pack(tensors, {"version": VERSION, **metadata})
    return [np.frombuffer(payload, dtype=np.uint8)]


def _unpack(
    message: Message, kind: str, who: str, *, shared: bool = False
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    if len(message) != 1 or message[0].dtype != np.uint8 or message[0].ndim != 1:
        raise WireError(f"expected one uint8 array from {who}, got {len(message)} arrays")
    try:
        tensors, metadata = unpack(message[0], shared=shared)
    except TensorFileError as error:
        raise WireError(f"malformed message from {who}: {error}") from None
    if metadata.get("version") != VERSION or metadata.get("kind") != kind:
        raise WireError(
            f"expected a {kind} message (version {VERSION}) from {who}, got "
            f"{metadata.get('kind')!r} (version {metadata.get('version')!r})"
        )
    return tensors, metadata


def fingerprint(message: Message) -> str:
    """SHA-256 of a message's payload, hexadecimal."""
    digest = hashlib.sha256()
    for array in message:
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def message_bytes(message: Message) -> int:
    """Payload bytes of a message."""
    return sum(array.nbytes for array in message)


def encode_nothing() -> Message:
    """The empty message: a client that has nothing to send."""
    return []


def encode_model(weights: Mapping[str, torch.Tensor], *, encoding: str = "float32") -> Message:
    """Server to client: the coarse model's weights by name, rounded to nearest."""
    return _pack(
        quantize(weights, encoding=encoding), {"kind": "coarse-model", "encoding": encoding}
    )


def decode_model(message: Message, *, who: str = "the server") -> dict[str, torch.Tensor]:
    """Inverse of `encode_model`; names and shapes are checked where the weights are loaded.

    `WireError` for values that are not finite or beyond `LARGEST_WEIGHT`.
    """
    tensors, metadata = _unpack(message, "coarse-model", who)
    what = f"coarse model from {who}"
    tensors = _decoded(tensors, metadata, what)
    _check_values(tensors, what)
    return tensors


def _decoded(
    tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str], what: str
) -> dict[str, torch.Tensor]:
    try:
        return dequantize(tensors, encoding=metadata.get("encoding", "float32"))
    except ValueError as error:
        raise WireError(f"{what}: {error}") from None


def encode_update(
    update: CoarseUpdate,
    *,
    encoding: str = "float32",
    base: Mapping[str, torch.Tensor] | None = None,
    generator: torch.Generator | None = None,
    simulation: bool = False,
) -> Message:
    """Client to server: coarse weights that came from a release. `WireError` for anything else.

    In `simulation`, where one party holds all images, baselines may send weights that did not.

    With fewer bits than float32 the difference from `base`, the weights that the client received,
    is sent, rounded stochastically from `generator`.
    """
    if not isinstance(update, CoarseUpdate):
        raise WireError(f"only a CoarseUpdate may leave here, got {type(update).__name__}")
    if update.basis != "released" and not simulation:
        raise WireError(f"an update from {update.basis} images may not leave outside simulation")
    values: Mapping[str, torch.Tensor] = update.weights
    if encoding != "float32":
        if base is None:
            raise WireError(f"an update in {encoding} needs the weights that it started from")
        change = {name: tensor.cpu() - base[name].cpu() for name, tensor in values.items()}
        values = quantize(change, encoding=encoding, generator=generator)
    return _pack(
        values,
        {
            "kind": "coarse-update",
            "encoding": encoding,
            "num_examples": str(update.num_examples),
            "client_id": str(update.client_id),
            "round": str(update.round),
            "seeded": str(update.seeded).lower(),
            "basis": update.basis,
        },
    )


def decode_update(
    message: Message,
    *,
    like: Mapping[str, torch.Tensor],
    round: int,
    who: str,
    encoding: str = "float32",
    basis: str = "released",
) -> CoarseUpdate:
    """A client's update, checked against the coarse model `like`, from which differences count.

    Its float32 weights lie in the message's memory and must not be written to.

    `WireError` naming `who` for wrong names, shapes, dtypes, round, basis, or values that are not
    finite or beyond `LARGEST_WEIGHT`.
    """
    tensors, metadata = _unpack(message, "coarse-update", who, shared=True)
    if (sent := metadata.get("encoding", "float32")) != encoding:
        raise WireError(f"update of {who}: encoding must be {encoding}, got {sent!r}")
    tensors = _decoded(tensors, metadata, f"update of {who}")
    if missing := like.keys() - tensors.keys():
        raise WireError(f"update of {who}: missing {sorted(missing)[0]}")
    if unexpected := tensors.keys() - like.keys():
        raise WireError(f"update of {who}: unexpected {sorted(unexpected)[0]}")
    for name, reference in like.items():
        value = tensors[name]
        if value.shape != reference.shape or value.dtype != reference.dtype:
            raise WireError(
                f"update of {who}: {name} must be {reference.dtype} {tuple(reference.shape)}, "
                f"got {value.dtype} {tuple(value.shape)}"
            )
    _check_values(tensors, f"update of {who}")
    if encoding != "float32":
        tensors = {name: tensor.add_(like[name]) for name, tensor in tensors.items()}
    try:
        update = CoarseUpdate(
            weights=tensors,
            num_examples=int(metadata["num_examples"]),
            client_id=int(metadata["client_id"]),
            round=int(metadata["round"]),
            seeded={"true": True, "false": False}[metadata["seeded"]],
            basis=metadata["basis"],
        )
    except (KeyError, ValueError) as error:
        raise WireError(f"update of {who}: malformed header: {error}") from None
    if update.num_examples < 1:
        raise WireError(f"update of {who}: num_examples must be at least 1")
    if update.basis != basis:
        raise WireError(f"update of {who}: made from {update.basis} images, expected {basis}")
    if update.round != round:
        raise WireError(f"update of {who}: made for round {update.round}, expected {round}")
    return update


def _check_values(tensors: Mapping[str, torch.Tensor], what: str) -> None:
    """`WireError` for values that are not finite or beyond `LARGEST_WEIGHT`."""
    floats = {n: t for n, t in tensors.items() if t.is_floating_point() and t.numel()}
    if not floats:
        return
    largest = torch._foreach_norm(list(floats.values()), math.inf)  # one pass: NaN stays NaN
    norms = dict(zip(floats, torch.stack(largest).tolist(), strict=True))
    if bad := [name for name, norm in norms.items() if not math.isfinite(norm)]:
        raise WireError(f"{what}: {min(bad)} has values that are not finite")
    if huge := [name for name, norm in norms.items() if norm > LARGEST_WEIGHT]:
        raise WireError(f"{what}: {min(huge)} has values beyond {LARGEST_WEIGHT:g}")


def encode_release(released: Release, *, client_id: int, encoding: str = "float32") -> Message:
    """Client to server: a stored release. `WireError` for anything else.

    Fewer bits than float32 round what was released, row by row; whole numbers are sent as they are.
    """
    if not isinstance(released, Release):
        raise WireError(f"only a Release may leave here, got {type(released).__name__}")
    tensors = released.tensors()
    floats = {name: value for name, value in tensors.items() if value.is_floating_point()}
    whole = {name: value for name, value in tensors.items() if name not in floats}
    return _pack(
        {**quantize(floats, encoding=encoding), **whole},
        {
            "kind": "release",
            "encoding": encoding,
            "client_id": str(client_id),
            **release_metadata(
                released.parameters,
                released.event,
                noise_source=released.noise_source,
                seeded=released.seeded,
            ),
        },
    )


def decode_release(
    message: Message, *, who: str, client_id: int | None = None, mechanism: str = IMAGES
) -> Release:
    """A client's release by this `mechanism`, as `privacy.release` names it.

    `WireError` if it is another's (any client's is taken if `client_id` is None), malformed, or
    contradicts itself.
    """
    tensors, metadata = _unpack(message, "release", who)
    if client_id is not None and metadata.get("client_id") != str(client_id):
        raise WireError(f"release of {who}: header says client {metadata.get('client_id')}")
    expected = mechanism_named(mechanism)
    wanted, got = expected.parameters.mechanism, metadata.get("mechanism", IMAGES)
    if got != wanted:
        raise WireError(f"release of {who}: made by mechanism {got!r}, expected {wanted}")
    whole = {name: value for name, value in tensors.items() if value.dtype in WHOLE}
    rest = {name: value for name, value in tensors.items() if name not in whole}
    tensors = {**_decoded(rest, metadata, f"release of {who}"), **whole}
    if tensors.keys() != set(expected.names):
        raise WireError(
            f"release of {who}: expected {' and '.join(expected.names)}, got {sorted(tensors)}"
        )
    try:
        return restore_release(tensors, metadata)
    except ValueError as error:
        raise WireError(f"release of {who}: {error}") from None
