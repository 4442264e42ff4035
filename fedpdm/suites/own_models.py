"""A client's own fine model by itself, kept for all methods that share it.

Methods that differ in the shared model alone can be given the same fine model. So only the clients
that are scored train one, once a seed, on exactly what a run would: same images, stream of random
numbers and steps. It is kept under the digest of what made it, after each of the run's rounds: the
last is the model, the others say how it was with less training.
"""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import torch

from clients.local import LocalClient, open_local_client
from clients.pfdm_client import PFDMClient
from fedpdm.config import RunConfig, config_digest, config_to_json
from fedpdm.diffusion.training import select_device
from fedpdm.diffusion.weights import ema_weights
from fedpdm.evaluation.measures import mean_loss
from fedpdm.rng import Purpose, torch_generator
from fedpdm.setup.losses import fine_batch_loss
from fedpdm.setup.pair import load_pair
from fedpdm.setup.run_setup import set_up
from fedpdm.storage.files import locked, read_tensors, write_tensors
from fedpdm.wire.types import Phase

__all__ = ["heldout_loss", "own_config", "own_models"]

Weights = dict[str, torch.Tensor]
REPEATS = 64  # draws of noise for each held-out image


def own_config(config: RunConfig) -> RunConfig:
    """The run in which clients train their fine models as in this one, and nothing else.

    At every t, for it serves every hand-over. What does not change the fine model is left out.
    """
    plain = RunConfig()
    return dataclasses.replace(
        plain,
        name="own-model",
        run=config.run,
        data=config.data,
        partition=config.partition,
        schedule=config.schedule,
        fine=dataclasses.replace(config.fine, t_range="all"),
        coarse=dataclasses.replace(plain.coarse, training="none"),
        privacy=dataclasses.replace(
            plain.privacy,
            clip_norm=config.privacy.clip_norm
            if config.fine.clipped_fraction > 0
            else plain.privacy.clip_norm,
        ),
        evaluation=dataclasses.replace(plain.evaluation, image_metrics=False),
    )


def own_models(config: RunConfig, client_id: int, *, kept: Path) -> list[Weights]:
    """EMA weights of the client's fine model after each round of the run, the last one at last.

    Trained where `kept` does not have them, and gone on with where that was interrupted. Of two
    processes that want the same, the second waits. `RuntimeError` with the client's line if it
    fails.
    """
    own = own_config(config)
    folder = kept / f"{config_digest(own)[:16]}-client{client_id}"
    paths = [folder / f"round-{number}.safetensors" for number in range(1, own.run.rounds + 1)]
    with locked(folder.with_suffix(".lock")):
        if not paths[-1].exists():
            _train(own, client_id, folder, paths)
        return [read_tensors(path)[0] for path in paths]


def _train(own: RunConfig, client_id: int, folder: Path, paths: list[Path]) -> None:
    """From the last finished round on, as the store in `folder` says."""
    local = _open(own, client_id, folder / "run")
    client = PFDMClient(local)
    for number in range(max(1, local.store.last_round()), own.run.rounds + 1):
        _, _, metrics = client.fit([], {"round": number, "phase": str(Phase.FINE)})
        if "error" in metrics:
            raise RuntimeError(f"client {client_id}: {metrics['error']!s}")
        write_tensors(paths[number - 1], ema_weights(local.store.load_state(number, "fine")))
    shutil.rmtree(folder / "run")


def _open(own: RunConfig, client_id: int, run: Path) -> LocalClient:
    flat: dict[str, Any] = {"resolved-config": config_to_json(own), "run-dir": str(run)}
    node = {"partition-id": client_id, "num-partitions": own.partition.num_clients}
    return open_local_client(node, flat, 0)


def heldout_loss(config: RunConfig, client_id: int, weights: Weights) -> float:
    """Mean loss on the client's held-out images, each of its classes counting equally.

    By this, training is stopped early: the held-out images are the client's own.
    """
    own = own_config(config)
    held = _open(own, client_id, Path("nothing-is-written")).held
    setup, device = set_up(own, held.images), select_device(own.run.device)
    model = load_pair(setup, coarse=None, fine=weights, device=device).fine
    assert model is not None
    images, labels = held.images.images[held.heldout], held.images.labels[held.heldout]
    losses = []
    for label in sorted(set(labels.tolist())):
        chosen = labels == label
        loss = fine_batch_loss(
            setup, model, images=images[chosen], labels=labels[chosen], device=device
        )
        generator = torch_generator(own.run.seed, Purpose.EVALUATION, client=client_id,
                                    round=label, device=device)  # fmt: skip
        repeats = max(1, REPEATS // max(1, int(chosen.sum()) // 8))
        losses.append(
            mean_loss(loss, num_examples=int(chosen.sum()), generator=generator, repeats=repeats)
        )
    return sum(losses) / len(losses)
