"""What makes runs quick that a test makes for itself: no waiting for the disk, no pictures."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fedpdm.storage.files import appearing

__all__ = ["quick_runs"]

RUN_FILES = "fedpdm.reporting.run_files"


@contextlib.contextmanager
def quick_runs(*, pictures: bool) -> Iterator[None]:
    """Here, but not in other processes. Without `pictures`, a run's are files of no content.

    What is written is written: only a power cut would tell the difference.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # refuses what is no open file
        if not pictures and RUN_FILES in sys.modules:
            patch.setattr(f"{RUN_FILES}.draw_partition", _no_picture)
            patch.setattr(f"{RUN_FILES}.draw_image_grid", _no_picture)
        yield


def _no_picture(path: Path, *_: Any, **__: Any) -> None:
    with appearing(path) as unfinished:
        Path(unfinished).write_bytes(b"no picture")
