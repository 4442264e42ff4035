"""Small federations of the baselines, run in this process, with all that was sent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from clients.local import LocalClient, open_local_client
from fedpdm.config import RunConfig
from fedpdm.diffusion.denoisers import Denoiser
from fedpdm.engines import inprocess
from fedpdm.engines.inprocess import run_in_process
from fedpdm.setup.build import build_denoiser
from fedpdm.setup.run_setup import set_up
from fedpdm.storage.files import read_tensors
from tests.support.federations import flat, node, small_config

CPU = torch.device("cpu")
DELTA = 1e-5
EPSILON = 3.0  # calibrating the noise takes a third of the time that 10 takes

KINDS: dict[str, dict[str, Any]] = {
    "pfdm": {},
    "alone": {"training": "none"},
    "centralised": {"images": "raw", "training": "server"},
    "fedavg": {"images": "raw"},
    "dp_sgd": {"images": "dp_sgd"},
}
BASELINES = tuple(kind for kind in KINDS if kind != "pfdm")


def baseline(kind: str, **sections: dict[str, Any]) -> RunConfig:
    """Two clients with 54 training images each, of 60."""
    given: dict[str, dict[str, Any]] = {
        "data": {"max_images": 120},
        "partition": {
            "kind": "iid", "num_clients": 2, "majority_classes": None, "majority_ratio": None,
        },
        "privacy": {"epsilon": EPSILON},
        "coarse": KINDS[kind],
        "evaluation": {"image_metrics": False},
    }  # fmt: skip
    for name, values in sections.items():
        given[name] = {**given.get(name, {}), **values}
    return small_config(**given)


def local_of(config: RunConfig, out: Path, client: int) -> LocalClient:
    return open_local_client(node(config, client), flat(config, out), 0)


def untrained(config: RunConfig) -> Denoiser:
    """The shared model that a run begins with."""
    return build_denoiser(set_up(config), "coarse")


def final_weights(out: Path) -> dict[str, torch.Tensor]:
    return read_tensors(out / "coarse.safetensors")[0]


def distance(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """L2 distance of two models."""
    assert a.keys() == b.keys()
    return sum(float((a[name] - b[name]).detach().double().square().sum()) for name in a) ** 0.5


def spied_run(config: RunConfig, out: Path) -> list[tuple[str, list[bytes], list[bytes]]]:
    """Run; what each fit and evaluate request carried, and what its answer did."""
    sent: list[tuple[str, list[bytes], list[bytes]]] = []

    def spy(kind: str) -> Any:
        real = getattr(inprocess._LocalProxy, kind)

        def asked(self: object, ins: Any, *rest: Any, **named: Any) -> Any:
            answer = real(self, ins, *rest, **named)
            back = answer.parameters.tensors if kind == "fit" else []
            sent.append((kind, list(ins.parameters.tensors), list(back)))
            return answer

        return asked

    with pytest.MonkeyPatch.context() as patch:
        for kind in ("fit", "evaluate"):
            patch.setattr(inprocess._LocalProxy, kind, spy(kind))
        run_in_process(config, out)
    return sent


@contextmanager
def failing_request(number: int) -> Iterator[None]:
    """In the block, the connection breaks at the fit request of this number."""
    real, asked = inprocess._LocalProxy.fit, []

    def fit(self: object, *args: Any, **named: Any) -> Any:
        asked.append(1)
        if len(asked) == number:
            raise ConnectionError("the client is gone")
        return real(self, *args, **named)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inprocess._LocalProxy, "fit", fit)
        yield
