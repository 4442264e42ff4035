"""The picture at the end of docs/deployment.md: what a node draws from its own store after a run.

    python -m tests.deployment.node_picture docs/results/node.png

Two deployed nodes in this process, with a disk of their own each, share scikit-learn's digits and
release class statistics at epsilon 10, with noise of the operating system. Then the picture is made
by `fedpdm sample STORE`. Further arguments are `section.key=value`, to make it cheaper.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

from fedpdm.cli import main
from fedpdm.config import RunConfig, config_from_mapping
from fedpdm.config.reading import apply_overrides
from tests.support.deployments import Federation, policy_text
from tests.support.federations import flat
from tests.support.real_nodes import deployed, share_out

__all__ = ["draw"]

SETTINGS: dict[str, Any] = {
    "name": "digits-between-two",
    "run": {"rounds": 4, "seed": 5, "threads": 1},
    "data": {"name": "digits"},
    "partition": {"kind": "iid", "num_clients": 2},
    "privacy": {"epsilon": 10, "clip_norm": 8, "release": "statistics"},
    "coarse": {"training": "server"},
    "fine": {"preset": "nano", "steps_per_round": 150, "batch_size": 32, "lr": 2e-3},
    "sampling": {"handover": 150, "fine_labels": True, "candidates": 4, "per_class": 1},
    "evaluation": {"image_metrics": False},
}


def draw(out: Path, folder: Path, overrides: list[str]) -> int:
    """Run the federation under `folder` and draw node 0's samples to `out`; the exit code."""
    simulated: RunConfig = config_from_mapping(apply_overrides(SETTINGS, overrides))
    parts = share_out(simulated, folder / "data")
    config = dataclasses.replace(deployed(simulated, folder / "data"), name=simulated.name)
    policy = folder / "policy.yaml"
    policy.write_text(policy_text("mechanisms: [images, statistics]"))
    nodes = {
        client: {
            "partition-id": client,
            "num-partitions": 2,
            "data-dir": str(part),
            "store-dir": str(folder / f"store-{client}"),
            "policy-file": str(policy),
        }
        for client, part in enumerate(parts)
    }
    Federation(nodes, flat(config, folder / "server")).run()
    store = str(folder / "store-0")
    return main(["show", store]) or main(["sample", store, "--num", "80", "--out", str(out)])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(draw(Path(sys.argv[1]), Path(temporary), sys.argv[2:]))
