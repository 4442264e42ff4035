"""Results of `fedpdm node check`: a line per check, and the parts that later checks need."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from fedpdm.data import ImageSet
from fedpdm.deployment.certificates import NodeCertificate
from fedpdm.deployment.classes import ClassMap
from fedpdm.deployment.invitation import Invitation
from fedpdm.deployment.node.settings import NodeSettings
from fedpdm.deployment.policy import NodePolicy
from fedpdm.privacy.releases import ReleaseStore

__all__ = ["Check", "NodeReport"]


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line: what was looked at, whether it is fine, and what was found or is wrong."""

    name: str
    ok: bool
    detail: str


@dataclass(kw_only=True)
class NodeReport:
    """All checks, and what they found; a part is None where its check failed.

    `statement` is the privacy statement in numbers, `text` in words. `accepted` says whether the
    ledger holds the operator's acceptance of exactly this config. `classes` is None where none are
    compared, too.
    """

    settings: NodeSettings
    checks: list[Check] = field(default_factory=list)
    certificate: NodeCertificate | None = None
    policy: NodePolicy | None = None
    invitation: Invitation | None = None
    classes: ClassMap | None = None
    images: ImageSet | None = None
    store: ReleaseStore | None = None
    statement: dict[str, Any] | None = None
    text: str = ""
    accepted: bool = False

    @property
    def ok(self) -> bool:
        """Whether every check is fine."""
        return all(check.ok for check in self.checks)

    def counts(self) -> dict[str, int]:
        """Distinct images per class, by name; classes without an image count 0."""
        assert self.images is not None
        numbers = np.bincount(self.images.labels, minlength=self.images.num_classes)
        return dict(zip(self.images.class_names, numbers.tolist(), strict=True))
