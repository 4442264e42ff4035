"""How much a shared model knows above the hand-over: the error of x0_hat on test images, by t.

    python -m bench.above [--profile converged] [--seed 11] [--method network] [--set KEY=VALUE]

It runs the shared part of a method of `experiments/colored-mnist.yaml`, resumably, and prints one
JSON line: settings, then the mean squared error of the model and of its Gaussians alone. Settings
are searched by this on one seed; tables are made on others. FEDPDM_DATA says where MNIST is.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from pathlib import Path

import torch

from fedpdm.config import config_to_json, load_suite
from fedpdm.config.reading import apply_overrides
from fedpdm.data import normalize
from fedpdm.data.loading import load_split
from fedpdm.diffusion.above_gaussians import NetworkAboveGaussians
from fedpdm.diffusion.gaussian import GaussianDenoiser
from fedpdm.engines.inprocess import run_in_process
from fedpdm.evaluation.levels import BANDS, error_by_level
from fedpdm.setup.build import build_shared
from fedpdm.setup.pair import shared_weights
from fedpdm.setup.run_setup import set_up
from fedpdm.storage.run_directory import RunDirectory
from fedpdm.suites.shared_own import shared_config

SUITE = Path(__file__).resolve().parents[1] / "experiments" / "colored-mnist.yaml"


def measure(
    *, profile: str, seed: int, method: str, settings: list[str], out: Path, images: int
) -> dict[str, object]:
    """The errors after the run, which is begun or gone on with below `out`."""
    changes = apply_overrides({}, settings)
    config = load_suite(SUITE).compose(profile, method, seed=seed, overrides=[changes])
    config = shared_config(config)
    digest = hashlib.sha256(config_to_json(config).encode()).hexdigest()[:10]
    run, started = RunDirectory(out / f"{method}-{digest}"), time.perf_counter()
    if not (run.root / "coarse.safetensors").exists():
        run_in_process(config, run.root, resume=(run.root / "config.yaml").exists())
    test = load_split(config, "test")
    setup = set_up(config, test)
    shared = build_shared(setup, shared_weights(run))
    x_0 = normalize(test.images[:images], shift=setup.spec.shift)
    labels = torch.from_numpy(test.labels[:images].copy())

    def errors(denoiser: GaussianDenoiser) -> list[float]:
        found = error_by_level(denoiser, setup.schedule, x_0, labels, seed=seed)
        return [float(f"{error:.5g}") for error in found]

    found = {"gaussians": errors(GaussianDenoiser(shared.gaussians, setup.schedule))}
    if isinstance(shared, NetworkAboveGaussians):
        found["model"] = errors(shared)
    return {
        "method": method, "profile": profile, "seed": seed, "set": settings,
        "bands": [list(band) for band in BANDS], **found,
        "seconds": round(time.perf_counter() - started),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.above", description=__doc__)
    parser.add_argument("--profile", default="converged")
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--method", default="network")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, default=Path("runs") / "above")
    parser.add_argument("--images", type=int, default=4000)
    options = parser.parse_args()
    found = measure(
        profile=options.profile, seed=options.seed, method=options.method,
        settings=options.set, out=options.out.resolve(), images=options.images,
    )  # fmt: skip
    print(json.dumps(found))


if __name__ == "__main__":
    main()
