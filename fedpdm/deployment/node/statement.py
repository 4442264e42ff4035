"""The privacy statement for exactly one node's images under a federation's config."""

from __future__ import annotations

import dataclasses
import hashlib
from typing import Any

from fedpdm.config import RunConfig
from fedpdm.data import ImageSet
from fedpdm.deployment.policy import NodePolicy, check_total
from fedpdm.privacy.accountant import compose
from fedpdm.privacy.noise import SystemNoise
from fedpdm.privacy.planning import ReleasePlan, build_release_request
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.privacy.statement import group_epsilons, plain_text, run_statement, warning_about
from fedpdm.privacy.types import PrivacyEvent

__all__ = ["check_spending", "images_sha256", "node_statement", "statement_text"]


def images_sha256(images: ImageSet) -> str:
    """SHA-256 over the sorted digests of the images: which images, in whatever order."""
    rows = sorted({bytes(row) for row in images.image_digests()})
    return hashlib.sha256(b"".join(rows)).hexdigest()


def check_spending(
    policy: NodePolicy,
    config: RunConfig,
    plan: ReleasePlan,
    store: ReleaseStore,
    images: ImageSet,
    *,
    client_id: int,
) -> float:
    """Epsilon, at the policy's delta, of the image that would have paid most after the release.

    `PolicyError` if that is beyond the policy; `StoreError` if the store would refuse the release.
    Writes nothing.
    """
    request = build_release_request(
        config, plan, client=client_id, allow_new_release=policy.allow_new_release
    )
    request = dataclasses.replace(request, delta=policy.delta)
    after = store.preview(images, request).epsilon_after
    total = max(after, store.spent(delta=policy.delta).largest)
    check_total(policy, total)
    return total


def node_statement(
    config: RunConfig,
    plan: ReleasePlan,
    store: ReleaseStore,
    images: ImageSet,
    *,
    client_id: int,
    allow_new_release: bool,
    raw_metrics: bool,
) -> dict[str, Any]:
    """What this node would promise its data subjects, after the release that the config asks for.

    `images` are its distinct images. Epsilon counts what they have spent before.
    """
    request = build_release_request(
        config, plan, client=client_id, allow_new_release=allow_new_release
    )
    preview = store.preview(images, request)
    spent = store.spent(delta=config.privacy.delta)
    statement = run_statement(config, plan, noise_source=SystemNoise.description, stores=[store])
    delta = config.privacy.delta

    def again(count: int) -> PrivacyEvent | None:
        """What was spent, and this release once more."""
        before = spent.group_event(count) if preview.again else None
        return compose([before, plan.group_event(count)]) if before is not None else None

    statement |= {
        "client_id": client_id,
        "epsilon": max(preview.epsilon_after, spent.largest),
        "group_epsilon": group_epsilons([plan.group_event, spent.group_event, again], delta=delta),
        "images": len(images),
        "images_released_before": preview.known,
        "images_released_now": preview.fresh,
        "images_released_again": preview.again,
        "raw_metrics": raw_metrics,
    }
    statement.pop("delta_warning", None)  # of those that were released before
    return statement | warning_about(delta, images=len(images))


def statement_text(statement: dict[str, Any], counts: dict[str, int]) -> str:
    """The statement in plain words, with what it is about first."""
    classes = ", ".join(f"{name}: {count}" for name, count in counts.items())
    again = statement["images_released_again"]
    lines = [
        "",
        f"This node is client {statement['client_id']}. It holds {statement['images']:,} distinct "
        "images.",
        f"By class: {classes}.",
        f"Already released with these settings: {statement['images_released_before']:,}; would be "
        f"released now: {statement['images_released_now']:,}.",
    ]
    if again:
        lines.append(f"WOULD BE RELEASED ONCE MORE: {again:,} images; see what they have spent.")
    lines.append(
        "Metrics computed on raw images would be sent: this node's policy allows them."
        if statement["raw_metrics"]
        else "Metrics computed on raw images are not sent."
    )
    title, _, rest = plain_text(statement).partition("\n")
    return "\n".join([title, *lines, rest])
