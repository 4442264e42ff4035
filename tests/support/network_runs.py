"""Small runs of a private network above the hand-over."""

from __future__ import annotations

from typing import Any

from fedpdm.config import RunConfig
from tests.support.federations import small_config

ROUNDS = 2  # of noised gradients, after three of class statistics

SECTIONS: dict[str, dict[str, Any]] = {
    "run": {"rounds": 3 + ROUNDS},
    "coarse": {"training": "server"},
    "privacy": {"release": "network", "clip_norm": 6.0},
    "network": {
        "rounds": ROUNDS,
        "warmup_steps": 3,
        "sample_rate": 0.2,
        "draws": 2,
        "clip_norm": 1.0,
    },
}


def network_sections(**sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """`SECTIONS` with some keys replaced."""
    given = {name: dict(values) for name, values in SECTIONS.items()}
    for name, values in sections.items():
        given[name] = {**given.get(name, {}), **values}
    return given


def network_run(**sections: dict[str, Any]) -> RunConfig:
    """A run of two clients."""
    return small_config(**network_sections(partition={"num_clients": 2}, **sections))
