"""One client alone with given images: what it uploads, by the code that a federation runs.

For attacks on the release. The images go through `PFDMClient.fit` in the phase in which a client
uploads its release, through the client's store and ledger, and out through the wire format.
"""

from __future__ import annotations

from pathlib import Path

from clients.local import LocalClient
from clients.pfdm_client import PFDMClient
from fedpdm import wire
from fedpdm.config import RunConfig, config_from_mapping
from fedpdm.data import ImageSet
from fedpdm.data.client_images import own_images
from fedpdm.privacy.mechanism import released_images
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.privacy.types import ReleasedDataset
from fedpdm.setup.build import build_denoiser
from fedpdm.setup.run_setup import set_up
from fedpdm.storage.client_store import ClientStore
from fedpdm.storage.files import StoreError

__all__ = ["attack_config", "upload_releases"]


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
) -> RunConfig:
    """A run that releases and trains nothing. A `seed` makes it a simulation with seeded noise."""
    nothing = {"preset": "micro", "steps_per_round": 0}
    return config_from_mapping(
        {
            "name": "attack",
            "run": {"simulation": seed is not None, "seed": seed or 0, "device": "cpu"},
            "data": {"holdout_fraction": 0.0},
            "privacy": {
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
    if len(images.distinct()) < len(images):
        raise ValueError("images must be distinct: the client releases equal images once")
    setup = set_up(config, images)
    held = own_images(config, images, client_id=0)
    store = ReleaseStore(folder)
    coarse = build_denoiser(setup, "coarse")
    request = wire.encode_model(dict(coarse.network.named_parameters()))
    uploads = []
    for number in range(1, rounds + 1):
        client = PFDMClient(
            LocalClient(
                setup=setup,
                held=held,
                store=ClientStore(folder),
                releases=store,
                raw_metrics=False,
                allow_new_release=False,
                reference=None,
            )
        )
        message, _, metrics = client.fit(request, {"round": number, "phase": "release"})
        if error := metrics.get("error"):
            raise StoreError(str(error))
        uploads.append(released_images(wire.decode_release(message, who="client 0", client_id=0)))
    return uploads, store
