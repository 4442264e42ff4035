"""A large model's messages: bytes, and the memory of making and reading them.

The `paper` U-Net (35.7 M parameters, 143 MB of float32). Each part is measured in its own
process, so that peaks do not mix.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

__all__ = ["large_model", "secure_aggregation"]

PARTS = ("encode", "decode", "chunks")


def large_model() -> dict[str, Any]:
    """Bytes of a coarse update in float32 over those in bfloat16, and peaks in model copies.

    `encode` is what a client adds to make its message, `decode` what a server adds to read it and
    to take it into a running mean; one copy of the model, in float32, is 1. `largest_part` is the
    largest piece in which Flower would push the message: it cuts arrays, so that no message comes
    near gRPC's limit of 2 GiB.
    """
    measured: dict[str, Any] = {}
    for encoding in ("float32", "bfloat16"):
        with tempfile.TemporaryDirectory() as folder:
            for part in PARTS:
                done = subprocess.run(
                    [sys.executable, "-m", "bench.large", part, encoding, folder],
                    capture_output=True,
                    text=True,
                    check=True,
                )
                measured[f"{part} {encoding}"] = json.loads(done.stdout.splitlines()[-1])
    plain, half = measured["encode float32"], measured["encode bfloat16"]
    return {"ratio": plain["bytes"] / half["bytes"], **measured}


def _measure(part: str, encoding: str, folder: Path) -> dict[str, Any]:
    import numpy as np
    import torch

    from bench.memory import forget_peak, resident
    from fedpdm import wire
    from fedpdm.config import config_from_mapping
    from fedpdm.setup.build import build_denoiser
    from fedpdm.setup.run_setup import set_up
    from fedpdm.wire.types import CoarseUpdate
    from strategies.averaging import OrderedMean

    config = config_from_mapping(
        {"name": "large", "data": {"name": "cifar10"}, "coarse": {"preset": "paper"}}
    )
    model = build_denoiser(set_up(config), "coarse")
    weights = {name: p.detach() for name, p in model.network.named_parameters()}
    size = sum(tensor.nbytes for tensor in weights.values())
    path = folder / f"{encoding}.bin"
    message, update = [np.zeros(0, np.uint8)], None
    if part == "encode":
        after = {name: tensor + 0.01 for name, tensor in weights.items()}
        update = CoarseUpdate(
            weights=after, num_examples=10, client_id=0, round=1, seeded=False, basis="released"
        )
    else:
        message = [np.fromfile(path, dtype=np.uint8)]
    mean = OrderedMean([0], keep=lambda *_: None, recall=lambda _: {})
    before = resident()
    forget_peak()
    started = time.perf_counter()
    largest = 0
    if update is not None:
        message = wire.encode_update(
            update, encoding=encoding, base=weights, generator=torch.Generator().manual_seed(0)
        )
    elif part == "decode":
        got = wire.decode_update(message, like=weights, round=1, who="client 0", encoding=encoding)
        mean.add(0, dict(got.weights), num_examples=got.num_examples)
        mean.finish()
    else:
        from flwr.app import ArrayRecord, RecordDict
        from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects

        content = RecordDict({"fitres.parameters": ArrayRecord(message)})
        pieces = get_all_nested_objects(content).values()
        largest = max(len(piece.deflate()) for piece in pieces)
    seconds = time.perf_counter() - started
    added = (resident("VmHWM") - before) / size
    if part == "encode":
        message[0].tofile(path)
    result = {
        "bytes": wire.message_bytes(message), "peak_copies": added, "seconds": seconds,
        "model_mb": size / 1e6,
    }  # fmt: skip
    return {**result, "largest_part": largest} if part == "chunks" else result


def secure_aggregation() -> dict[str, Any]:
    """Bytes that clients send in a secure round over those of a plain one, and its time.

    Four clients, `tiny` U-Net, in process, three rounds: the wall time of a round without its
    gradient steps, of which there are none.
    """
    import contextlib
    import io

    from fedpdm.config import config_from_mapping
    from fedpdm.engines.inprocess import run_in_process

    found: dict[str, Any] = {}
    for name in ("plain", "secure"):
        steps = {"preset": "tiny", "steps_per_round": 0}
        config = config_from_mapping(
            {
                "name": name,
                "run": {"rounds": 3, "device": "cpu"},
                "data": {"name": "digits"},
                "partition": {"kind": "iid", "num_clients": 4},
                "privacy": {"epsilon": 10, "clip_norm": 8},
                "coarse": steps,
                "fine": steps,
                "aggregation": {"secure": name == "secure", "max_examples": 1000},
                "evaluation": {"every": 3, "image_metrics": False},
                "sampling": {"num_steps": 2, "per_class": 1},
            }
        )
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            run_in_process(config, Path(folder) / "run")
            rounds = json.loads((Path(folder) / "run" / "metrics.json").read_text())["rounds"]
        found[name] = {
            "bytes_up": rounds[1]["bytes_up"],
            "bytes_down": rounds[1]["bytes_down"],
            "seconds": rounds[1]["seconds"],  # neither start-up nor evaluation
        }
    ratio = found["secure"]["bytes_up"] / found["plain"]["bytes_up"]
    slower = found["secure"]["seconds"] / found["plain"]["seconds"]
    return {"ratio": ratio, "seconds_ratio": slower, **found}


if __name__ == "__main__":
    print(json.dumps(_measure(sys.argv[1], sys.argv[2], Path(sys.argv[3]))))
