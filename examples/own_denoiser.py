"""A custom denoiser: a Gaussian per class above t = 300, a fine model without labels below.

python examples/own_denoiser.py [PNG]
"""

import sys
from pathlib import Path

import torch

import fedpdm
from fedpdm.data import denormalize, normalize
from fedpdm.diffusion.combined import HandOver, Unclipped, Unlabelled
from fedpdm.diffusion.sampling import sample
from fedpdm.reporting.pictures import draw_image_grid

out = Path((sys.argv[1:] or ["own-denoiser.png"])[0])
config = fedpdm.configure(data={"coloring": "none"}, fine={"preset": "micro", "ema_decay": 0.98})
images, schedule = fedpdm.load_images(config), fedpdm.make_schedule("linear")
fine = fedpdm.train_fine(config, images, num_steps=200)
x_0, classes = normalize(images.images, shift=-1.0).flatten(1), torch.tensor(images.labels)
means = torch.stack([x_0[classes == k].mean(0) for k in range(10)])
variances, axes = torch.linalg.eigh(torch.cov((x_0 - means[classes]).T))


def gaussians(x_t, t, *, labels, clipped=None):
    """E[x_0 | x_t, class k] where class k is N(mean_k, cov): exact at every t."""
    abar, mean = schedule.gather(t, x_t).view(-1, 1).float(), means[labels]
    gain = abar.sqrt() * variances / (abar * variances + 1 - abar)
    away = (x_t.flatten(1) - abar.sqrt() * mean) @ axes
    return (mean + (gain * away) @ axes.T).view_as(x_t)


rows, labels, seeded = {}, torch.arange(10).repeat_interleave(2), torch.Generator().manual_seed
both = HandOver(gaussians, Unlabelled(Unclipped(fine)), 300)
for name, denoiser in {"Gaussians": gaussians, "and fine model": both}.items():
    x_T = torch.randn((len(labels), 1, 8, 8), generator=seeded(0))
    drawn = sample(denoiser, x_T, labels=labels, schedule=schedule, generator=seeded(1))
    rows[name] = denormalize(drawn, shift=-1.0).numpy()
draw_image_grid(out, list(rows.values()), row_labels=list(rows))
