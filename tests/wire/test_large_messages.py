"""Messages larger than a transport takes at once: Flower cuts them, and both ends stay small."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import InflatableObject, get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.task_identity import TaskIdentity

from fedpdm import wire
from fedpdm.diffusion.schedule import make_schedule
from fedpdm.privacy.mechanism import SeededNoise, release
from fedpdm.wire.types import CoarseUpdate

PIECE = 5 << 20  # bytes: Flower's limit for a part of an array
SLACK = 1 << 10


def pieces(content: RecordDict) -> dict[str, bytes]:
    """What Flower pushes for a message, by object id."""
    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 0
    message: InflatableObject = Message(content, dst_node_id=1, message_type="train")
    return {key: part.deflate() for key, part in get_all_nested_objects(message).items()}


def arrived(parts: dict[str, bytes], content: RecordDict) -> RecordDict:
    back = inflate_object_from_contents(content.object_id, parts)
    assert isinstance(back, RecordDict)
    return back


def test_a_large_release_travels_in_pieces() -> None:
    """Server-trained mode: 14 MB of release, no piece beyond 5 MiB, the same bytes at the end."""
    images = torch.rand(1200, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    released = release(
        images,
        torch.zeros(1200, dtype=torch.int64),
        schedule=make_schedule("linear"),
        t0=600,
        clip_norm=5.0,
        shift=0.0,
        noise=SeededNoise(np.random.SeedSequence(0)),
    )
    message = wire.encode_release(released, client_id=3)
    assert wire.message_bytes(message) > 2 * PIECE
    content = RecordDict({"fitres.parameters": ArrayRecord(message)})
    parts = pieces(content)
    assert max(len(part) for part in parts.values()) <= PIECE + SLACK
    assert sum(len(part) for part in parts.values()) < wire.message_bytes(message) + (1 << 16)
    record = arrived(parts, content).array_records["fitres.parameters"]
    got = wire.decode_release([a.numpy() for a in record.values()], who="client 3", client_id=3)
    assert torch.equal(got.x_tilde, released.x_tilde)


def test_masked_updates_travel_in_one_piece() -> None:
    """What docs/aggregation.md warns of: Flower's SecAgg+ puts them where it does not cut."""
    content = RecordDict({"masks": ConfigRecord({"masked_params": [bytes(PIECE), bytes(PIECE)]})})
    assert max(len(part) for part in pieces(content).values()) > 2 * PIECE


@pytest.mark.parametrize("encoding", ["float32", "bfloat16", "int8"])
def test_fewer_bits_take_fewer_bytes(encoding: str) -> None:
    generator = torch.Generator().manual_seed(0)
    base = {f"layer{k}.weight": torch.randn(64, 64, 3, 3, generator=generator) for k in range(8)}
    weights = {name: tensor + 0.01 for name, tensor in base.items()}
    update = CoarseUpdate(
        weights=weights, num_examples=5, client_id=3, round=1, seeded=False, basis="released"
    )
    message = wire.encode_update(update, encoding=encoding, base=base, generator=generator)
    size = sum(tensor.nbytes for tensor in weights.values())
    factor = {"float32": 1, "bfloat16": 2, "int8": 4}[encoding]
    assert wire.message_bytes(message) == pytest.approx(size / factor, rel=0.02)
