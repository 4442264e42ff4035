"""What a deployed client keeps for its owner, beside its training state.

With it `fedpdm show`, `sample`, `export` and `report` work on the node's own store. All of it was
sent by the server or computed here; none of it is sent. A failure to keep it stays at home as well
(`clients.failures`), and the run goes on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch

from clients.failures import kept_at_home
from clients.training import LocalTraining
from fedpdm.privacy.noise import SystemNoise
from fedpdm.privacy.statement import baseline_statement, plain_text, run_statement
from fedpdm.reporting.run_files import draw_samples
from fedpdm.storage.node_run import NodeRun

__all__ = ["keep_end", "keep_round"]

Metrics = Mapping[str, Any]


def keep_round(work: LocalTraining, round: int, metrics: Metrics) -> None:
    """Note a finished round of a deployed client, with what was measured in it."""
    if not work.deployed:
        return
    run = NodeRun(work.local.store.root)
    with kept_at_home(work.local.store, "notes for its owner", who=work.who, deployed=True):
        run.begin(work.config, _facts(work))
        history = _history(run)
        own = {**metrics, **({} if work.fine_loss is None else {"fine_loss": work.fine_loss})}
        seen = [each for each in history["rounds"] if each["round"] < round]
        names = ("coarse_loss", "coarse_known", "fine_loss", "seconds")
        shown = {name: own[name] for name in names if name in own}
        history["rounds"] = [*seen, {"round": round, **shown, "clients": [own]}]
        history.pop("final", None)  # a run that its coordinator goes on with
        run.write_json("metrics.json", history)


def keep_end(work: LocalTraining, shared: Mapping[str, torch.Tensor], metrics: Metrics) -> None:
    """Keep a finished run of a deployed client: the shared model's weights, which it was sent, what
    was promised, and a picture of samples."""
    if not work.deployed:
        return
    local = work.local
    run = NodeRun(local.store.root)
    with kept_at_home(local.store, "results for its owner", who=work.who, deployed=True):
        run.begin(work.config, _facts(work))
        noise = SystemNoise.description if work.config.kind.releases else "none"
        if work.setup.plan is None:
            statement = baseline_statement(work.config)
        else:
            statement = run_statement(
                work.config, work.setup.plan, noise_source=noise, stores=[local.releases]
            )
        if shared:
            run.save_shared(shared, noise_source=noise)
        run.save_statement(statement, plain_text(statement))
        draw_samples(run, work.config)
        names = ("heldout_coarse_loss", "heldout_coarse_known")
        final = {name: metrics[name] for name in names if name in metrics}
        run.write_json("metrics.json", _history(run) | {"final": {**final, "clients": [metrics]}})


def _history(run: NodeRun) -> dict[str, Any]:
    known = (run.root / "metrics.json").exists()
    return {"rounds": [], **(run.read_json("metrics.json") if known else {})}


def _facts(work: LocalTraining) -> dict[str, Any]:
    """What `NodeRun.facts` has."""
    held = work.local.held
    counts = np.bincount(held.images.labels, minlength=held.images.num_classes).tolist()
    own = {"client_id": work.local.client_id, "num_images": len(held.images), "per_class": counts}
    return {
        "client_id": work.local.client_id,
        "images": asdict(work.setup.spec),
        "class_names": list(held.images.class_names),
        "num_images": len(held.images),
        "clients": [own],
    }
