"""A partition written down: as a table for people and as a record that machines can compare."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedpdm.data.partition.sharing import ClientPartition, checked_labels

__all__ = ["partition_record", "partition_table"]


def partition_record(
    partitions: Sequence[ClientPartition],
    labels: NDArray[np.int64],
    class_names: Sequence[str],
    *,
    settings: Mapping[str, Any],
) -> dict[str, Any]:
    """Who holds what, as plain data.

    `sha256` of a client is over its indices as little-endian int64, ascending; that of the whole
    is over the clients' digests (32 bytes each) in order of client id. Two machines with the same
    digest of the whole share out the images in the same way.

    Args:
        partitions: of `labels`.
        labels: (N,) integers in [0, K).
        class_names: K names.
        settings: what the split was made with; copied to the head of the record.

    Returns:
        `settings`, then `sha256`, `class_names`, `num_images` (N), `left_out` (K numbers of images
        that no client holds) and `clients`: per client `client_id`, `num_images`, `per_class` (K),
        `majority` and `minority` (class numbers), `sha256`. The counts are raw-data statistics and
        are not covered by the privacy guarantee.
    """
    labels = checked_labels(labels, num_classes=len(class_names))
    left_out = np.bincount(labels, minlength=len(class_names))
    whole, clients = hashlib.sha256(), []
    for part in partitions:
        counts = np.bincount(labels[part.indices], minlength=len(class_names))
        left_out = left_out - counts
        digest = hashlib.sha256(part.indices.astype("<i8").tobytes())
        whole.update(digest.digest())
        clients.append(
            {
                "client_id": part.client_id,
                "num_images": len(part),
                "per_class": counts.tolist(),
                "majority": list(part.majority),
                "minority": list(part.minority),
                "sha256": digest.hexdigest(),
            }
        )
    return {
        **settings,
        "sha256": whole.hexdigest(),
        "class_names": list(class_names),
        "num_images": len(labels),
        "left_out": left_out.tolist(),
        "clients": clients,
    }


def partition_table(
    partitions: Sequence[ClientPartition],
    labels: NDArray[np.int64],
    class_names: Sequence[str],
) -> str:
    """Text table of clients x classes: numbers of images, majority classes marked with *.

    Args:
        partitions: of `labels`.
        labels: (N,) integers in [0, K).
        class_names: K names for the columns.

    Returns:
        Lines of one width without a newline at the end; the last row and column are totals. Where
        images were left out, one more line of any width says how many of each class.
        The counts are raw-data statistics and are not covered by the privacy guarantee.

    Raises:
        ValueError: if a label has no name.
    """
    labels = checked_labels(labels, num_classes=len(class_names))
    total = np.zeros(len(class_names), dtype=np.int64)
    rows = [["client", *class_names, "total"]]
    for part in partitions:
        counts = np.bincount(labels[part.indices], minlength=len(class_names))
        total += counts
        marks = ["*" if k in part.majority else " " for k in range(len(class_names))]
        cells = [f"{count}{mark}" for count, mark in zip(counts, marks, strict=True)]
        rows.append([str(part.client_id), *cells, str(counts.sum())])
    rows.append(["total", *(f"{count} " for count in total), str(total.sum())])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(map(str.rjust, row, widths)) for row in rows]
    rule = "  ".join("-" * width for width in widths)
    table = [lines[0], rule, *lines[1:-1], rule, lines[-1]]
    left_out = np.bincount(labels, minlength=len(class_names)) - total
    if left_out.any():
        parts = [f"{count} {name}" for count, name in zip(left_out, class_names, strict=True)]
        table.append(f"Left out, so that classes are equal: {left_out.sum()} ({', '.join(parts)})")
    return "\n".join(table)
