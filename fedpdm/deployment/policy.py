"""A node's own bounds, whatever the coordinator's config asks for.

    mechanisms: [images]   # what may be released, as `privacy.release` names it
    max_epsilon: 10        # of any one image, all its releases together; or none
    delta: 1e-5            # at which that epsilon is counted
    min_t0: 600            # of mechanisms that have one; or none
    allow_raw_metrics: false
    allow_new_release: false
    test_images: false     # whether one in ten of the node's images is set aside for tests
    code: [6f0c...]        # further digests of bundles that may ask (fedpdm node digest)
    modules: [mypackage]   # installed here, of which a config may name code (package.module:NAME)

`max_epsilon` and `min_t0` must stand in the file: one that is empty or was cut short is refused.
A config that asks for more is refused before anything is released, at `fedpdm node check` and by
the client app for every message. `code` is for bundles other than the installed one: what runs is
always the installed code (`fedpdm.engines.deployed.guard`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from fedpdm.config import ConfigError, RunConfig, key, own_code, read_policy
from fedpdm.privacy.accountant import epsilon_spent
from fedpdm.privacy.mechanism import IMAGES, event_of, mechanism_named, mechanism_of
from fedpdm.privacy.planning import plan_release
from fedpdm.setup.run_setup import build_schedule

__all__ = [
    "NodePolicy",
    "PolicyError",
    "check_code",
    "check_config",
    "check_total",
    "load_policy",
    "objections",
]

_DIGEST = re.compile(r"[0-9a-f]{64}\Z")


class PolicyError(ConfigError):
    """A run asks for more than a node allows; the text names the config and the bound alone."""


@dataclass(frozen=True, kw_only=True)
class NodePolicy:
    """What a node's operator allows; the default bounds nothing but raw metrics and releases, and
    allows releases of images alone."""

    mechanisms: tuple[str, ...] = key((IMAGES,), "releases allowed, by `privacy.release`")
    max_epsilon: float | None = key(
        None, "largest epsilon of any image, in all", above=0.0, stated=True
    )
    delta: float = key(1e-5, "delta at which it is counted", above=0.0, below=1.0)
    min_t0: int | None = key(None, "smallest number of noising steps", low=1, stated=True)
    allow_raw_metrics: bool = key(False, "metrics on raw images may leave")
    allow_new_release: bool = key(False, "released images may be noised once more")
    test_images: bool = key(False, "one in ten of the node's images is set aside as a test image")
    code: tuple[str, ...] = key((), "digests of further app bundles that may ask")
    modules: tuple[str, ...] = key((), "packages of which a config may name code")

    def sets_aside(self, *, image_metrics: bool) -> bool:
        """Whether own images without a split of their own lose one in ten to a test split: where
        the node says so, or allows metrics on raw images in a run that compares with them."""
        return self.test_images or (self.allow_raw_metrics and image_metrics)


def load_policy(path: Path) -> NodePolicy:
    """The policy in a YAML file; `ConfigError` names the file and the key."""
    policy = read_policy(NodePolicy, path)
    assert isinstance(policy, NodePolicy)
    for index, digest in enumerate(policy.code):
        if not _DIGEST.match(digest):
            raise ConfigError(
                f"{path}: code[{index}]: must be a SHA-256 of 64 hexadecimal digits, got {digest!r}"
            )
    for name in policy.mechanisms:  # a ledger may hold releases by each of them
        try:
            mechanism_named(name)
        except ConfigError as error:
            raise ConfigError(f"{path}: mechanisms: {error}") from None
    return policy


def check_code(policy: NodePolicy, config: RunConfig) -> None:
    """`PolicyError` for code that the config names and the policy does not. Imports nothing.

    A release mechanism is named to the letter. A strategy is the coordinator's alone: clients
    never import it, and whatever it does with updates is post-processing.
    """
    if config.privacy.release not in policy.mechanisms:
        raise PolicyError(
            f"privacy.release: {config.privacy.release!r} is not one of the mechanisms of this "
            f"node: {', '.join(policy.mechanisms)}"
        )
    for name, value in own_code(config).items():
        module = value.partition(":")[0]
        allowed = any(f"{module}.".startswith(f"{each}.") for each in policy.modules)
        if name != "aggregation.method" and not allowed:
            raise PolicyError(
                f"{name}: {value} is code of a module that this node's policy does not name "
                "(modules)"
            )


def check_config(policy: NodePolicy, config: RunConfig) -> None:
    """`PolicyError` if the config asks for more than the policy allows. Looks at no image."""
    for check in _CHECKS:
        check(policy, config)


def objections(policy: NodePolicy, config: RunConfig) -> list[str]:
    """All that `check_config` would refuse, a line each; `ConfigError` if it cannot be told."""
    found = []
    for check in _CHECKS:
        try:
            check(policy, config)
        except PolicyError as error:
            found.append(str(error))
    return found


def _check_simulation(_: NodePolicy, config: RunConfig) -> None:
    if config.run.simulation:
        raise PolicyError("run.simulation: true seeds the privacy noise; a node allows false only")


def _check_metrics(policy: NodePolicy, config: RunConfig) -> None:
    if config.evaluation.image_metrics and not policy.allow_raw_metrics:
        raise PolicyError(
            "evaluation.image_metrics: true asks for metrics on raw images; this node allows false "
            "only"
        )


def _check_release(policy: NodePolicy, config: RunConfig) -> None:
    if not config.kind.releases:
        return
    plan = plan_release(config, build_schedule(config))
    for parameters in plan.rounds:
        t0 = mechanism_of(parameters).settings(parameters).get("t0", math.inf)
        if policy.min_t0 is not None and t0 < policy.min_t0:
            raise PolicyError(f"privacy.t0: {t0} is less than the {policy.min_t0} of this node")
    events = [event_of(parameters) for parameters in plan.rounds]
    check_total(policy, epsilon_spent(events, delta=policy.delta))


_CHECKS: tuple[Callable[[NodePolicy, RunConfig], None], ...] = (
    check_code,
    _check_simulation,
    _check_metrics,
    _check_release,
)


def check_total(policy: NodePolicy, epsilon: float) -> None:
    """`PolicyError` if an image that has spent `epsilon`, at the policy's delta, spent too much."""
    if policy.max_epsilon is not None and epsilon > policy.max_epsilon:
        raise PolicyError(
            f"privacy.epsilon: an image would spend {epsilon:.4g} in all at delta "
            f"{policy.delta:g}, more than the {policy.max_epsilon:g} of this node"
        )
