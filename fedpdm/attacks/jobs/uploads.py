"""What a client's uploads give away: linkage, reconstruction, collusion, the cost of publishing."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpdm.attacks.collusion import PooledDenoiser
from fedpdm.attacks.denoising import Reconstructor
from fedpdm.attacks.jobs.model_attacks import seed_of
from fedpdm.attacks.jobs.models import reconstructor_of
from fedpdm.attacks.jobs.running import AttackJob
from fedpdm.attacks.jobs.upload_attacks import linkage_job, reconstruction_job
from fedpdm.attacks.membership import AttackTarget
from fedpdm.attacks.pretraining import pretrain
from fedpdm.data import ImageSet
from fedpdm.evaluation.synthesis import Synthesizer
from fedpdm.privacy.mechanism import released_images, select
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.privacy.types import ReleasedDataset
from fedpdm.setup.build import build_optimizer_settings
from fedpdm.setup.run_setup import set_up
from fedpdm.storage.run_directory import RunDirectory

__all__ = [
    "Against",
    "Uploads",
    "pretrained_attacker",
    "release_jobs",
    "stored_release",
    "upload_jobs",
]


@dataclass(frozen=True, kw_only=True, eq=False)
class Uploads:
    """What is reconstructed from: uploads of these `originals` uint8, in their order.

    `what` they are called, and a `note` on them for the report.
    """

    released: ReleasedDataset
    originals: np.ndarray
    what: str = "uploads"
    note: str = ""


@dataclass(frozen=True, kw_only=True, eq=False)
class Against:
    """One client's uploads, as they are attacked.

    Attributes:
        one: the client, with the run's models.
        others: the other clients, who may collude.
        public: uint8 (N, C, H, W), images whose length may be known.
        wanted: groups of attacks.
        settings: of the call, which each job keeps.
        out: folder of pictures.
        num_uploads: that are reconstructed, at most.
    """

    one: Synthesizer
    others: Mapping[int, Synthesizer]
    public: np.ndarray
    wanted: Sequence[str]
    settings: Mapping[str, Any]
    out: Path
    seed: int
    num_uploads: int

    @property
    def client(self) -> int:
        return self.one.own.client_id

    def drawn(self, what: str, among: np.ndarray) -> tuple[np.ndarray, np.random.Generator]:
        """`num_uploads` of these positions (or all), rising, and the stream that drew them."""
        rng = np.random.default_rng(seed_of(self.seed, f"{what} of client {self.client}"))
        return np.sort(rng.permutation(among)[: self.num_uploads]), rng


def release_jobs(
    against: Against,
    released: ReleasedDataset,
    *,
    late: functools.partial[Reconstructor] | None,
) -> list[AttackJob]:
    """Linkage, reconstruction, collusion and publishing cost on one client's released images."""
    own = against.one.own
    jobs: list[AttackJob] = []
    if "linkage" in against.wanted and len(own.images) >= 2:
        jobs.append(
            linkage_job(
                own.images, released, label=f"client {against.client}",
                settings=against.settings, seed=against.seed,
            )
        )  # fmt: skip
    rows, _ = against.drawn("uploads", own.train)
    uploads = Uploads(
        released=select(released, torch.from_numpy(rows)), originals=own.images.images[rows]
    )
    return jobs + upload_jobs(against, uploads, late=late)


def upload_jobs(
    against: Against, uploads: Uploads, *, late: functools.partial[Reconstructor] | None
) -> list[AttackJob]:
    """Reconstruction, collusion and publishing cost on one client's uploads."""
    one, client, wanted, seed = against.one, against.client, against.wanted, against.seed
    jobs: list[AttackJob] = []
    chosen = uploads.released
    coarse = reconstructor_of("global", one, "coarse")

    def add(
        name: str,
        group: str,
        attackers: Sequence[Reconstructor],
        file: str,
        late: functools.partial[Reconstructor] | None = None,
        **extra: Any,
    ) -> None:
        jobs.append(
            reconstruction_job(
                chosen, uploads.originals, against.public, attackers, name=name, group=group,
                note=uploads.note, target=f"client {client}", picture=against.out / file,
                settings={**against.settings, **extra}, seed=seed, late=late,
            )
        )  # fmt: skip

    t0 = chosen.parameters.t0
    known = [
        reconstructor_of(f"client {other}", each, "fine", t0=t0)
        for other, each in against.others.items()
    ]
    if "reconstruction" in wanted:
        add(
            f"reconstruction of {uploads.what} of client {client}",
            "reconstruction",
            [coarse, *known[:1]],
            f"reconstruction-client{client}.png",
            late,
            pretrained=repr(late.keywords) + late.args[2].digest() if late else None,
        )
    if "collusion" in wanted:
        pool = [each for each in (coarse, *known) if not each.noise_to_noise]
        if known and len({each.answers_clipped for each in pool}) == 1:
            target = AttackTarget(
                denoiser=PooledDenoiser(pool, generator=torch.Generator().manual_seed(seed)),
                schedule=coarse.target.schedule,
                t_range=(1, t0),
                device=one.device,
            )
            together = Reconstructor(
                name="all together", target=target, answers_clipped=pool[0].answers_clipped
            )
            add(
                f"collusion, reconstruction of {uploads.what} of client {client}",
                "collusion",
                [coarse, *known, together],
                f"collusion-client{client}.png",
            )
        add(
            f"publishing, reconstruction of {uploads.what} of client {client}",
            "publishing",
            [coarse, reconstructor_of("own fine model", one, "fine", t0=t0)],
            f"publishing-client{client}.png",
        )
    return jobs


def stored_release(
    run: RunDirectory, one: Synthesizer, releases: Path | None = None
) -> ReleasedDataset:
    """What a client of a finished run released, in the order of its images; nothing is noised."""
    client = one.own.client_id
    folder = run.client_path(client) if releases is None else releases / str(client)
    setup = set_up(one.config, one.own.images)
    request = setup.release_request(client=client, allow_new_release=False)
    store = ReleaseStore(folder)
    missing = len(one.own.images)
    if (folder / "ledger.jsonl").exists():
        missing = store.preview(one.own.images, request).fresh
    if missing:
        raise ValueError(
            f"{folder}: {missing} images of client {client} have no release there; if the run kept "
            "its releases elsewhere, give --releases"
        )
    return released_images(store.obtain(one.own.images, request))


def pretrained_attacker(
    one: Synthesizer, released: ReleasedDataset, public: ImageSet, *, num_steps: int, seed: int
) -> Reconstructor:
    """An attacker with the coarse model's architecture, trained on a public look-alike set."""
    config = one.config
    assert one.coarse is not None
    settings = replace(
        build_optimizer_settings(config, "coarse"), total_steps=num_steps, lr=2e-3, decay="cosine",
    )  # fmt: skip
    stream = seed_of(seed, "pretrained attacker")
    target, _ = pretrain(
        public,
        replace(one.coarse.spec, prediction="v"),
        released.parameters,
        schedule=one.settings.schedule,
        settings=settings,
        generator=torch.Generator(one.device).manual_seed(int(stream.generate_state(1)[0])),
        device=one.device,
    )
    return Reconstructor(name="pretrained", target=target)
