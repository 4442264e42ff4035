"""How often class Gaussians, read as a classifier, are right: by privacy budget and dimensions.

python -m bench.classifier            # docs/method.md section 5: needs MNIST below FEDPDM_DATA
python -m bench.classifier --quick    # the same on 8x8 digits, in seconds

It runs a suite's method `statistics` without own models, and reads what comes out as a classifier
of the suite's test images. A class counts as much as any other.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from fedpdm.api import gaussian_classifier
from fedpdm.config import RunConfig, config_from_mapping, load_suite
from fedpdm.config.suite import merge
from fedpdm.data.loading import load_split
from fedpdm.engines.inprocess import run_in_process
from fedpdm.suites.shared_own import shared_config

__all__ = ["accuracy", "main"]

SUITE: Final = Path(__file__).parents[1] / "experiments" / "colored-mnist.yaml"
EPSILONS: Final = (10.0, 3.0, 1.0)
DIMENSIONS: Final = (768, 300)
QUICK: Final = {
    "name": "quick",
    "run": {"rounds": 3},
    "data": {"name": "digits", "coloring": "none"},
    "partition": {"kind": "iid", "num_clients": 2},
    "privacy": {"release": "statistics", "clip_norm": 6},
    "coarse": {"training": "server"},
    "fine": {"preset": "micro"},
    "evaluation": {"image_metrics": False},
}


def accuracy(config: RunConfig, folder: Path) -> float:
    """Share of right answers on the config's test images, as mean over classes, of the Gaussians
    that a run of it in `folder` makes. No own model is trained."""
    run_in_process(shared_config(config), folder)
    test = load_split(config, "test")
    right = gaussian_classifier(folder).labels(test.images) == test.labels
    return float(np.mean([right[test.labels == k].mean() for k in np.unique(test.labels)]))


def main(words: Sequence[str] | None = None) -> int:
    """Print a line for each budget and number of dimensions."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="8x8 digits, two budgets")
    parser.add_argument("--seed", type=int, default=1, help="of the run; default: %(default)s")
    options = parser.parse_args(words)
    epsilons, dimensions = ((10.0, 1.0), (64, 20)) if options.quick else (EPSILONS, DIMENSIONS)
    print("epsilon  dimensions  right")
    for epsilon, count in itertools.product(epsilons, dimensions):
        change = {
            "run": {"rounds": 3, "seed": options.seed},
            "privacy": {"epsilon": epsilon},
            "statistics": {"dimensions": count},
        }
        if options.quick:
            config = config_from_mapping(merge(QUICK, change))
        else:
            config = load_suite(SUITE).compose(
                "converged", "statistics", seed=options.seed, overrides=[change]
            )
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            found = accuracy(config, Path(folder) / "run")
        print(f"{epsilon:<7g}  {count:<10}  {found:.3f}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
