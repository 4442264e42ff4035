"""Pictures of partitions, generated images, ROC curves and the toy's results.

Drawn on matplotlib `Figure` objects, without pyplot and its global state, so it works without
a display and in any thread. matplotlib is imported only when something is drawn.
"""

from fedpdm.reporting.pictures.attack_grids import draw_memorised_pairs, draw_reconstructions
from fedpdm.reporting.pictures.heatmap import draw_partition
from fedpdm.reporting.pictures.image_grid import draw_image_grid
from fedpdm.reporting.pictures.roc_curve import draw_roc
from fedpdm.reporting.pictures.toy_curves import Panel, Series, draw_panels
from fedpdm.reporting.pictures.toy_scatter import draw_scatter

__all__ = [
    "Panel",
    "Series",
    "draw_image_grid",
    "draw_memorised_pairs",
    "draw_panels",
    "draw_partition",
    "draw_reconstructions",
    "draw_roc",
    "draw_scatter",
]
