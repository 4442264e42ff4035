"""The images that an attack is judged on: some that trained a model, and as many that did not.

Members are read from what the run recorded when it trained (`fedpdm.data.members`) and their
digests compared with the data set. Non-members are the client's own held-out images; where it has
none, images that no client holds (what the config leaves over, else the test split). Both are
matched: equally many of each class and client, so that an attack cannot win by telling classes
apart.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fedpdm.config import ConfigError, RunKind
from fedpdm.data import ImageSet
from fedpdm.data.loading import load_public, load_split
from fedpdm.data.members import MemberRecord, check_members, read_members
from fedpdm.storage.run_directory import RunDirectory

__all__ = ["Subjects", "matched_pairs", "open_subjects", "read_records"]

Index = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Subjects:
    """N members and N non-members; row i of both is of one class and client.

    Images uint8 (N, C, H, W), labels int64 (N,); `source` says where the non-members are from.
    """

    members: NDArray[np.uint8]
    member_labels: Index
    non_members: NDArray[np.uint8]
    non_member_labels: Index
    source: str

    def __len__(self) -> int:
        return len(self.members)

    def digest(self) -> str:
        """SHA-256 over pixels and labels: results are kept for these subjects alone."""
        sha = hashlib.sha256()
        for array in (
            self.members, self.member_labels, self.non_members, self.non_member_labels,
        ):  # fmt: skip
            sha.update(f"{array.shape}{array.dtype.str}".encode())
            sha.update(np.ascontiguousarray(array).data)
        return sha.hexdigest()

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Labels of members and of non-members, int64 (N,) each."""
        return torch.tensor(self.member_labels), torch.tensor(self.non_member_labels)


def matched_pairs(
    members: Index, others: Index, *, most: int, rng: np.random.Generator
) -> tuple[Index, Index]:
    """(rows of members, rows of others), each (n,), n at most `most`: as many of each cell.

    `members` and `others` are the cells, integers (N,) and (M,), such as class and client in one.
    Which images of a cell are taken, and which cells if there are more than `most`, is drawn.
    """
    left, right = [], []
    for cell in np.intersect1d(members, others):
        a, b = (rng.permutation(np.flatnonzero(cells == cell)) for cells in (members, others))
        count = min(len(a), len(b))
        left.append(a[:count])
        right.append(b[:count])
    if not left:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    first, second = np.concatenate(left), np.concatenate(right)
    chosen = np.sort(rng.permutation(len(first))[:most])
    return first[chosen], second[chosen]


def read_records(run: RunDirectory, images: ImageSet, *, role: str) -> tuple[MemberRecord, ...]:
    """Who was a member of the `role` model (coarse or fine), a record per client, checked.

    `StoreError`, one line, where the run has no such record or the data set has changed.
    """
    config = run.config()
    if role == "coarse" and config.kind is RunKind.CENTRALISED:
        path = run.root / "server" / "members.json"
        records = read_members(path)
    else:
        path = run.root / "clients"
        records = tuple(
            record
            for client in range(config.partition.num_clients)
            for record in read_members(run.client_path(client) / "members.json")
        )
    check_members(records, images, what=str(path))
    untrained = [record.client_id for record in records if role not in record.trained]
    if untrained:
        raise ConfigError(f"{path}: client {untrained[0]} trained no {role} model")
    return records


def open_subjects(
    run: RunDirectory,
    images: ImageSet,
    records: Sequence[MemberRecord],
    clients: Sequence[int],
    *,
    most: int,
    rng: np.random.Generator,
) -> Subjects:
    """Members and non-members of these clients, matched per class and client.

    `images` is the run's `train` split. `ValueError`, one line, if no non-member is left.
    """
    every = {bytes.fromhex(digest) for record in records for digest in record.train.digests}
    chosen = [record for record in records if record.client_id in clients]
    held_out = any(len(record.heldout) for record in chosen)
    pool, source = images, "held-out images of the same client"
    if not held_out:
        pool, source = _unheld(run)
    trained = np.concatenate([record.train.positions for record in records])
    came = {bytes(row) for row in images.image_identities()[trained]}
    both = zip(pool.image_digests(), pool.image_identities(), strict=True)
    known = np.array([bytes(row) in every or bytes(other) in came for row, other in both])
    free = rng.permutation(np.flatnonzero(~known))  # also no image of an equal one that trained
    member_rows, other_rows = [], []
    for record in chosen:
        rows = record.train.positions
        others = np.intersect1d(record.heldout.positions, free) if held_out else free
        a, b = matched_pairs(images.labels[rows], pool.labels[others], most=len(rows), rng=rng)
        member_rows.append(rows[a])
        other_rows.append(others[b])
        if not held_out:
            free = np.setdiff1d(free, others[b])
    first, second = np.concatenate(member_rows), np.concatenate(other_rows)
    if len(first) == 0:
        raise ValueError(
            f"{run.root}: no non-members of the classes of client "
            f"{', '.join(map(str, clients))} are left; train with data.holdout_fraction 0.5"
        )
    kept = np.sort(rng.permutation(len(first))[:most])
    return Subjects(
        members=images.images[first[kept]],
        member_labels=images.labels[first[kept]],
        non_members=pool.images[second[kept]],
        non_member_labels=pool.labels[second[kept]],
        source=source,
    )


def _unheld(run: RunDirectory) -> tuple[ImageSet, str]:
    """Images that no client holds, and what they are."""
    config = run.config()
    try:
        return load_public(config, count=20_000), "training images that no client holds"
    except ConfigError:
        return load_split(config, "test"), "test images"
