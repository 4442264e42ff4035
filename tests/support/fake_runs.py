"""A finished run directory with two clients' models and stores, made in no time."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpdm.config import RunConfig, config_from_mapping
from fedpdm.data import ImageSet
from fedpdm.diffusion.denoisers import Denoiser
from fedpdm.diffusion.training import Trainer
from fedpdm.privacy.events import release_parameters
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.privacy.statement import client_statement, plain_text, run_statement
from fedpdm.setup.build import build_denoiser, build_optimizer_settings
from fedpdm.setup.run_setup import set_up
from fedpdm.storage.client_store import ClientStore, Reply
from fedpdm.storage.files import write_tensors
from fedpdm.storage.run_directory import RunDirectory
from tests.support.toys import seeded


class FakeRun:
    """A finished run directory, made by the classes that make real ones."""

    def __init__(self, root: Path, **sections: Any) -> None:
        self.config: RunConfig = config_from_mapping(
            {
                "name": "fake",
                "partition": {"num_clients": 2},
                "privacy": {"epsilon": None, "t0": 600},
                "coarse": {"preset": "tiny"},
                "fine": {"preset": "tiny", "prediction": "epsilon"},
                "sampling": {"guidance": 1.5},
                **sections,
            }
        )
        self.run = RunDirectory(root)
        self.run.open(self.config, resume=False)
        self.setup = set_up(self.config)
        self.schedule, self.spec = self.setup.schedule, self.setup.spec
        self.plan = self.setup.release_plan
        self.coarse = self._trained("coarse", seed=3)
        write_tensors(root / "coarse.safetensors", self.coarse.ema())
        self.fine: dict[int, Trainer] = {}
        self.images: dict[int, ImageSet] = {}
        for client in (0, 2):
            self.fine[client] = self._trained("fine", seed=10 + client)
            self._fill_store(client)
        statement = run_statement(self.config, self.plan, noise_source="seeded")
        self.run.write_json("privacy.json", statement)

    def _trained(self, role: str, *, seed: int) -> Trainer:
        """No steps, but an average that differs from the weights."""
        model = build_denoiser(self.setup, role)
        settings = build_optimizer_settings(self.config, role)
        trainer = Trainer(model, settings, device=torch.device("cpu"))
        generator = seeded(seed)
        for tensor in trainer.ema().values():
            tensor.add_(torch.randn(tensor.shape, generator=generator), alpha=0.02)
        return trainer

    def _fill_store(self, client: int) -> None:
        store = ClientStore(self.run.client_path(client))
        images = ImageSet(
            images=np.random.default_rng(client).integers(0, 256, (4, *self.spec.shape), np.uint8),
            labels=np.zeros(4, dtype=np.int64),
            class_names=("0",),
            background=self.spec.shift,
        )
        request = self.setup.release_request(client=client, allow_new_release=False)
        releases = ReleaseStore(store.root)
        self.images[client] = images
        releases.obtain(images, request)
        statement = client_statement(releases, delta=1e-5)
        with store.lock():
            store.save_statement(statement, plain_text(statement))
            reply = Reply(round=3, payload=b"", num_examples=4, metrics={}, request="")
            store.finish_round(reply, {"fine": self.fine[client].state()})

    def release_again(self, client: int, *, t0: int) -> None:
        """Noise the client's images at another t0; its store goes back to the run's statement."""
        parameters = release_parameters(
            self.schedule, t0=t0, clip_norm=self.plan.clip_norm, shift=self.plan.shift
        )
        plan = dataclasses.replace(self.plan, rounds=(parameters,))
        setup = dataclasses.replace(self.setup, plan=plan)
        request = setup.release_request(client=client, allow_new_release=True)
        ReleaseStore(self.run.client_path(client)).obtain(self.images[client], request)

    def averaged(self, trainer: Trainer) -> Denoiser:
        """The denoiser with the average as its weights."""
        trainer.load_weights(trainer.ema(), what="EMA")
        return trainer.model.eval()
