"""What an export says of how many images of each class its client has: exactly, or with noise."""

from __future__ import annotations

import numpy as np

from fedpdm.config import RunConfig
from fedpdm.privacy.counts import noised_counts
from fedpdm.setup.build import coarse_share
from fedpdm.storage.client_store import ClientStore
from fedpdm.storage.files import StoreError

__all__ = ["exported_share"]


def exported_share(
    config: RunConfig, store: ClientStore, *, num_classes: int, epsilon: float | None
) -> list[float] | None:
    """`coarse_share` of the client, by class and for no label; with `epsilon` of noised counts.

    None without `sampling.coarse_worth`. `ValueError`, one line, for an epsilon without it, and for
    a store whose counts are missing or of other classes.
    """
    if config.sampling.coarse_worth is None:
        if epsilon is not None:
            raise ValueError(
                "counts_epsilon: sampling.coarse_worth is not set, so the export holds no counts"
            )
        return None
    counts = store.load_class_counts()
    if counts is None or len(counts) != num_classes:
        raise StoreError(
            f"{store.root / 'classes.json'}: sampling.coarse_worth needs {num_classes} counts of "
            f"images, found {'no file' if counts is None else len(counts)}"
        )
    if epsilon is not None:
        with store.lock():
            counts = _noised(store, counts, epsilon)
    labels = np.repeat(np.arange(num_classes), counts)
    share = coarse_share(config, labels, num_classes=num_classes)
    return None if share is None else share.tolist()


def _noised(store: ClientStore, counts: np.ndarray, epsilon: float) -> np.ndarray:
    """Counts with noise, int64 (K,): drawn once for these counts and this epsilon, and kept.

    Were they drawn anew each time, their mean would give the counts away.
    """
    name, part = "classes-noised", "noised classes"
    draws = (store.load_record(name, part=part) or {}).get("draws", [])
    made_for = {"counts": counts.tolist(), "epsilon": epsilon}
    for known in draws:
        if made_for.items() <= known.items():
            return np.array(known["noised"], dtype=np.int64)
    noised = [int(count) for count in noised_counts(counts.tolist(), epsilon=epsilon)]
    store.save_record(name, {"draws": [*draws, {**made_for, "noised": noised}]}, part=part)
    return np.array(noised, dtype=np.int64)
