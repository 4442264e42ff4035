"""The Gaussian-mixture toy: the method where every answer is known (docs/toy.md).

Mechanism, objectives, training and samplers are those for images; a point of R^d is an image of
shape (1, 1, d). It may import `reporting` and the rooms below; `commands` imports it.
"""

from fedpdm.toy.denoisers import LinearDenoiser, MLPDenoiser, fit_means
from fedpdm.toy.federation import METHODS, Models, Problem, client_counts, draw_clients
from fedpdm.toy.fitting import Clients, fit_linear, train_models
from fedpdm.toy.measure import Estimate, Measurement, measure, ratio_of_means, sampling_floor
from fedpdm.toy.theory import (
    coarse_weight,
    expected_w2,
    published_ratio,
    theorem_bound,
    theorem_gain,
)

__all__ = [
    "METHODS",
    "Clients",
    "Estimate",
    "LinearDenoiser",
    "MLPDenoiser",
    "Measurement",
    "Models",
    "Problem",
    "client_counts",
    "coarse_weight",
    "draw_clients",
    "expected_w2",
    "fit_linear",
    "fit_means",
    "measure",
    "published_ratio",
    "ratio_of_means",
    "sampling_floor",
    "theorem_bound",
    "theorem_gain",
    "train_models",
]
