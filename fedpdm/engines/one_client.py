"""One client alone with given images: what it uploads, by the code that a federation runs.

For attacks on the release. The images go through `PFDMClient.fit` in the phase in which a client
uploads its release, through the client's store and ledger, and out through the wire format.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from clients.gradients import Rows, noised_gradient
from clients.local import LocalClient
from clients.pfdm_client import PFDMClient
from clients.training import LocalTraining
from fedpdm import wire
from fedpdm.config import RunConfig, config_from_mapping
from fedpdm.data import ImageSet
from fedpdm.data.client_images import own_images
from fedpdm.privacy.mechanism import ReleasedGradient, ReleasedStatistics, released_images
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.privacy.types import Release, ReleasedDataset
from fedpdm.setup.build import build_denoiser
from fedpdm.setup.run_setup import set_up
from fedpdm.storage.client_store import ClientStore
from fedpdm.storage.files import StoreError

__all__ = ["attack_config", "release_sums", "upload_gradients", "upload_releases", "upload_sums"]


def attack_config(
    *,
    epsilon: float | None,
    t0: int | None,
    delta: float,
    clip_norm: float,
    shift: float | None,
    schedule: str,
    num_steps: int,
    seed: int | None,
    statistics_of: int | None = None,
    components: int = 1,
    network: Mapping[str, Any] | None = None,
) -> RunConfig:
    """A run that releases and trains nothing. A `seed` makes it a simulation with seeded noise.

    It releases class statistics of all directions, and of so many components, where
    `statistics_of` says how many values an image has, else images.
    With `network`, keys of that section, it releases class statistics and noised gradients.
    """
    nothing = {"preset": "micro", "steps_per_round": 0}
    sums: dict[str, Any] = {}
    if statistics_of is not None:
        all_of_it = {"dimensions": statistics_of, "directions": statistics_of}
        sums = {"statistics": {**all_of_it, "components": components}}
    run: dict[str, Any] = {"simulation": seed is not None, "seed": seed or 0, "device": "cpu"}
    release = "images" if statistics_of is None else "statistics"
    if network is not None:
        release, sums = "network", {"network": dict(network)}
        nothing = {**nothing, "preset": "nano"}
        run["rounds"] = int(network["rounds"]) + 3
    return config_from_mapping(
        {
            **sums,
            "name": "attack",
            "run": run,
            "data": {"holdout_fraction": 0.0},
            "privacy": {
                "release": release,
                "epsilon": epsilon,
                "t0": t0,
                "delta": delta,
                "clip_norm": clip_norm,
                "shift": shift,
            },
            "schedule": {"kind": schedule, "num_steps": num_steps},
            "coarse": nothing | {"training": "server", "objective": "noise_to_noise"},
            "fine": nothing,
        }
    )


def upload_releases(
    config: RunConfig, images: ImageSet, folder: Path, *, rounds: int = 1
) -> tuple[list[ReleasedDataset], ReleaseStore]:
    """What a new client in `folder` uploads when it is asked in `rounds` rounds, and its releases.

    The client is made anew for each round, as after a restart. Rows are in the order of the
    images, of which no two are equal. `StoreError` or `ValueError` if the client refuses.
    """
    one = _OneClient(config, images, folder)
    coarse = build_denoiser(one.setup, "coarse")
    request = wire.encode_model(dict(coarse.network.named_parameters()))
    uploads = [released_images(one.ask(number, request)) for number in range(1, rounds + 1)]
    return uploads, one.releases


def upload_sums(
    config: RunConfig,
    images: ImageSet,
    folder: Path,
    *,
    public: Mapping[str, torch.Tensor],
    runs: int = 1,
) -> tuple[list[ReleasedStatistics], ReleaseStore]:
    """What a new client in `folder` uploads in the rounds of class statistics, in one run after the
    other with the same releases.

    `public` is what it is told before all but the first. Otherwise as `upload_releases`.
    """
    one = _OneClient(config, images, folder)
    uploads = []
    for run in range(runs):
        for number, _ in enumerate(one.setup.release_plan.rounds, 1):
            told = wire.encode_model(public) if number > 1 else wire.encode_nothing()
            sums = one.ask(number, told, run=run)
            assert isinstance(sums, ReleasedStatistics)  # the config's mechanism
            uploads.append(sums)
    return uploads, one.releases


def release_sums(
    config: RunConfig, images: ImageSet, folder: Path, *, public: Mapping[str, torch.Tensor]
) -> list[ReleasedStatistics]:
    """What `upload_sums` gives, without what else a client does in a round: for many clients."""
    one = _OneClient(config, images, folder)
    work, sums = LocalTraining(one.local(folder)), []
    for stage in range(len(one.setup.release_plan.rounds)):
        message = wire.encode_release(work.statistics(stage, public), client_id=0)
        sent = one.decoded(message)
        assert isinstance(sent, ReleasedStatistics)  # the config's mechanism
        sums.append(sent)
    return sums


def upload_gradients(
    config: RunConfig,
    images: ImageSet,
    folder: Path,
    *,
    rows: Rows,
) -> tuple[list[ReleasedGradient], ReleaseStore]:
    """What a new client in `folder` uploads in all rounds of noised gradients, each asked for twice
    with a restart between, and its releases.

    `rows` are the gradients of drawn images, in place of a network's.
    """
    one = _OneClient(config, images, folder)
    plan, uploads = one.setup.release_plan.gradients, []
    assert plan is not None  # the config's mechanism
    network = build_denoiser(one.setup, "coarse").network
    weights = {name: p.detach() for name, p in network.named_parameters()}
    for number in range(1, plan.rounds + 1):
        for _ in range(2):
            sent = noised_gradient(LocalTraining(one.local(folder)), number, weights, rows=rows)
            read = one.decoded(wire.encode_release(sent, client_id=0))
            assert isinstance(read, ReleasedGradient)
            uploads.append(read)
    return uploads, one.releases


class _OneClient:
    """The client in `folder`, and what it answers."""

    def __init__(self, config: RunConfig, images: ImageSet, folder: Path) -> None:
        if len(images.distinct()) < len(images):
            raise ValueError("images must be distinct: the client releases equal images once")
        self.setup, self.releases = set_up(config, images), ReleaseStore(folder)
        self._held = own_images(config, images, client_id=0)
        self._folder = folder

    def local(self, folder: Path) -> LocalClient:
        """The client, made anew as after a restart; what it did in rounds is in `folder`."""
        return LocalClient(
            setup=self.setup,
            held=self._held,
            store=ClientStore(folder),
            releases=self.releases,
            raw_metrics=False,
            allow_new_release=False,
            reference=None,
        )

    def ask(self, round: int, message: wire.Message, *, run: int = 0) -> Release:
        """What it uploads in a round; of each `run` it knows no other."""
        client = PFDMClient(self.local(self._folder / f"run{run}" if run else self._folder))
        answer, _, metrics = client.fit(message, {"round": round, "phase": "release"})
        if error := metrics.get("error"):
            raise StoreError(str(error))
        return self.decoded(answer)

    def decoded(self, message: wire.Message) -> Release:
        """As the server reads it."""
        mechanism = self.setup.config.privacy.release
        return wire.decode_release(message, who="client 0", client_id=0, mechanism=mechanism)
