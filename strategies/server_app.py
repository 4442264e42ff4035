"""Flower's entry point on the server."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from flwr.common import Context
from flwr.server import ServerApp, ServerAppComponents, ServerConfig, SimpleClientManager

from fedpdm.config import RunConfig, RunKind
from fedpdm.data.loading import build_partitions, load_split
from fedpdm.deployment.registered import registered_clients
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.reporting.run_files import RunLog, draw_split, finish_run
from fedpdm.reporting.trackers import open_trackers
from fedpdm.setup.build import build_denoiser
from fedpdm.setup.continuing import schedule_lines
from fedpdm.setup.flower_config import (
    is_resumed,
    ledgers_path,
    release_path,
    run_config_of,
    run_root,
)
from fedpdm.setup.run_setup import check_rounds, set_up
from fedpdm.storage.run_directory import RunDirectory
from strategies.baselines import CentralisedTraining, TrainingAlone
from strategies.coarse import CoarseStrategy
from strategies.fedavg import CoarseFedAvg
from strategies.gaussians import CoarseGaussians
from strategies.network import CoarseNetwork
from strategies.own import own_strategy
from strategies.roster import ServerSettings
from strategies.secure_aggregation import SecureFedAvg, SecureRounds, SecureServer
from strategies.secure_statistics import SecureGaussians
from strategies.server_training import CoarseServerTraining
from strategies.streaming import StreamingServer

__all__ = ["app", "build_strategy", "server_components", "server_fn"]


def build_strategy(
    config: RunConfig,
    run: RunDirectory,
    *,
    resume: bool,
    stores: Sequence[ReleaseStore] = (),
    own: type[CoarseStrategy] | None = None,
) -> CoarseStrategy:
    """The strategy that a config asks for, started or resumed; claims the run directory.

    `stores` are the clients' release stores where this party holds them (simulation). `own` is
    somebody else's strategy, made with the keywords of `CoarseStrategy` in place of that one.
    """
    own = own or own_strategy(config.aggregation.method)
    check_rounds(config)
    images = load_split(config, "train") if config.run.simulation else None
    setup = set_up(config, images)
    run.open(config, resume=resume)
    log = RunLog(run)
    if images is not None:
        draw_split(run, config, build_partitions(config, images), images)
    weights: dict[str, torch.Tensor] = {}
    if not setup.has_gaussians:
        model = build_denoiser(setup, "coarse")
        weights = {name: p.detach() for name, p in model.network.named_parameters()}
    section = config.aggregation
    options: dict[str, Any] = {
        "settings": ServerSettings(
            rounds=config.run.rounds,
            min_clients=section.min_clients or config.partition.num_clients,
            fraction_fit=section.fraction_fit,
            on_failure=section.on_failure,
            evaluate_every=config.evaluation.every,
            wait_seconds=120 if config.run.simulation else 86_400,
            ema_decay=section.ema_decay,
            seed=config.run.seed,
            simulation=config.run.simulation,
            encoding=section.encoding,
            basis=config.kind.basis,
            max_examples=section.max_examples,
            max_update_norm=section.max_update_norm,
            answer_seconds=section.round_timeout,
            ledgers=None if config.run.simulation else ledgers_path(run),
            registered=dict if config.run.simulation else registered_clients,
        ),
        "weights": weights,
        "run": run,
        "announce": log.say,
        "finish": functools.partial(finish_run, run, setup, log, stores),
    }
    strategy: CoarseStrategy
    if own is not None:
        strategy = own(**options)
    elif config.kind is RunKind.ALONE:
        strategy = TrainingAlone(**options)
    elif config.kind is RunKind.CENTRALISED:
        strategy = CentralisedTraining(setup=setup, **options)
    elif setup.has_gaussians:
        gaussians: type[CoarseGaussians] = SecureGaussians if section.secure else CoarseGaussians
        if setup.has_network:
            gaussians = CoarseNetwork
        strategy = gaussians(setup=setup, **options)
    elif config.kind is RunKind.SERVER:
        strategy = CoarseServerTraining(setup=setup, **options)
    elif section.secure:
        strategy = SecureFedAvg(aggregation=section, **options)
    else:
        strategy = CoarseFedAvg(aggregation=section, **options)
    if resume:
        strategy.resume()
        for line in schedule_lines(config, rounds_done=strategy.rounds_done):
            log.say(line)
    if config.run.trackers:
        first = strategy.book.first_round
        strategy.track(open_trackers(config, run.root, first_round=first, say=log.say))
    return strategy


def server_components(
    context: Context, *, strategy: type[CoarseStrategy] | None = None
) -> ServerAppComponents:
    """Strategy and number of rounds for this run; `strategy` as `own` of `build_strategy`."""
    config = run_config_of(context.run_config)
    run = RunDirectory(run_root(context.run_config, config, context.run_id))
    stores = [
        ReleaseStore(release_path(context.run_config, run, client))
        for client in range(config.partition.num_clients if config.run.simulation else 0)
    ]
    resume = is_resumed(context.run_config)
    made = build_strategy(config, run, resume=resume, stores=stores, own=strategy)
    manager = SimpleClientManager()
    server = (
        SecureServer(client_manager=manager, strategy=made)
        if isinstance(made, SecureRounds)
        else StreamingServer(client_manager=manager, strategy=made)
    )
    # A thread waits for each answer: with Flower's default only a few clients would work at once.
    server.set_max_workers(max(32, config.partition.num_clients))
    return ServerAppComponents(
        server=server,
        config=ServerConfig(
            num_rounds=made.rounds_left(), round_timeout=config.aggregation.round_timeout
        ),
    )


def server_fn(context: Context) -> ServerAppComponents:
    """What Flower asks for: see `server_components`."""
    return server_components(context)


app = ServerApp(server_fn=server_fn)
