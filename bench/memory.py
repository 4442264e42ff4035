"""Resident memory of this process, and its peak over a stretch of code (Linux)."""

from __future__ import annotations

__all__ = ["forget_peak", "resident"]


def resident(field: str = "VmRSS") -> int:
    """Bytes of resident memory now (VmRSS) or at its peak (VmHWM)."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """The peak begins anew (proc(5))."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
