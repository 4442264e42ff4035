"""The scalars that may leave a client, and the two lists that name them."""

from __future__ import annotations

import math
import re
from typing import Any

import numpy as np
import pytest
import torch

from fedpdm import wire
from fedpdm.wire import WireError
from tests.support.cases import every


def test_metrics_pass_by_name_and_type() -> None:
    metrics = {"client_id": 3, "coarse_loss": 1.5, "seconds": 2, "replayed": True}
    checked = wire.check_metrics(metrics, allow_raw=False, who="client 3")
    assert checked == {"client_id": 3, "coarse_loss": 1.5, "seconds": 2.0, "replayed": True}
    assert type(checked["seconds"]) is float
    lost = {"coarse_loss": math.nan, "seconds": math.inf, "coarse_seconds": 10**400}
    assert wire.check_metrics(lost, allow_raw=False, who="client 3") == {}
    raw = {"fine_loss": 0.5, "minority_pfdm_frechet": 3.0}
    assert wire.check_metrics(raw, allow_raw=True, who="client 3") == raw
    assert not wire.FIT_METRICS.keys() & wire.RAW_METRICS.keys()


@every(
    "metrics, allow_raw, reason",
    [
        ({"fine_loss": 0.5}, False, "fine_loss of client 3 may not leave the client: computed on"),
        ({"all_own_frechet": 1.0}, False, "may not leave the client: computed on raw data"),
        ({"images": 3}, True, "metric images of client 3 may not leave the client: not on the"),
        ({"client_id": True}, False, "client_id of client 3 must be int, got bool"),
        ({"client_id": 3.0}, False, "client_id of client 3 must be int, got float"),
        ({"replayed": 1}, False, "replayed of client 3 must be bool, got int"),
        ({"coarse_loss": "1.5"}, False, "coarse_loss of client 3 must be float, got str"),
        ({"coarse_loss": b"pixels"}, False, "coarse_loss of client 3 must be float, got bytes"),
        ({"coarse_loss": [1.0]}, True, "coarse_loss of client 3 must be float, got list"),
        ({"coarse_loss": torch.zeros(9)}, True, "must be float, got Tensor"),
        ({"coarse_loss": np.float32(1)}, True, "must be float, got float32"),
        ({"coarse_loss": True}, True, "must be float, got bool"),
    ],
)
def test_other_metrics_are_refused(metrics: dict[str, Any], allow_raw: bool, reason: str) -> None:
    with pytest.raises(WireError, match=re.escape(reason)):
        wire.check_metrics(metrics, allow_raw=allow_raw, who="client 3")


def test_a_deployed_clients_times_are_whole_seconds() -> None:
    """A fraction could carry anything in its digits."""
    good = {"seconds": 3, "coarse_seconds": 0}
    assert wire.check_metrics(good, allow_raw=False, who="client 3", whole_seconds=True) == good
    for bad in (3.0, 2.5, True, -1, 10**9, "3"):
        with pytest.raises(WireError, match=r"^metric seconds of client 3 must be whole seconds"):
            wire.check_metrics(
                {"seconds": bad}, allow_raw=False, who="client 3", whole_seconds=True
            )
    assert wire.check_metrics({"seconds": 2.5}, allow_raw=False, who="client 3")["seconds"] == 2.5


@pytest.mark.parametrize("words", ["a patient's name", "0f" * 8 + "\n", "0F" * 8, "0f" * 4])
def test_a_text_is_marks_and_nothing_else(words: str) -> None:
    with pytest.raises(wire.WireError, match="metric ledger of client 3 must be marks of 16 hex"):
        wire.check_metrics({"ledger": words}, allow_raw=False, who="client 3")
    marks = {"ledger": "0f" * 16}
    assert wire.check_metrics(marks, allow_raw=False, who="client 3") == marks
