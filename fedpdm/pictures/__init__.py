"""Pictures of partitions, generated images and ROC curves, as PNG files.

Drawn on matplotlib `Figure` objects, without pyplot and its global state, so it works without
a display and in any thread. matplotlib is imported only when something is drawn.
"""

from fedpdm.pictures.heatmap import draw_partition
from fedpdm.pictures.image_grid import draw_image_grid
from fedpdm.pictures.roc_curve import draw_roc

__all__ = ["draw_image_grid", "draw_partition", "draw_roc"]
