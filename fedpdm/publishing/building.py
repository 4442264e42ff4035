"""A client's models of a finished run as a pipeline in memory, with its statement and its card."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from fedpdm.config import RunConfig
from fedpdm.data.spec import ImageSpec, known_class_names
from fedpdm.diffusion.above_gaussians import NetworkAboveGaussians
from fedpdm.diffusion.gaussian import ClassGaussians, GaussianDenoiser
from fedpdm.diffusion.sampling import make_scheduler
from fedpdm.privacy.mechanism import mechanism_named
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.privacy.statement import client_statement
from fedpdm.publishing.class_counts import exported_share
from fedpdm.publishing.class_gaussians import GaussianClasses
from fedpdm.publishing.model_card import model_card
from fedpdm.publishing.pipeline import PFDMPipeline
from fedpdm.setup.choice import load_choice
from fedpdm.setup.pair import check_finished, client_weights, load_pair, shared_weights
from fedpdm.setup.run_setup import RunSetup, set_up_for
from fedpdm.storage.client_store import ClientStore, store_label
from fedpdm.storage.files import StoreError
from fedpdm.storage.run_directory import RunDirectory

__all__ = ["ClientPipeline", "client_pipeline", "gaussian_component"]

# Of a run's statement: how many images paid what, and places on this machine.
_KEPT_HERE = ("epsilon_distribution", "unreadable_stores")


@dataclass(frozen=True, kw_only=True, eq=False)
class ClientPipeline:
    """What an export holds: the pipeline, the run's statement, and the text of the model card."""

    pipeline: PFDMPipeline
    statement: Mapping[str, Any]
    card: str


def client_pipeline(
    run: RunDirectory,
    *,
    client_id: int,
    store: Path | None = None,
    counts_epsilon: float | None = None,
) -> ClientPipeline:
    """One client's models of a finished run; arguments and errors as of `export_pipeline`."""
    config = run.config()
    if not config.kind.releases:
        raise ValueError(f"{run.root}: this run is a baseline, without a coarse and a fine model")
    mechanism_named(config.privacy.release)  # the ledger may name a custom one
    check_finished(run, config)
    privacy, shared = run.statement(), shared_weights(run)
    folder = Path(store or run.client_path(client_id))
    client_store = ClientStore(folder, store_label(config, client_id))
    releases = ReleaseStore(store or run.release_path(client_id))
    own, ledger = _client(run, client_store, releases, privacy, client_id=client_id)
    shape, shift = ledger["image_shape"], float(privacy["shift"])
    num_classes = _num_classes(own)
    spec = ImageSpec(channels=shape[0], resolution=shape[1], num_classes=num_classes, shift=shift)
    setup, who = set_up_for(config, spec), f"client {client_id}"
    _check_release(setup, privacy, ledger.pop("known_releases"), where=f"{folder}: {who}")
    schedule = setup.schedule
    pair = load_pair(
        setup,
        coarse=shared,
        fine=own,
        device=torch.device("cpu"),
        choice=load_choice(client_store, round=client_store.last_round()),
        who=f" for {who}",
    )
    settings, fine = pair.settings, pair.fine
    assert fine is not None
    scheduler = make_scheduler(config.sampling.scheduler, schedule.betas)
    # In float64, as trained: schedulers round them to float32, the pipeline's x0_hat does not.
    scheduler.register_to_config(trained_betas=schedule.betas.tolist())
    fine_unet: Any = fine.network
    pipeline = PFDMPipeline(
        fine_unet=fine_unet,
        scheduler=scheduler,
        t0=settings.t0,
        chain=settings.chain,
        fine_prediction=fine.spec.prediction,
        num_classes=num_classes,
        resolution=spec.resolution,
        fine_patch=fine.spec.preset.patch,
        shift=shift,
        guidance_scale=settings.guidance,
        coarse_share=exported_share(
            config, client_store, num_classes=num_classes, epsilon=counts_epsilon
        ),
        fine_t_max=schedule.num_steps if config.fine.t_range == "all" else setup.handover,
        id2label=_class_names(run, config, num_classes=num_classes),
        fine_labels=settings.fine_labels,
        candidates=settings.candidates,
        own_classes=list(settings.own_classes) or None,
        **_shared_part(pair.coarse),
    )
    card = model_card(
        pipeline, name=config.name, run=privacy, client=ledger, counts_epsilon=counts_epsilon
    )
    statement = {key: value for key, value in privacy.items() if key not in _KEPT_HERE}
    return ClientPipeline(pipeline=pipeline, statement=statement, card=card)


def _num_classes(fine: Mapping[str, torch.Tensor]) -> int:
    """Of the fine model's weights: it embeds every class and no label, for whole images and for
    clipped ones."""
    return len(fine.get("class_embedding.weight", ())) // 2 - 1


def gaussian_component(gaussians: ClassGaussians) -> GaussianClasses:
    """The Gaussians as a component of a pipeline."""
    tensors = gaussians.tensors()
    classes, tensors["frames"] = tensors.pop("classes").tolist(), tensors.pop("directions")
    count, dimensions = tensors["frames"].shape[1:]
    made = GaussianClasses(dimensions=dimensions, directions=count, classes=classes)
    made.load_state_dict(tensors)
    return made.eval()


def _shared_part(coarse: Any) -> dict[str, Any]:
    """What the pipeline takes of the shared model: its U-Net, its Gaussians, or both."""
    if isinstance(coarse, NetworkAboveGaussians):
        gaussians = gaussian_component(coarse.gaussians)
        levels = {"gaussians": gaussians, "coarse_levels": [coarse.lowest, coarse.highest]}
        return {**_shared_part(coarse.network), **levels}
    if isinstance(coarse, GaussianDenoiser):
        return {"coarse_unet": None, "gaussians": gaussian_component(coarse.gaussians)}
    return {
        "coarse_unet": coarse.network,
        "coarse_prediction": coarse.spec.prediction,
        "coarse_patch": coarse.spec.preset.patch,
    }


def _client(
    run: RunDirectory,
    store: ClientStore,
    releases: ReleaseStore,
    privacy: Mapping[str, Any],
    *,
    client_id: int,
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """EMA weights of the client's last round, and its statement, from its ledger where that lies
    in the store (else as it was written beside the ledger's releases); `ValueError` if there are
    none, or not of this run."""
    folder = store.root
    weights, released = client_weights(store), store.load_statement()
    known_releases = [asdict(r.parameters) for r in releases.ledger().releases()]
    if known_releases:
        released = client_statement(releases, delta=float(privacy["delta"]))
    if not weights or released is None:
        known = [k for k in run.clients() if ClientStore(run.client_path(k)).last_round() > 0]
        raise ValueError(
            f"{folder}: client {client_id} has no fine model there; clients that have one: "
            f"{', '.join(map(str, known)) or 'none'}"
        )
    return weights, {**released, "known_releases": known_releases or [released["latest_release"]]}


def _check_release(setup: RunSetup, privacy: Mapping[str, Any], known: Any, *, where: str) -> None:
    """`StoreError` unless one of the client's releases was made as the run's."""
    planned = [asdict(parameters) for parameters in setup.release_plan.rounds]
    if "t0" in privacy:
        planned = [{**each, "t0": int(privacy["t0"])} for each in planned]
    names = ("t0", "run", "stage", "clip_norm", "shift", "dimensions")

    def differs(record: Mapping[str, Any], plan: Mapping[str, Any]) -> list[str]:
        return [name for name in names if name in plan and record.get(name) != plan[name]]

    if all(differs(record, plan) for record in known for plan in planned):
        record = known[-1]
        plan = min(planned, key=lambda each: len(differs(record, each)))
        name = differs(record, plan)[0]
        raise StoreError(
            f"{where} released with {name} = {record.get(name)}, this run has {plan[name]}; the "
            "store belongs to another run"
        )


def _class_names(
    run: RunDirectory, config: RunConfig, *, num_classes: int
) -> dict[str, str] | None:
    """Names of the classes by label: as the run noted them (a node notes the federation's), else as
    the config or its data set has them, if that can be read here."""
    names = tuple(map(str, (run.partition() or {}).get("class_names", ())))
    names = names or known_class_names(config) or ()
    return {str(k): v for k, v in enumerate(names)} if len(names) == num_classes else None
