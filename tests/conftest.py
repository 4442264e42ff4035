"""Fixtures for all tests."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

# One thread each, in processes that tests start too: sums depend on the number of threads.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

torch.set_num_threads(1)

# A shell starts background jobs with SIGINT ignored, and children inherit that; interruptions are
# tested all the same.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Whatever the code under test sets, fixtures of the next test have one thread again."""
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)
