"""What a run's class statistics give away: linkage of a client's sums, reconstruction from them.

Both are asked by the strongest attacker that the guarantee thinks of, who knows all of a client's
images but one. To her the noised sum of a class less the images that she knows is a release of the
last one, `CLIP(x, C)` under noise of 2 C / mu_1 on each number: what is known of released images
is used on it. Linkage takes the likelihood ratio of all sums that an image is in.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedpdm.attacks.jobs.model_attacks import scores_of_curve, seed_of
from fedpdm.attacks.jobs.running import AttackJob, Count
from fedpdm.attacks.jobs.uploads import Against, Uploads, upload_jobs
from fedpdm.attacks.linkage import linkage_auc
from fedpdm.attacks.membership import membership_scores
from fedpdm.attacks.sum_canaries import SumView, Whole
from fedpdm.attacks.sum_linkage import auc_of_mu
from fedpdm.data import ImageSet
from fedpdm.evaluation.synthesis import Synthesizer
from fedpdm.privacy.components import told_before
from fedpdm.privacy.events import implied_event, release_parameters
from fedpdm.privacy.mechanism import (
    IMAGES,
    ReleasedStatistics,
    StatisticsParameters,
    recorded_mechanism,
    restore_release,
)
from fedpdm.privacy.mechanism.basis import cosine_basis
from fedpdm.privacy.noise import GRID
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.privacy.types import ReleasedDataset
from fedpdm.setup.run_setup import set_up
from fedpdm.storage.files import read_tensors
from fedpdm.storage.run_directory import RunDirectory

__all__ = ["ClientSums", "known_but_one", "open_sums", "sum_jobs", "sum_linkage_job"]

MOST_PAIRS = 2000


@dataclass(frozen=True, kw_only=True, eq=False)
class ClientSums:
    """Everything that a client sent: `views` of its sums with, of each, the positions in
    `images` of the training images that are in it."""

    views: Sequence[tuple[SumView, NDArray[np.int64]]]
    images: ImageSet
    planned: Sequence[StatisticsParameters]

    @property
    def means(self) -> tuple[SumView, NDArray[np.int64]]:
        """The first sums of class means."""
        return next(each for each in self.views if each[0].parameters.stage == "means")

    def noise(self, view: SumView, held: NDArray[np.int64], row: int) -> np.ndarray:
        """What is in a sum besides its images, in whole steps, float64 (d,) or (d, d)."""
        labels = self.images.labels[held]
        vectors = view.vectors(self.images.images[held], labels)
        return view.observed(row) - view.total(vectors[view.rows(labels) == row])


def open_sums(run: RunDirectory, one: Synthesizer, releases: Path | None = None) -> ClientSums:
    """The sums in a client's store; nothing is noised.

    `ValueError`, one line, for a store without them, or whose sums are of images that the client
    does not hold or were made after other means than this run's.
    """
    client, own = one.own.client_id, one.own
    folder = run.client_path(client) if releases is None else releases / str(client)
    plan = set_up(one.config, own.images).release_plan

    def sent(stage: str) -> list[ReleasedStatistics]:
        uploads = [restore_release(*upload) for upload in run.load_uploads(part=stage)]
        return [each for each in uploads if isinstance(each, ReleasedStatistics)]

    known: dict[str, Mapping[str, torch.Tensor]] = {}  # what clients were told, by stage
    place = {bytes(row): at for at, row in enumerate(own.images.image_digests())}
    views = []
    for record in ReleaseStore(folder).ledger().releases():
        made = record.parameters
        if not isinstance(made, StatisticsParameters):
            continue
        tensors, metadata = read_tensors(folder / "releases" / record.file)
        digests = [bytes(row) for row in tensors.pop("digests").numpy()]
        if unknown := sum(digest not in place for digest in digests):
            raise ValueError(f"{folder}: {unknown} images in its sums are not client {client}'s")
        released = restore_release(
            {name: tensor[None] for name, tensor in tensors.items()}, metadata
        )
        assert isinstance(released, ReleasedStatistics)
        if made.stage not in known:
            known[made.stage] = told_before(made, sent)
        view = SumView(released, known[made.stage])
        views.append((view, np.array([place[d] for d in digests])))
    planned = [each for each in plan.rounds if isinstance(each, StatisticsParameters)]
    found = ClientSums(views=views, images=own.images, planned=planned)
    if {view.parameters.stage for view, _ in views} != {each.stage for each in planned}:
        raise ValueError(
            f"{folder}: client {client} has not sent all sums; if the run kept its releases "
            "elsewhere, give --releases"
        )
    for view, held in views:
        row = int(view.rows(own.images.labels[held][:1])[0])
        size = view.sent.sums.shape[2]
        energy = np.linalg.norm(found.noise(view, held, row)) / math.sqrt(size) / GRID
        if not 0.5 < energy < 2.0:
            raise ValueError(
                f"{folder}: sums of {view.parameters.stage} do not fit client {client}'s images; "
                "they were made in another run"
            )
    return found


def sum_linkage_job(
    sums: ClientSums,
    strangers: ImageSet,
    *,
    label: str,
    settings: Mapping[str, Any],
    seed: int,
) -> AttackJob:
    """Which of two images is in a client's sums: one of its own, or a stranger of the same class.

    The pairs share the noise of the sums, so the interval is narrower than it should be by a
    little.
    """
    name = f"linkage of sums of {label}"

    def attack_once(count: Count) -> dict[str, Any]:
        rng = np.random.default_rng(seed_of(seed, name))
        own, others = _pairs(sums, strangers, rng=rng)
        evidence, square = np.zeros((2, len(own)))
        labels = sums.images.labels[own]
        for done, (view, held) in enumerate(sums.views, 1):
            inside = np.isin(own, held)
            a = view.vectors(sums.images.images[own], labels)
            b = view.vectors(strangers.images[others], labels)
            distance, rows = view.squared_distance(a, b) / GRID**2, view.rows(labels)
            for row in np.unique(rows[inside]):
                at = inside & (rows == row)
                noise = sums.noise(view, held, int(row))
                evidence[at] += view.along(noise, a[at], b[at]) / GRID**2 + distance[at] / 2.0
                square[at] += distance[at]
            count(done * len(own), len(sums.views) * len(own))
        first = np.arange(len(own)) % 2 == 0  # of the others the stranger is asked for first
        positive, negative = evidence[first], -evidence[~first]
        scores = membership_scores(positive, negative, rng=rng)
        analytic = linkage_auc(np.sqrt(square), sigma=1.0)
        mu = math.hypot(*(each.mu for each in sums.planned))
        auc = scores.auc
        return {
            "headline": f"AUC {auc.value:.3f} ({auc.low:.3f} to {auc.high:.3f}), theory "
            f"{analytic:.3f}, worst case {auc_of_mu(mu):.3f}",
            "title": "linkage of sums",
            "note": "An attacker who knows all images of a client but one asks which of two images "
            "of a class the last one is.",
            "linkage": {
                "num_pairs": len(own),
                "auc": auc.value,
                "auc_analytic": analytic,
                "worst_auc": auc_of_mu(mu),
                "distance_quantiles": np.quantile(np.sqrt(square), [0, 0.5, 1]).tolist(),
                "mu": mu,
            },
            "scores": dataclasses.asdict(scores),
            "curve": scores_of_curve(positive, negative),
        }

    chosen = {"work": name, "seed": seed, **settings}
    return AttackJob(name=name, group="linkage", target=label, settings=chosen, attack=attack_once)


def _pairs(
    sums: ClientSums, strangers: ImageSet, *, rng: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(positions of own images that are in sums, of strangers), of the same class each."""
    own = np.unique(np.concatenate([held for _, held in sums.views]))
    own = rng.permutation(own)[:MOST_PAIRS]
    found = []
    for at in own:
        alike = np.flatnonzero(strangers.labels == sums.images.labels[at])
        found.append(int(rng.choice(alike)) if len(alike) else -1)
    others = np.array(found)
    return own[others >= 0], others[others >= 0]


def sum_jobs(
    run: RunDirectory,
    against: Against,
    strangers: ImageSet,
    *,
    releases: Path | None,
    say: Callable[[str], None],
) -> list[AttackJob]:
    """Linkage, reconstruction, collusion and publishing cost on one client's sums.

    `strangers` are images that are not the client's.
    """
    one, client, settings = against.one, against.client, against.settings
    sums = open_sums(run, one, releases)
    jobs = []
    if "linkage" in against.wanted:
        label = f"client {client}"
        jobs.append(
            sum_linkage_job(sums, strangers, label=label, settings=settings, seed=against.seed)
        )
    rest = [group for group in against.wanted if group != "linkage"]
    if not rest:
        return jobs
    view, held = sums.means
    rows, rng = against.drawn("sums", held)
    chosen = known_but_one(sums, one, rows, rng=rng)
    if chosen is None:
        say(
            f"{', '.join(rest)} of client {client} left out: the noise of its class sums, "
            f"{view.parameters.sigma:.4g}, is more than that of t = T"
        )
        return jobs
    uploads = Uploads(
        released=chosen,
        originals=sums.images.images[rows],
        what="sums",
        note="Of class statistics, an upload is what a noised class sum says of one of its images "
        "to who knows all the others.",
    )
    return jobs + upload_jobs(against, uploads, late=None)


def known_but_one(
    sums: ClientSums, one: Synthesizer, rows: Whole, *, rng: np.random.Generator
) -> ReleasedDataset | None:
    """What the sums of class means are of each image at `rows` to who knows all the others: as
    releases at the run's own noise level that is next above, with the noise that is missing added.

    None where the noise is more than the last level's.
    """
    schedule = one.settings.schedule
    view, held = sums.means
    parameters, (sigma, steps) = view.parameters, (view.parameters.sigma, view.parameters.steps)
    levels = np.array([schedule.noise_to_signal(t) for t in range(1, schedule.num_steps + 1)])
    if sigma > levels[-1]:
        return None
    t0 = 1 + int(np.argmax(levels >= sigma))
    made = release_parameters(
        schedule, t0=t0, clip_norm=parameters.clip_norm, shift=parameters.shift
    )
    images, labels = sums.images.images[rows], sums.images.labels[rows]
    vectors = view.vectors(images, labels).astype(np.float64)
    noises = {int(k): sums.noise(view, held, int(k)) for k in np.unique(labels)}
    seen = (vectors + np.stack([noises[int(k)] for k in labels])) / steps
    basis = cosine_basis(images.shape[1:], vectors.shape[1])
    size = math.prod(images.shape[1:])
    lacking = math.sqrt(max(0.0, levels[t0 - 1] ** 2 - sigma**2))
    drawn = rng.standard_normal((len(rows), size))
    along = drawn @ basis.T  # directions that are not in the basis have the noise of the level
    y = (seen + lacking * along) @ basis + levels[t0 - 1] * (drawn - along @ basis)
    x_tilde = torch.from_numpy(y).float().view(images.shape) * made.alpha_bar**0.5
    released = recorded_mechanism(IMAGES).restore(
        {"x_tilde": x_tilde, "labels": torch.from_numpy(labels.copy())},
        parameters=made,
        event=implied_event(made),
        noise_source=view.sent.noise_source,
        seeded=view.sent.seeded,
        check_values=True,
    )
    assert isinstance(released, ReleasedDataset)
    return released
