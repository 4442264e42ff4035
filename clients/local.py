"""A client's own side: its images, its store, its part of the configuration."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients.bounds import check_run, flag, node_policy
from clients.failures import Refusal
from fedpdm.config import ConfigError, RunConfig, config_digest, config_from_json, config_to_json
from fedpdm.data import ImageSet
from fedpdm.data.client_images import ClientImages, client_images, own_images
from fedpdm.data.loading import build_partitions, load_split
from fedpdm.data.partition import ClientPartition
from fedpdm.deployment.acceptance import acceptance_of
from fedpdm.deployment.classes import ClassMap, accepted_classes, load_classes
from fedpdm.deployment.policy import NodePolicy
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.setup.flower_config import new_release_allowed, release_path, run_config_of, run_root
from fedpdm.setup.run_setup import RunSetup, set_up
from fedpdm.storage.client_store import ClientStore, store_label
from fedpdm.storage.files import StoreError
from fedpdm.storage.run_directory import RunDirectory

__all__ = ["LocalClient", "is_deployed", "open_local_client"]

OWN_KEYS = ("data-dir", "store-dir")  # what a deployed node's config says of its own disk


@dataclass(frozen=True, kw_only=True)
class LocalClient:
    """One client's private side.

    `held` are its raw images. `reference` is the data set's public test split, None where no image
    metrics are measured. `raw_metrics` says whether metrics computed on raw images may leave,
    `allow_new_release` whether images may be noised once more. `policy` holds a deployed node's own
    bounds, if it has any; `tells_owner` says whether somebody watches it who reads what it did
    (`clients.diary`): a node's operator.
    """

    setup: RunSetup
    held: ClientImages
    store: ClientStore
    releases: ReleaseStore
    raw_metrics: bool
    allow_new_release: bool
    reference: ImageSet | None
    policy: NodePolicy | None = None
    tells_owner: bool = False

    @property
    def client_id(self) -> int:
        return self.held.client_id

    @property
    def config(self) -> RunConfig:
        return self.setup.config


@functools.lru_cache(maxsize=2)
def _simulated_data(config_json: str) -> tuple[ImageSet, ImageSet, tuple[ClientPartition, ...]]:
    """In simulation one party holds all data: load it once per process, split it identically."""
    config = config_from_json(config_json)
    train = load_split(config, "train")
    return train, load_split(config, "test"), build_partitions(config, train)


def is_deployed(node_config: Mapping[str, Any]) -> bool:
    """Whether a node's config says that it is a client of its own, not part of a simulation."""
    return any(key in node_config for key in OWN_KEYS)


def open_local_client(
    node_config: dict[str, Any], flower_run_config: dict[str, Any], run_id: int
) -> LocalClient:
    """The client that this node is. In simulation a process keeps the last ones that it opened.

    In simulation `partition-id` says which part of the configured data set it holds; elsewhere
    `node_config` gives `partition-id`, `data-dir` and `store-dir`, may allow what the server
    cannot, `raw-metrics` and `allow-new-release`, and may bound it (`policy-file`,
    `require-acceptance`, see `clients.bounds`). Images without a split of their own are all for
    training, but for a tenth where `test-images` or raw image metrics need tests. Of equal
    images the first is kept.
    """
    settings = tuple(sorted(flower_run_config.items()))
    if not is_deployed(node_config) and run_config_of(flower_run_config).run.simulation:
        return _kept_client(tuple(sorted(node_config.items())), settings, run_id)
    return _open(node_config, flower_run_config, run_id)


@functools.lru_cache(maxsize=8)
def _kept_client(
    node_config: tuple[tuple[str, Any], ...], settings: tuple[tuple[str, Any], ...], run_id: int
) -> LocalClient:
    return _open(dict(node_config), dict(settings), run_id)


def _accepted_classes(store: ReleaseStore, config: RunConfig) -> ClassMap | None:
    """How the node's owner said that its classes are the federation's.

    A ledger that cannot be read says nothing, and a client that releases goes on to say who it is:
    it is refused where it would release, before anything is trained.
    """
    try:
        return accepted_classes(acceptance_of(store.ledger(), config))
    except StoreError:
        if config.kind.releases:
            return None
        raise


def _open(
    node_config: dict[str, Any], flower_run_config: dict[str, Any], run_id: int
) -> LocalClient:
    config = run_config_of(flower_run_config)
    client_id = int(node_config["partition-id"])
    if config.run.simulation:
        if is_deployed(node_config):
            raise Refusal(
                "run.simulation: true seeds the privacy noise, so this deployed node refuses the "
                f"run (client {client_id})"
            )
        train, test, parts = _simulated_data(config_to_json(config))
        held = client_images(config, train, parts, client_id)
        reference: ImageSet | None = test
        run = RunDirectory(run_root(flower_run_config, config, run_id))
        store = run.client_path(client_id)
        releases = release_path(flower_run_config, run, client_id)
        raw_metrics, allow_new_release = True, new_release_allowed(flower_run_config)
        policy: NodePolicy | None = None
    else:
        for key in OWN_KEYS:
            if key not in node_config:
                raise ConfigError(f"node config: {key} is missing (client {client_id})")
        releases = Path(str(node_config["store-dir"]))
        # Releases are an image's for ever; rounds and models are of one run's settings.
        store = releases / "runs" / config_digest(config)[:16]
        policy = node_policy(node_config)
        check_run(policy, config, ReleaseStore(releases), node_config=node_config)
        root = Path(str(node_config["data-dir"]))
        allowed = policy or NodePolicy(allow_raw_metrics=True, allow_new_release=True)
        raw_metrics = flag(node_config, "raw-metrics") and allowed.allow_raw_metrics
        allow_new_release = flag(node_config, "allow-new-release") and allowed.allow_new_release
        wanted = raw_metrics and config.evaluation.image_metrics
        aside = flag(node_config, "test-images") or allowed.test_images or wanted
        classes = _accepted_classes(ReleaseStore(releases), config)
        load = functools.partial(load_classes, config, root=root, classes=classes)
        held = own_images(config, load("train", whole=not aside), client_id=client_id)
        reference = load("test") if wanted else None
    return LocalClient(
        setup=set_up(config, held.images),
        held=held,
        store=ClientStore(store, store_label(config, client_id)),
        releases=ReleaseStore(releases),
        raw_metrics=raw_metrics,
        allow_new_release=allow_new_release,
        reference=reference,
        policy=policy,
        tells_owner=not config.run.simulation,
    )
