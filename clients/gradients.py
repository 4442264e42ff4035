"""A client's part in a network's rounds: images are drawn, their gradients added up and noised."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping

import torch

from clients.training import LocalTraining
from fedpdm.data import ImageSet
from fedpdm.jobs.progress import sum_progress
from fedpdm.privacy.dpsgd import gradient_rows
from fedpdm.privacy.mechanism import ReleasedGradient, noised_round
from fedpdm.privacy.planning import build_gradient_noise, build_samples
from fedpdm.privacy.releases import ReleaseRequest
from fedpdm.privacy.types import Release
from fedpdm.rng import Purpose, torch_generator
from fedpdm.setup.losses import network_losses

__all__ = ["Rows", "noised_gradient"]

MAX_ROWS = 64  # of gradients that are computed together, in simulation

Rows = Callable[[torch.Tensor], Iterable[torch.Tensor]]
"""Indices int64 (B,) of drawn images -> their gradients, float32 (n, d), in pieces."""


def noised_gradient(
    work: LocalTraining,
    number: int,
    weights: Mapping[str, torch.Tensor],
    *,
    rows: Rows | None = None,
) -> Release:
    """The noised sum of gradients of round `number` of the network's plan, from 1, at these
    weights, by name.

    Images are drawn and gradients computed when this round is asked for the first time; after that
    the store has the answer. An auditor may give `rows` in the place of the images' gradients.
    """
    local, plan = work.local, work.setup.release_plan.gradients
    assert plan is not None  # or the phase is refused
    held = local.held

    def make() -> ReleasedGradient:
        with work.borrowed("coarse") as trainer:
            trainer.load_weights(weights, what="network weights from the server")
            trainer.model.eval()  # no dropout, whose draws would depend on who else is drawn
            losses = network_losses(
                work.setup,
                trainer.model,
                images=held.images.images[held.train],
                labels=held.train_labels,
                draws=plan.draws,
                device=work.device,
                stream=functools.partial(_draws_of, work, number),
            )
            found = rows or functools.partial(
                gradient_rows,
                trainer.model.network,
                losses,
                multiplicity=plan.draws,
                max_rows=plan.draws if work.deployed else MAX_ROWS,
            )
            samples = build_samples(work.config, client=local.client_id, number=number)
            drawn = samples.poisson_batch(len(held.train), rate=plan.sample_rate)
            title = f"{work.who} gradients of round {number} of {plan.rounds}"
            return noised_round(
                _shown(found(drawn), title, total=len(drawn)),
                plan,
                number=number,
                size=sum(w.numel() for w in trainer.weights().values()),
                noise=build_gradient_noise(work.config, client=local.client_id, number=number),
            )

    def obtain(images: ImageSet, request: ReleaseRequest) -> Release:
        return local.releases.round(images, request, number, make)

    last = len(work.setup.release_plan.rounds) - 1
    return work.obtain(held.images.subset(held.train), obtain=obtain, stage=last)


def _draws_of(work: LocalTraining, number: int, index: int) -> torch.Generator:
    """Levels and noise at which the image at `index` is looked at in this round."""
    return torch_generator(
        work.config.run.seed,
        Purpose.GRADIENT_DRAWS,
        client=work.local.client_id,
        round=number,
        chunk=index,
    )


def _shown(rows: Iterable[torch.Tensor], title: str, *, total: int) -> Iterator[torch.Tensor]:
    """The same, with a line or a bar on this machine that says how far they are."""
    show = sum_progress(title, "image", total)
    for piece in rows:
        yield piece
        show(len(piece))
