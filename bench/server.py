"""The server's memory while 128 clients answer."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["server_memory"]


def server_memory() -> dict[str, Any]:
    """Peak memory that a server adds in copies of its model: 128 clients, the `paper` U-Net.

    One round, and the request of the next. The model is large, so that the process's other
    allocations hardly count.

    Clients are answered for by the shortest code that makes a message as a transport would: one
    `bytes`, which is the server's to let go.
    """
    from flwr.common import Code, FitIns, FitRes, GetPropertiesRes, Parameters, Status
    from flwr.server import SimpleClientManager
    from flwr.server.client_proxy import ClientProxy

    from bench.memory import forget_peak, resident
    from fedpdm.config import AggregationConfig, config_from_mapping
    from fedpdm.setup.build import build_denoiser
    from fedpdm.setup.run_setup import set_up
    from fedpdm.storage.run_directory import RunDirectory
    from strategies.fedavg import CoarseFedAvg
    from strategies.roster import ServerSettings
    from strategies.streaming import StreamingServer

    clients = 128
    config = config_from_mapping(
        {"name": "server", "data": {"name": "cifar10"}, "coarse": {"preset": "paper"}}
    )

    class Client(ClientProxy):
        """Sends back the weights that it was sent."""

        def __init__(self, number: int) -> None:
            super().__init__(f"node{number}")
            self.number = number

        def get_properties(self, *_: Any, **__: Any) -> Any:
            return GetPropertiesRes(Status(Code.OK, ""), {"client_id": self.number})

        def fit(self, ins: FitIns, *_: Any, **__: Any) -> Any:
            sent = memoryview(ins.parameters.tensors[0])
            start = 10 + int.from_bytes(sent[8:10], "little")  # of the array in its .npy frame
            values = start + 8 + int.from_bytes(sent[start : start + 8], "little")
            header = json.loads(bytes(sent[start + 8 : values]))
            entry = {
                "kind": "coarse-update", "version": "1", "num_examples": "10", "seeded": "false",
                "client_id": str(self.number), "round": str(ins.config["round"]),
                "basis": "released",
            }  # fmt: skip
            header["__metadata__"] = {"fedpdm": json.dumps(entry)}
            text = json.dumps(header).encode()
            text += b" " * (-len(text) % 8)
            total = 8 + len(text) + len(sent) - values
            frame = np.lib.format.header_data_from_array_1_0(np.empty(0, np.uint8))
            shape = repr({**frame, "shape": (total,)}).encode()
            shape += b" " * (-(11 + len(shape)) % 64) + b"\n"
            message = b"".join((
                b"\x93NUMPY\x01\x00", len(shape).to_bytes(2, "little"), shape,
                len(text).to_bytes(8, "little"), text, sent[values:],
            ))  # fmt: skip
            parameters = Parameters(tensors=[message], tensor_type="numpy.ndarray")
            metrics: dict[str, Any] = {"client_id": self.number}
            return FitRes(Status(Code.OK, ""), parameters, 10, metrics)

        get_parameters = evaluate = reconnect = get_properties

    manager = SimpleClientManager()
    for number in range(clients):
        manager.register(Client(number))
    model = build_denoiser(set_up(config), "coarse")
    weights = {name: p.detach() for name, p in model.network.named_parameters()}
    size = sum(tensor.nbytes for tensor in weights.values())
    with tempfile.TemporaryDirectory() as folder:
        before = resident()
        strategy = CoarseFedAvg(
            aggregation=AggregationConfig(),
            settings=ServerSettings(
                rounds=3, min_clients=clients, fraction_fit=1.0, on_failure="raise",
                evaluate_every=3, ema_decay=0.5, seed=0,
            ),
            weights=weights,
            run=RunDirectory(Path(folder)),
            announce=lambda _: None,
            finish=lambda *_: None,
        )  # fmt: skip
        server = StreamingServer(client_manager=manager, strategy=strategy)
        server.set_max_workers(1)
        forget_peak()
        strategy.initialize_parameters(manager)
        server.fit_round(1, None)
        strategy.configure_fit(2, server.parameters, manager)
        peak = resident("VmHWM")
    return {"ratio": (peak - before) / size, "model_mb": size / 1e6}
