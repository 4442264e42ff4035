"""What of a node's images must be as in the federation: class names, size, channels, values."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from fedpdm.config import ConfigError
from fedpdm.data import ImageSet
from fedpdm.data.spec import build_image_spec
from fedpdm.deployment.acceptance import acceptance_of
from fedpdm.deployment.classes import (
    ClassMap,
    Pairs,
    accepted_classes,
    agree,
    check_kept_labels,
    federation_classes,
    own_class_names,
)
from fedpdm.deployment.invitation import VALUES, Invitation
from fedpdm.privacy.ledger import Ledger
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.storage.files import StoreError

__all__ = ["compare_classes", "compare_images"]

FEWEST_LEVELS = 16  # of 256; fewer are a file that was scaled otherwise


def compare_classes(
    invitation: Invitation, data: Path, *, given: Pairs, store: Path | None
) -> ClassMap | None:
    """The federation's classes with what they are called in `data`; None if it names none.

    Without `given` those hold that were accepted before, as `store` knows (None: not looked for).
    `ConfigError` for classes that do not agree, `ValueError` or `OSError` if `data` cannot be read.
    """
    names = federation_classes(invitation)
    if names is None:
        if given:
            raise ConfigError("--classes: the invitation names no classes to compare with")
        return None
    config, here = invitation.config, own_class_names(invitation.config, data)
    ledger = None if store is None else _ledger_or_none(store)
    before = accepted_classes(acceptance_of(ledger, config)) if ledger else None
    if before is not None and before.names == names and not given:
        given = before.pairs
    found = agree(names, here, given, selects=config.data.classes is not None)
    if ledger is not None and store is not None:
        check_kept_labels(store, ledger, config, found, here)
    return found


def _ledger_or_none(store: Path) -> Ledger | None:
    """None of a store that cannot be read, which another check says."""
    try:
        return ReleaseStore(store).ledger()
    except StoreError:
        return None


def compare_images(invitation: Invitation, images: ImageSet) -> str:
    """Words about the pixels' values; `ConfigError` for the first thing that differs from what the
    invitation says of its images. What it does not say is not compared."""
    stated = dict(invitation.images or {})
    stated.pop("class_names", None)  # `compare_classes`
    values = stated.pop("values", None)
    spec = asdict(build_image_spec(invitation.config, images))
    for name, value in stated.items():
        if spec.get(name) != value:
            raise ConfigError(f"data: {name} is {spec.get(name)} here, {value} in the federation")
    return _compare_values(images, values)


def _compare_values(images: ImageSet, stated: Any) -> str:
    low, high = int(images.images.min()), int(images.images.max())
    if stated is None:
        return f"values {low} to {high}, NOT compared: the invitation states no range"
    if stated != list(VALUES):
        raise ConfigError(f"data: values are {list(VALUES)} here, {stated!r} in the federation")
    if high - low < FEWEST_LEVELS:
        raise ConfigError(
            f"data: values are {low} to {high} here, {VALUES[0]} to {VALUES[1]} in the federation: "
            f"must span at least {FEWEST_LEVELS}; the files are scaled otherwise"
        )
    return f"values {low} to {high}"
