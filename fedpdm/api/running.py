"""Attacks on releases and models, whole federations, exports."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from fedpdm.api.models import spec_of
from fedpdm.api.releasing import PathLike, release
from fedpdm.config import RunConfig
from fedpdm.data import ImageSet
from fedpdm.data.client_images import ClientImages
from fedpdm.diffusion.denoisers import Denoiser
from fedpdm.evaluation.synthesis import Synthesizer
from fedpdm.publishing.export import export_pipeline
from fedpdm.setup.build import coarse_share, sampler_settings
from fedpdm.setup.continuing import run_to_go_on
from fedpdm.setup.run_setup import set_up_for
from fedpdm.storage.node_run import open_run
from fedpdm.storage.run_directory import RunDirectory

if TYPE_CHECKING:
    from fedpdm.attacks.linkage import LinkageSummary
    from fedpdm.attacks.membership import MembershipResult
    from strategies.coarse import CoarseStrategy

__all__ = ["attack_model", "attack_uploads", "export_client", "run"]


def attack_uploads(
    config: RunConfig,
    images: ImageSet,
    store: PathLike,
    *,
    client: int = 0,
    num_pairs: int | None = None,
    seed: int = 0,
) -> LinkageSummary:
    """The server's best test on what a client uploads: which of two images was it made from?

    Images are drawn in pairs from `images`, and their releases taken from `store` (noised now if it
    does not know them); the summary has the attack's AUC beside the one that the noise implies.
    """
    from fedpdm.attacks.linkage import linkage_attack

    rng = np.random.default_rng(seed)
    result = linkage_attack(
        images,
        lambda chosen: release(config, chosen, store, client=client),
        rng=rng,
        num_pairs=num_pairs,
    )
    return result.summary


def attack_model(
    config: RunConfig,
    members: ImageSet,
    non_members: ImageSet,
    *,
    coarse: Denoiser | None = None,
    fine: Denoiser | None = None,
    target: str = "coarse",
    attack: str = "pia",
    seed: int = 0,
) -> MembershipResult:
    """Membership inference: can `members` be told from `non_members` by a model?

    Args:
        members: images that the model was trained on; non_members: of the same kind, but not.
        coarse, fine: the models that there are.
        target: "coarse", "fine", or "combined" (as the client samples, both needed).
        attack: a name of `fedpdm.attacks.membership.ATTACKS`: loss, pia, secmi, clid, gsa, ...
        seed: of all draws.

    Returns:
        Scores of every image, and `scores`: AUC, attack success and TPR at 1% FPR, with intervals.

    Raises:
        ValueError: for an unknown attack, or a target that the models do not make up.
    """
    from fedpdm.attacks.jobs.models import run_targets
    from fedpdm.attacks.membership import run_membership

    model = coarse or fine
    if model is None:
        raise ValueError("give a coarse model, a fine model, or both")
    setup, everything = set_up_for(config, spec_of(config, model)), np.arange(len(members))
    spec = setup.spec
    held = ClientImages(
        client_id=0,
        images=members,
        train=everything,
        heldout=np.arange(0),
        indices=everything,
        majority=tuple(np.unique(members.labels).tolist()),
        minority=(),
    )
    share = coarse_share(config, members.labels, num_classes=spec.num_classes)
    opened = Synthesizer(
        own=held,
        config=config,
        coarse=coarse,
        fine=fine,
        spec=spec,
        settings=sampler_settings(setup, share=share),
        device=next(model.parameters()).device,
    )
    targets = run_targets(opened)
    if target not in targets:
        raise ValueError(f"target must be one of {', '.join(targets)}, got {target!r}")
    chosen = targets[target]
    return run_membership(
        chosen.target,
        chosen.inputs(members.images),
        torch.tensor(members.labels),
        chosen.inputs(non_members.images),
        torch.tensor(non_members.labels),
        attack=attack,
        seed=np.random.SeedSequence(seed),
    )


def run(
    config: RunConfig,
    out: PathLike,
    *,
    resume: bool = False,
    strategy: type[CoarseStrategy] | None = None,
) -> RunDirectory:
    """A whole federation in this process: one Flower client after the other, no Ray.

    Args:
        config: the settings.
        out: the run's directory; results lie there.
        resume: go on with the run in `out`, for more rounds if `config` has more.
        strategy: a custom Flower strategy, a `strategies.coarse.CoarseStrategy`; default: the
            one that the config names.
    """
    from fedpdm.engines.inprocess import run_in_process

    if resume:
        config = run_to_go_on(RunDirectory(Path(out)), config)
    run_in_process(config, Path(out), resume=resume, strategy=strategy)
    return RunDirectory(Path(out))


def export_client(
    run: RunDirectory | PathLike,
    out: PathLike,
    *,
    client: int | None = None,
    counts_epsilon: float | None = None,
) -> Path:
    """Write one client's models of a finished run as a diffusers pipeline, with its model card.

    `run` may be a node's store; `client` is then its own, else 0, where nothing else is said.
    `counts_epsilon`: noise for the numbers of images per class that an export of a run with
    `sampling.coarse_worth` holds; default: they are exact.
    """
    directory = run if isinstance(run, RunDirectory) else open_run(Path(run))
    chosen = directory.first_client() if client is None else client
    return export_pipeline(
        directory, client_id=chosen, out=Path(out), counts_epsilon=counts_epsilon
    )
