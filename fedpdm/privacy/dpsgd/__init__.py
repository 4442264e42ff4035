"""DP-SGD training of denoisers (Dockhorn et al. 2022, DPDM): the baseline with central DP.

A batch is a Poisson sample: each of N examples takes part with probability q = batch_size / N. Each
drawn example gets K independent (t, noise) draws, whose gradients are averaged (noise multiplicity,
Dockhorn et al. 2022, section 3.2), and with clipping bound C and noise multiplier sigma the step is

    g = (1 / batch_size) ( sum_i g_i min(1, C / ||g_i||) + sigma C z ),   z ~ N(0, I)

(Abadi et al. 2016, Algorithm 1), followed by AdamW and the moving average, which are
post-processing. K costs no privacy: what is clipped is still one vector per example.

**This is another guarantee than that of a release** (docs/method.md). Trust: whoever trains (a
client, or a trusted party) sees raw images, and only weights leave, protected for each example of
that one data set. Neighbours: one example (image and label together) added or removed; replacing
one, the relation of the local guarantee, is a removal and an addition: (2 epsilon,
(1 + e^epsilon) delta). N is public. The losses in a `TrainReport` are computed on raw images and
are not covered.
"""

from fedpdm.privacy.dpsgd.accounting import dp_sgd_epsilon, dp_sgd_noise_multiplier
from fedpdm.privacy.dpsgd.gradients import (
    ExampleGradients,
    ExampleLosses,
    add_clipped,
    check_network,
    gradient_rows,
)
from fedpdm.privacy.dpsgd.randomness import Draws, SeededDraws, SystemDraws
from fedpdm.privacy.dpsgd.trainer import DpSgdSettings, PrivateTrainer

__all__ = [
    "DpSgdSettings",
    "Draws",
    "ExampleGradients",
    "ExampleLosses",
    "PrivateTrainer",
    "SeededDraws",
    "SystemDraws",
    "add_clipped",
    "check_network",
    "dp_sgd_epsilon",
    "dp_sgd_noise_multiplier",
    "gradient_rows",
]
