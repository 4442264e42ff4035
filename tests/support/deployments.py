"""Federations whose every message is kept as the bytes that Flower sends.

Server loop, client proxies, client app and serialisation are Flower's own; only the network is
missing. A node is what its node config says: part of a simulation, or a client with its own disk.
"""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from flwr.app import Context, Error, Message, RecordDict
from flwr.common import (
    EvaluateIns,
    FitIns,
    GetParametersIns,
    GetPropertiesIns,
    ndarrays_to_parameters,
)
from flwr.common.constant import ErrorCode
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.compat.common import recorddict_compat as compat
from flwr.proto.message_pb2 import Message as ProtoMessage
from flwr.server.compat.grid_client_proxy import GridClientProxy
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.task_identity import TaskIdentity
from PIL import Image

from clients.client_app import app
from clients.local import open_local_client
from fedpdm import wire
from fedpdm.config import RunConfig
from fedpdm.privacy.ledger import append, read_ledger
from fedpdm.setup.flower_config import run_config_of
from fedpdm.storage.files import read_tensors, write_tensors
from strategies.server_app import server_fn
from tests.support.federations import flat, initial_message, small_config

CLASSES = ("benign", "malignant")
MARKS = "ledger"  # random numbers, one for each record of a ledger


@dataclass(frozen=True, kw_only=True)
class Sent:
    """One answer of a client: Flower's protobuf, the objects that it is pushed as, the message."""

    client: int
    kind: str
    request: Message
    reply: Message
    data: bytes
    objects: bytes

    @property
    def metrics(self) -> dict[str, Any]:
        """What it says besides arrays and status, whatever the kind of message."""
        records = self.reply.content.config_records
        return {k: v for n, r in records.items() if not n.endswith(".status") for k, v in r.items()}

    @property
    def payload(self) -> list[np.ndarray]:
        """The arrays that it carries: Flower moves them as `.npy` files of bytes."""
        records = self.reply.content.array_records.values()
        files = [array.data for record in records for array in record.values() if array.data]
        return [np.load(io.BytesIO(data)) for data in files]

    def timeless(self) -> bytes:
        """The content as bytes, with times set to zero and without the ledger's random marks."""
        copy = ProtoMessage.FromString(self.data)
        timed = message_from_proto(copy)
        for record in timed.content.config_records.values():
            record.update({name: 0.0 for name in wire.CLOCKS if name in record})
            record.update({MARKS: ""} if MARKS in record else {})
        return message_to_proto(timed).content.SerializeToString(deterministic=True)


@dataclass
class Federation:
    """Nodes by client id: their node configs, the run config that all get, and what they sent."""

    nodes: Mapping[int, dict[str, Any]]
    run_config: dict[str, Any]
    sent: list[Sent] = field(default_factory=list)

    def send_and_receive(self, messages: Iterable[Message], **_: Any) -> list[Message]:
        """Flower's `Grid`, as far as a client proxy uses it."""
        return [self._answer(message) for message in messages]

    def ask(
        self,
        client: int,
        kind: str,
        config: Mapping[str, Any] | None = None,
        *,
        weights: wire.Message | None = None,
    ) -> Sent:
        """What a client answers to a message that some server made up, with the first weights or
        these."""
        first = weights or initial_message(run_config_of(self.run_config))
        model = ndarrays_to_parameters(first)
        given: Any = dict(config or {})
        content = {
            "train": lambda: compat.fitins_to_recorddict(FitIns(model, given), keep_input=True),
            "evaluate": lambda: compat.evaluateins_to_recorddict(EvaluateIns(model, given), True),
            "get_properties": lambda: compat.getpropertiesins_to_recorddict(
                GetPropertiesIns(given)
            ),
            "get_parameters": lambda: compat.getparametersins_to_recorddict(
                GetParametersIns(given)
            ),
        }.get(kind, RecordDict)()
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 0
        self._answer(Message(content, dst_node_id=client + 1, message_type=kind))
        return self.sent[-1]

    def run(self, rounds: int | None = None) -> None:
        """The server of this run config with these nodes, to the end or for some rounds."""
        TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 0
        components = server_fn(self._context(0, {}))
        server = components.server
        for client in self.nodes:
            proxy = GridClientProxy(node_id=client + 1, grid=self, run_id=0)  # type: ignore
            server.client_manager().register(proxy)
        server.set_max_workers(1)
        logging.getLogger("flwr").setLevel(logging.WARNING)
        server.fit(rounds or components.config.num_rounds, None)

    def of(self, kind: str, client: int | None = None) -> list[Sent]:
        """The answers of a kind (query, get_properties, train, evaluate), in order."""
        return [s for s in self.sent if s.kind == kind and client in (None, s.client)]

    def _context(self, node_id: int, node: Mapping[str, Any]) -> Context:
        return Context(
            run_id=0,
            node_id=node_id,
            node_config=dict(node),
            state=RecordDict(),
            run_config=dict(self.run_config),
        )

    def _answer(self, message: Message) -> Message:
        """As a SuperNode does: the app's reply, or the text of what it raised."""
        client = message.metadata.dst_node_id - 1
        try:
            reply = app(message, self._context(client + 1, self.nodes[client]))
        except Exception as error:
            reason = str(type(error)) + ":<'" + str(error) + "'>"
            code = ErrorCode.CLIENT_APP_RAISED_EXCEPTION
            reply = Message(Error(code=code, reason=reason), reply_to=message)
        data = message_to_proto(reply).SerializeToString()
        pushed = get_all_nested_objects(reply).values()
        self.sent.append(
            Sent(
                client=client,
                kind=message.metadata.message_type,
                request=message,
                reply=reply,
                data=data,
                objects=b"".join(part.deflate() for part in pushed),
            )
        )
        if MARKS in (shown := {} if reply.has_error() else self.sent[-1].metrics):
            kept = read_ledger(Path(self.nodes[client]["store-dir"]) / "ledger.jsonl")
            assert shown[MARKS] == kept.marks  # the field has room for nothing else
        return message_from_proto(ProtoMessage.FromString(data))


def policy_text(text: str) -> str:
    """A node's policy with `none` for the bounds that `text` does not say."""
    return yaml.safe_dump({"max_epsilon": "none", "min_t0": "none", **yaml.safe_load(text)})


def deployed_config(public: Path, **sections: dict[str, Any]) -> RunConfig:
    """Two clients with pictures of their own; the server knows public ones, which it is given."""
    sections = {name: dict(values) for name, values in sections.items()}
    for name, values in (
        ("run", {"simulation": False}),
        ("data", {"name": "image_folder", "root": str(public), "max_images": None}),
        ("partition", {"kind": "iid", "num_clients": 2}),
    ):
        sections[name] = {**values, **sections.get(name, {})}
    config = small_config(**sections)
    assert config.evaluation.image_metrics  # the server asks for them, always
    return config


def draw_pictures(folder: Path, *, seed: int, count: int = 20, test: int = 4) -> Path:
    """`count` random 8x8 pictures per class, and `test` to test with, under telling names."""
    rng = np.random.default_rng(seed)
    for split, number in (("train", count), ("test", test)):
        for name in CLASSES:
            (folder / split / name).mkdir(parents=True)
            for index in range(number):
                pixels = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
                path = folder / split / name / f"patient-{seed}-{index:03d}-Jansson.png"
                Image.fromarray(pixels).save(path)
    return folder


def deployed_node(root: Path, client: int, **options: Any) -> dict[str, Any]:
    """The node config of a deployed client with pictures and a store under `root`."""
    data = root / f"hospital-{client}"
    if not data.exists():
        draw_pictures(data, seed=100 + client)
    own = {"data-dir": str(data), "store-dir": str(root / f"vault-{client}")}
    return {"partition-id": client, "num-partitions": 2, **own, **options}


def deployment(
    root: Path, *, options: Mapping[int, Mapping[str, Any]] | None = None, **sections: Any
) -> Federation:
    """A deployed federation of two clients under `root`; `options` go into their node configs."""
    chosen = options or {}
    public = root / "public"
    if not public.exists():
        draw_pictures(public, seed=1, count=2, test=2)
    nodes = {client: deployed_node(root, client, **chosen.get(client, {})) for client in (0, 1)}
    return Federation(nodes, flat(deployed_config(public, **sections), root / "server"))


def with_releases_of(first: Federation, root: Path, **sections: Any) -> Federation:
    """Clients with other pictures, whose stores say that those were released as the first ones'."""
    root.mkdir()
    for client in first.nodes:
        draw_pictures(root / f"hospital-{client}", seed=200 + client)
    second = deployment(root, **sections)
    for client in second.nodes:
        was = open_local_client(dict(first.nodes[client]), first.run_config, 0)
        now = open_local_client(dict(second.nodes[client]), second.run_config, 0)
        assert now.held.images.labels.tolist() == was.held.images.labels.tolist()
        assert not (now.held.images.images == was.held.images.images).all(axis=(1, 2, 3)).any()
        stored, metadata = read_tensors(was.releases.root / "releases" / "000001.safetensors")
        stored["digests"] = torch.from_numpy(now.held.images.image_digests().copy())
        stored["identities"] = torch.from_numpy(now.held.images.image_identities().copy())
        append(read_ledger(now.releases.root / "ledger.jsonl"), "opened", {"client_id": client})
        write_tensors(now.releases.root / "releases" / "000001.ready", stored, metadata)
    return second
