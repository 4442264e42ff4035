"""Share the images of one set out to the clients of a simulated federation.

Four kinds, of increasing skew, and one that is not drawn:

* `own`: one client, everything (a real client that reads its own folder).
* `iid`: a random permutation cut into parts whose sizes differ by at most one.
* `dirichlet`: for each class, shares over the clients drawn from `Dir(alpha)` (Hsu, Qi and
  Brown 2019, "Measuring the effects of non-identical data distribution", with the roles of
  class and client exchanged as in Yurochkin et al. 2019). Small alpha: few clients per class.
* `majority_minority`: each client has its majority classes, of which it gets `majority_ratio`
  times as many images as a client for which the class is minority (the split of PFDM's
  experiments, docs/method.md section 5; its ratios are not published).
* `given`: as the data say it, clients in the order of their names (numbers by value).

Every image goes to exactly one client, and every client gets at least one; with
`majority_minority` at least one of each class. `balanced` leaves out images first, so that there
are equally many of each class over all clients; then the shares of kind `kind` are drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedpdm.config.names import PARTITIONS, PartitionKind
from fedpdm.data.finding import in_order

__all__ = ["ClientPartition", "checked_labels", "partition"]

_NAMES_SHOWN: Final = 8
_PARAMETERS: Final[dict[str, tuple[str, ...]]] = {
    "iid": (),
    "dirichlet": ("alpha",),
    "majority_minority": ("majority_classes", "majority_ratio"),
    "own": (),
    "given": (),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class ClientPartition:
    """What one client holds.

    Attributes:
        client_id: 0 to num_clients - 1.
        indices: (n,) int64 positions in the labels that were shared out, ascending, n >= 1,
            read-only.
        majority: classes that the client is rich in, ascending.
        minority: all other classes, ascending, those of which it holds no image included.
    """

    client_id: int
    indices: NDArray[np.int64]
    majority: tuple[int, ...]
    minority: tuple[int, ...]

    def __post_init__(self) -> None:
        indices = np.sort(np.asarray(self.indices, dtype=np.int64))
        indices.flags.writeable = False
        object.__setattr__(self, "indices", indices)

    def __len__(self) -> int:
        """Number of images n."""
        return len(self.indices)


def partition(
    labels: NDArray[np.int64],
    *,
    kind: PartitionKind,
    num_clients: int,
    num_classes: int,
    rng: np.random.Generator,
    alpha: float | None = None,
    majority_classes: int | None = None,
    majority_ratio: float | None = None,
    balanced: bool = False,
    class_names: Sequence[str] = (),
    owners: Sequence[str] | None = None,
) -> tuple[ClientPartition, ...]:
    """Share out N images.

    Args:
        labels: (N,) integers in [0, num_classes).
        kind: one of `PARTITIONS`, see the module.
        num_clients: M, in [1, N]; exactly 1 for `own`.
        num_classes: K >= 1.
        rng: decides which images go where; equal states give equal partitions.
        alpha: for `dirichlet` alone: concentration > 0, finite.
        majority_classes: for `majority_minority` alone: classes per client, in [1, K]. Client
            m has the classes (m * majority_classes + j) mod K, so that the numbers of clients
            for which a class is majority differ by at most one between classes.
        majority_ratio: for `majority_minority` alone: >= 1, finite.
        balanced: keep of each class only as many images, drawn at random, as the rarest has.
        class_names: K names for error messages.
        owners: for `given`: N names of clients; left aside by the other kinds.

    Returns:
        M partitions in order of client_id. For `iid` and `own` every class is majority; for
        `dirichlet` and `given` those are of which the client holds at least its mean count, n / K.

    Raises:
        ValueError: for a parameter that is missing, out of bounds or not of this kind, or a class
            of which a client that needs one would get no image.
    """
    everyone = checked_labels(labels, num_classes=num_classes)
    kept = np.arange(len(everyone))
    if balanced:
        kept = _balanced_positions(everyone, num_classes, class_names, rng=rng)
    labels = everyone[kept]
    _check_num_clients(num_clients, num_images=len(labels), kind=kind)
    given = {
        "alpha": alpha,
        "majority_classes": majority_classes,
        "majority_ratio": majority_ratio,
    }
    _check_parameters(given, kind=kind, num_classes=num_classes)

    everything = tuple(range(num_classes))
    majorities = [everything] * num_clients
    if kind == "given":
        holders = _given(owners, num_clients=num_clients)[kept]
    elif kind == "own":
        holders = np.zeros(len(labels), dtype=np.int64)
    elif kind == "iid":
        holders = rng.permutation(np.arange(len(labels)) % num_clients)
    elif kind == "dirichlet":
        shares = rng.dirichlet(np.full(num_clients, alpha), size=num_classes)  # (K, M)
        holders = _assign(labels, shares, rng=rng)
    else:
        assert majority_classes is not None  # _check_parameters
        assert majority_ratio is not None
        majorities = [
            tuple(sorted((m * majority_classes + j) % num_classes for j in range(majority_classes)))
            for m in range(num_clients)
        ]
        _check_every_group(labels, num_clients, num_classes, majorities, class_names)
        shares = np.ones((num_classes, num_clients))
        for m, majority in enumerate(majorities):
            shares[list(majority), m] = majority_ratio
        holders = _assign(labels, shares, rng=rng, each_one=True)
    _give_each_one(holders, num_clients=num_clients, rng=rng)

    if kind in ("dirichlet", "given"):
        counts = _class_counts(holders, labels, num_clients=num_clients, num_classes=num_classes)
        majorities = [
            tuple(np.flatnonzero(row * num_classes >= row.sum()).tolist()) for row in counts
        ]
    return tuple(
        ClientPartition(
            client_id=m,
            indices=kept[holders == m],
            majority=majority,
            minority=tuple(k for k in everything if k not in majority),
        )
        for m, majority in enumerate(majorities)
    )


def _given(owners: Sequence[str] | None, *, num_clients: int) -> NDArray[np.int64]:
    """(N,) number of the client that holds each image, by the order of their names."""
    if not owners:
        raise ValueError(
            "partition.kind: given needs data that say who holds what: data.name: client_folders, "
            "or a CSV file with a column client"
        )
    names = in_order(owners)
    if len(names) != num_clients:
        raise ValueError(
            f"partition.num_clients: must be {len(names)}, the clients of the data "
            f"({', '.join(names[:_NAMES_SHOWN])}{', ...' if len(names) > _NAMES_SHOWN else ''}), "
            f"got {num_clients}"
        )
    number = {name: each for each, name in enumerate(names)}
    return np.array([number[name] for name in owners], dtype=np.int64)


def _balanced_positions(
    labels: NDArray[np.int64],
    num_classes: int,
    class_names: Sequence[str],
    *,
    rng: np.random.Generator,
) -> NDArray[np.int64]:
    """Ascending positions of equally many images of each class: as many as the rarest has."""
    counts = np.bincount(labels, minlength=num_classes)
    if len(labels) and counts.min() == 0:
        label = int(np.argmin(counts))
        raise ValueError(
            f"balanced needs at least 1 image of each class, {_name(label, class_names)} has none"
        )
    kept = [
        rng.permutation(np.flatnonzero(labels == label))[: counts.min()]
        for label in range(num_classes)
    ]
    return np.sort(np.concatenate(kept))


def _assign(
    labels: NDArray[np.int64],
    shares: NDArray[np.float64],
    *,
    rng: np.random.Generator,
    each_one: bool = False,
) -> NDArray[np.int64]:
    """(N,) owner of each image, class by class in proportion to `shares` (K, M).

    With `each_one` a client whose share is less than one image gets one, and the others share
    the rest in proportion; there must be at least M images of each class.

    Whole numbers by largest remainder; of equal remainders, clients with fewer images so far
    come first, then chance, so that no client collects the leftovers of all classes.
    """
    num_classes, num_clients = shares.shape
    owners = np.empty(len(labels), dtype=np.int64)
    totals = np.zeros(num_clients, dtype=np.int64)
    for label in range(num_classes):
        members = rng.permutation(np.flatnonzero(labels == label))
        quota = shares[label] / shares[label].sum() * len(members)
        if each_one and quota.min() < 1:
            quota = _at_least_one(quota)
        counts = np.floor(quota).astype(np.int64)
        left = len(members) - int(counts.sum())
        chance = rng.permutation(num_clients)
        order = np.lexsort((chance, totals, counts - quota))
        counts[order[:left]] += 1
        totals += counts
        owners[members] = np.repeat(np.arange(num_clients), counts)
    return owners


def _at_least_one(quota: NDArray[np.float64]) -> NDArray[np.float64]:
    """(M,) with the same sum >= M: `max(1, c quota)` for the c that keeps the sum."""
    raised = quota.copy()
    small = np.zeros(len(quota), dtype=bool)
    while (raised < 1).any():
        small |= raised < 1
        raised[small] = 1.0
        left = quota.sum() - small.sum()
        raised[~small] = quota[~small] / quota[~small].sum() * left
    return raised


def _give_each_one(
    owners: NDArray[np.int64], *, num_clients: int, rng: np.random.Generator
) -> None:
    """Give each client without an image one, drawn from the client with most; in place."""
    totals = np.bincount(owners, minlength=num_clients)
    for empty in np.flatnonzero(totals == 0):
        richest = int(np.argmax(totals))
        owners[rng.choice(np.flatnonzero(owners == richest))] = empty
        totals[richest] -= 1
        totals[empty] += 1


def _class_counts(
    owners: NDArray[np.int64], labels: NDArray[np.int64], *, num_clients: int, num_classes: int
) -> NDArray[np.int64]:
    """(M, K) images of each class at each client."""
    cells = np.bincount(owners * num_classes + labels, minlength=num_clients * num_classes)
    return cells.reshape(num_clients, num_classes)


def checked_labels(labels: NDArray[np.int64], *, num_classes: int) -> NDArray[np.int64]:
    labels = np.asarray(labels)
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise ValueError(
            f"labels must be integers of shape (N,), got {labels.dtype} of shape {labels.shape}"
        )
    outside = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if outside.size:
        at = int(outside[0])
        raise ValueError(f"labels[{at}] must be in [0, {num_classes}), got {labels[at]}")
    return labels.astype(np.int64)


def _check_num_clients(num_clients: int, *, num_images: int, kind: str) -> None:
    if kind not in PARTITIONS:
        raise ValueError(f"kind must be one of {', '.join(PARTITIONS)}, got {kind!r}")
    if num_clients < 1:
        raise ValueError(f"num_clients must be at least 1, got {num_clients}")
    if num_clients > num_images:
        raise ValueError(
            f"num_clients must be at most the number of images, {num_images}, got {num_clients}"
        )
    if kind == "own" and num_clients != 1:
        raise ValueError(f"num_clients must be 1 for kind own, got {num_clients}")


def _check_every_group(
    labels: NDArray[np.int64],
    num_clients: int,
    num_classes: int,
    majorities: Sequence[tuple[int, ...]],
    class_names: Sequence[str],
) -> None:
    """Refuse a class with too few images for every client to have one."""
    counts = np.bincount(labels, minlength=num_classes)
    for label in np.flatnonzero(counts < num_clients):
        client = int(counts[label])  # one image for each client before
        group = "majority" if label in majorities[client] else "minority"
        raise ValueError(
            f"majority_minority gives each client an image of each class: client {client} would "
            f"have none of its {group} {_name(int(label), class_names)}, of which there "
            f"{'is' if client == 1 else 'are'} {client} for {num_clients} clients"
        )


def _name(label: int, class_names: Sequence[str]) -> str:
    return f"class {label} ({class_names[label]})" if class_names else f"class {label}"


def _check_parameters(given: dict[str, float | None], *, kind: str, num_classes: int) -> None:
    """`given` maps each parameter of any kind to its value or None."""
    for name, value in given.items():
        if name not in _PARAMETERS[kind]:
            if value is not None:
                raise ValueError(f"{name} must be left out for kind {kind}, got {value}")
            continue
        if value is None:
            raise ValueError(f"{name} must be given for kind {kind}")
        if name == "alpha" and not (value > 0 and math.isfinite(value)):
            raise ValueError(f"alpha must be greater than 0 and finite, got {value}")
        if name == "majority_ratio" and not (value >= 1 and math.isfinite(value)):
            raise ValueError(f"majority_ratio must be at least 1 and finite, got {value}")
        if name == "majority_classes" and not (
            isinstance(value, int) and 1 <= value <= num_classes
        ):
            raise ValueError(f"majority_classes must be in [1, {num_classes}], got {value}")
