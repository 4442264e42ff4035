"""The scalars that may leave a client: a fixed list of names and types."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from fedpdm.wire.types import WireError

__all__ = ["CLOCKS", "FIT_METRICS", "RAW_METRICS", "check_metrics"]

# Times. Those of a deployed client are whole seconds: a fraction could carry other numbers.
CLOCKS = ("seconds", "coarse_seconds")
LONGEST_SECONDS = 10_000_000

# Counts and times, and what the coarse model's answers on releases cost and know: functions of the
# release alone.
FIT_METRICS: Mapping[str, type] = {
    "client_id": int,
    "num_released": int,
    "coarse_loss": float,
    "coarse_known": float,
    "coarse_steps": int,
    "coarse_seconds": float,
    "seconds": float,
    "coarse_images": int,
    "fine_images": int,
    "replayed": bool,
    "heldout_coarse_loss": float,
    "heldout_coarse_known": float,
    "num_heldout": int,
    "ledger": str,  # the random marks of its records (`fedpdm.privacy.ledger`)
}

# Computed on raw data: not covered by the guarantee. Sent in simulation; elsewhere only if the
# client itself says so (`raw-metrics` in its node config), whatever the server asks for.
RAW_METRICS: Mapping[str, type] = {
    "fine_loss": float,
    **{
        f"{group}_{method}_{metric}": float
        for group in ("majority", "minority", "all")
        for method in ("pfdm", "shared", "alone", "own")
        for metric in ("frechet", "class_fidelity")
    },
}


_MARKS = re.compile(r"(?:[0-9a-f]{16})*")


def check_metrics(
    metrics: Mapping[str, Any], *, allow_raw: bool, who: str, whole_seconds: bool = False
) -> dict[str, bool | int | float | str]:
    """The metrics mapping that may leave a client: known names, scalars of the listed type.

    `allow_raw` admits `RAW_METRICS`, which are computed on raw data: in simulation, or where the
    client's own node config says so. `whole_seconds` takes only whole numbers as `CLOCKS`, as a
    deployed client sends them. Values that are not finite are left out. `WireError` for any other
    name or type.
    """
    allowed = {**FIT_METRICS, **(RAW_METRICS if allow_raw else {})}
    checked: dict[str, Any] = {}
    for name, value in metrics.items():
        if name not in allowed:
            why = "computed on raw data" if name in RAW_METRICS else "not on the list"
            raise WireError(f"metric {name} of {who} may not leave the client: {why}")
        if whole_seconds and name in CLOCKS:
            if type(value) is not int or not 0 <= value <= LONGEST_SECONDS:
                raise WireError(
                    f"metric {name} of {who} must be whole seconds from 0 to {LONGEST_SECONDS}"
                )
        elif allowed[name] is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value) if abs(value) < 2**53 else math.inf
        elif type(value) is not allowed[name]:
            raise WireError(
                f"metric {name} of {who} must be {allowed[name].__name__}, "
                f"got {type(value).__name__}"
            )
        if isinstance(value, str) and not _MARKS.fullmatch(value):
            raise WireError(f"metric {name} of {who} must be marks of 16 hexadecimal digits")
        if not isinstance(value, float) or math.isfinite(value):
            checked[name] = value
    return checked
