"""Clients' answers: decoded, checked, averaged, and shown as a line."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flwr.common import EvaluateRes, NDArrays, Parameters, Scalar

from fedpdm import wire
from fedpdm.reporting.shared_words import shared_words
from fedpdm.text import line

__all__ = [
    "ClientAnswer",
    "accepted_metrics",
    "check_count",
    "check_evaluation",
    "check_size",
    "decode_arrays",
    "describe_failures",
    "encode_arrays",
    "heldout_metrics",
    "mean_metrics",
    "round_line",
]


_MAGIC = b"\x93NUMPY\x01\x00"  # version 1.0 (numpy.lib.format)
_HEADER = re.compile(
    rb"\{'descr': '(?P<descr>\|[bui]1|<[uif][248])', 'fortran_order': False, "
    rb"'shape': \((?P<shape>|\d{1,18},|\d{1,18}(?:, \d{1,18}){1,7})\), \} *\n"
)
LARGEST_METRIC = 1e12  # a loss or count of a training that works is far from it
HEADER_BYTES = 1 << 16  # of a message, besides its values


@dataclass(frozen=True, kw_only=True)
class ClientAnswer:
    """One client's answer to a fit request, without the message that came with it."""

    client_id: int
    num_examples: int
    metrics: Mapping[str, Scalar]


def accepted_metrics(
    metrics: Mapping[str, Scalar], *, client_id: int, announce: Callable[[str], None]
) -> dict[str, Any]:
    """A client's metrics; `wire.WireError` for its own error, or for what it may not send.

    A number beyond `LARGEST_METRIC`, whose mean could not be written, is left out and announced.
    """
    if error := metrics.get("error"):
        raise wire.WireError(str(error))
    checked = wire.check_metrics(metrics, allow_raw=True, who=f"client {client_id}")
    if (named := checked.get("client_id", client_id)) != client_id:
        raise wire.WireError(f"its metrics say client {named}")
    for name, value in list(checked.items()):
        if not isinstance(value, str) and abs(value) > LARGEST_METRIC:
            del checked[name]
            announce(f"client {client_id}: {name} {value:g} is beyond {LARGEST_METRIC:g}, left out")
    return checked


def check_count(num_examples: int, *, most: int | None) -> None:
    """`wire.WireError` for more images than a client may have: they would weigh too much."""
    if most is not None and num_examples > most:
        raise wire.WireError(
            f"num_examples must be at most aggregation.max_examples = {most}, got {num_examples}"
        )


def check_evaluation(result: EvaluateRes, *, client_id: int, most: int | None) -> None:
    """`wire.WireError` for a held-out loss that would not count, or for too much."""
    check_count(result.num_examples, most=most)
    if result.num_examples < 1:
        raise wire.WireError(f"num_examples must be at least 1, got {result.num_examples}")
    if not abs(result.loss) <= LARGEST_METRIC:  # NaN is not
        raise wire.WireError(
            f"held-out loss of client {client_id} must be at most {LARGEST_METRIC:g}, "
            f"got {result.loss:g}"
        )


def check_size(size: int, *, most: int) -> None:
    """`wire.WireError` for a message larger than what was asked for, before it is decoded."""
    if size > most + HEADER_BYTES:
        raise wire.WireError(
            f"its message has {size} bytes, where at most {most + HEADER_BYTES} can be right"
        )


def decode_arrays(parameters: Parameters) -> NDArrays:
    """Flower's arrays from a message; `wire.WireError` for bytes that are none."""
    return [_decode_array(tensor) for tensor in parameters.tensors]


def _decode_array(tensor: bytes) -> np.ndarray:
    """As `np.load`, for version 1.0, but read-only and in the memory of `tensor`.

    The header is matched, never evaluated: numpy's own reader hands it to Python's parser, which
    raises whatever it likes for hostile text.
    """
    if tensor[:8] != _MAGIC:
        raise wire.WireError("message is not an array: wrong magic string or version")
    values = 10 + int.from_bytes(tensor[8:10], "little")
    header = _HEADER.fullmatch(tensor[10:values])
    if header is None:
        raise wire.WireError("message is not an array: its header is malformed")
    dtype = np.dtype(header["descr"].decode())
    shape = tuple(int(size) for size in header["shape"].split(b",") if size.strip())
    size = math.prod(shape) * dtype.itemsize
    if size != len(tensor) - values:
        raise wire.WireError(
            f"message is not an array: {len(tensor) - values} bytes of values, its header says "
            f"{size}"
        )
    return np.frombuffer(tensor, dtype=dtype, offset=values).reshape(shape)


def encode_arrays(arrays: NDArrays) -> Parameters:
    """Inverse of `decode_arrays`: Flower's message, with one copy of the values."""
    tensors = []
    for array in arrays:
        stream = io.BytesIO()
        np.lib.format.write_array_header_1_0(
            stream, np.lib.format.header_data_from_array_1_0(array)
        )
        tensors.append(b"".join((stream.getvalue(), np.ascontiguousarray(array).data)))
    return Parameters(tensors=tensors, tensor_type="numpy.ndarray")


def describe_failures(
    results: Sequence[Any],
    failures: Sequence[Any],
    *,
    ids: Mapping[str, int],
    asked: Collection[int],
) -> list[str]:
    """One line per failure of a round.

    `results` and `failures` are Flower's, `ids` maps its node names to client ids. Its exceptions
    do not say whose they are: of the clients `asked`, those that have not answered are named.
    """
    lines = []
    answered = {ids.get(proxy.cid, -1) for proxy, _ in results}
    errors = [failure for failure in failures if isinstance(failure, BaseException)]
    for proxy, result in (f for f in failures if not isinstance(f, BaseException)):
        client_id = ids.get(proxy.cid, -1)
        answered.add(client_id)
        lines.append(line(f"client {client_id}: {result.status.message}"))
    silent = " or ".join(f"client {k}" for k in sorted(set(asked) - answered))
    for error in errors:
        why = line(error) or type(error).__name__
        lines.append(f"{silent}: {why}" if silent else why)
    return lines


def heldout_metrics(
    evaluations: Sequence[tuple[EvaluateRes, Mapping[str, Scalar]]],
) -> dict[str, float]:
    """Held-out losses averaged over clients, weighted by examples, and what the model knows over
    those that say it."""
    means = {"heldout_coarse_loss": _mean([(r.num_examples, r.loss) for r, _ in evaluations])}
    name = "heldout_coarse_known"
    if known := [(r.num_examples, float(m[name])) for r, m in evaluations if name in m]:
        means[name] = _mean(known)
    return means


def _mean(weighted: Sequence[tuple[int, float]]) -> float:
    counts, values = np.array(weighted, dtype=np.float64).T
    return float((counts * values).sum() / counts.sum())


def mean_metrics(answers: Sequence[ClientAnswer], *, seconds: float) -> dict[str, float]:
    """Losses and knowledge as means over the clients that say them (weighted by examples), images
    per second in all."""
    means = {}
    for name in ("coarse_loss", "coarse_known", "fine_loss"):
        values = [a for a in answers if name in a.metrics]
        if values:
            weighted = sum(float(a.metrics[name]) * a.num_examples for a in values)
            means[name] = weighted / max(1, sum(a.num_examples for a in values))
    images = sum(
        int(a.metrics.get(name, 0)) for a in answers for name in ("coarse_images", "fine_images")
    )
    means["images_per_second"] = images / seconds if seconds > 0 else 0.0
    return means


def round_line(record: Mapping[str, Any], *, rounds: int, seconds_left: float) -> str:
    """A round's record as the one line that is shown."""
    parts = [f"round {record['round']}/{rounds}"]
    parts += shared_words(record)
    if record.get("warmup_loss") is not None:
        parts.append(f"warm-up loss {record['warmup_loss']:.4f}")
    if record.get("gradient_norm") is not None:
        noise = record["gradient_noise"]
        parts.append(f"mean gradient {record['gradient_norm']:.3g}, noise alone {noise:.3g}")
    if record.get("fine_loss") is not None:
        parts.append(f"fine loss {record['fine_loss']:.4f}")
    parts.append(f"{record['images_per_second']:.0f} images/s")
    parts.append(f"{record['bytes_down'] / 1e6:.1f} MB down, {record['bytes_up'] / 1e6:.1f} MB up")
    parts.append(f"{seconds_left:.0f} s left")
    return "  ".join(parts)
