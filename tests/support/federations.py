"""Small federations shared by the tests: real clients, real strategies, few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from clients.local import open_local_client
from clients.pfdm_client import PFDMClient
from fedpdm import wire
from fedpdm.config import RunConfig, config_from_mapping, config_to_json
from fedpdm.setup.build import build_denoiser
from fedpdm.setup.run_setup import set_up

SMALL: dict[str, dict[str, Any]] = {
    "run": {"rounds": 2, "seed": 3, "threads": 1},
    "data": {"name": "digits", "max_images": 240},
    "partition": {"num_clients": 3, "majority_classes": 5, "majority_ratio": 5.0},
    "privacy": {"clip_norm": 8.0},
    "coarse": {"preset": "nano", "steps_per_round": 3, "batch_size": 16, "warmup_steps": 2},
    "fine": {
        "preset": "nano",
        "steps_per_round": 4,
        "batch_size": 8,
        "warmup_steps": 2,
        "checkpoint_every": 2,
    },
    "sampling": {"num_steps": 3, "per_class": 1},
    "evaluation": {"num_images": 10},
}


def small_config(**sections: dict[str, Any]) -> RunConfig:
    """`SMALL` with some keys replaced, section by section."""
    merged = {name: dict(values) for name, values in SMALL.items()}
    for name, values in sections.items():
        merged[name] = {**merged.get(name, {}), **values}
    return config_from_mapping({"name": "small", **merged})


def node(config: RunConfig, client: int) -> dict[str, Any]:
    """The node config that Flower's simulation gives to a client."""
    return {"partition-id": client, "num-partitions": config.partition.num_clients}


def flat(config: RunConfig, out: Path, *, resume: bool = False) -> dict[str, Any]:
    """The flat run config that both apps receive."""
    return {"resolved-config": config_to_json(config), "run-dir": str(out), "resume": resume}


def client_of(config: RunConfig, out: Path, client: int) -> PFDMClient:
    """A simulated client of the run in `out`, as a message would find it."""
    return PFDMClient(open_local_client(node(config, client), flat(config, out), 0))


def initial_message(config: RunConfig) -> list[np.ndarray]:
    """The coarse model that the server begins with."""
    setup = set_up(config)
    model = build_denoiser(setup, "coarse")
    return wire.encode_model(dict(model.network.named_parameters()))
