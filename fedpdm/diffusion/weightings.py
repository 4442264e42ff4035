"""Weights of the squared x0 error, as functions of SNR_t = abar_t / (1 - abar_t).

    snr        SNR_t              the DDPM epsilon loss                  (Ho et al. 2020, Eq. 14)
    v          SNR_t + 1          the v loss                             (Salimans and Ho 2022)
    min_snr    min(SNR_t, gamma)  min-SNR, gamma = 5                     (Hang et al. 2023)
    uniform    1

Free of torch, so that a configuration is read without it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["WEIGHTINGS", "Weighting", "min_snr"]


@dataclass(frozen=True)
class Weighting:
    """A loss weight: SNR, any shape, float -> weights of the same shape. Decorates a function."""

    of_snr: Callable[[Tensor], Tensor]


def min_snr(gamma: float) -> Weighting:
    """min(SNR, gamma)."""
    return Weighting(lambda snr: snr.clamp_max(gamma))


#: Name -> weight.
WEIGHTINGS: Final[Mapping[str, Weighting]] = MappingProxyType(
    {
        "snr": Weighting(lambda snr: snr),
        "v": Weighting(lambda snr: snr + 1.0),
        "min_snr": min_snr(5.0),
        "uniform": Weighting(lambda snr: snr.new_ones(snr.shape)),
    }
)
