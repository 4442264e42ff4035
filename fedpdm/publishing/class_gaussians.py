"""Class Gaussians as a component of a diffusers pipeline: draws, the class that is likeliest, and
what clean image is expected of a noisy one.

An export of class statistics carries a copy of this file in its folder `gaussians`, where diffusers
looks for the code of a custom component by the name of its module. The file therefore imports
diffusers and torch alone and repeats three formulas of `fedpdm.diffusion.gaussian`; tests hold both
copies together. Component j, of class k_j and weight w_j, is N(m_j, S_j) in R^d with

    S_j = V_j' diag(g_j) V_j + rho_j (I - V_j' V_j),

r orthonormal rows V_j. A draw is m_j + sqrt(rho_j) z + V_j' (sqrt(g_j) - sqrt(rho_j)) V_j z for
z ~ N(0, I). The noisy image x_t = a x_0 + s n is N(a m_j, a^2 S_j + s^2 I): the same directions,
variances a^2 g_j + s^2 and a^2 rho_j + s^2.
"""

import math

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin

__all__ = ["GaussianClasses"]


class GaussianClasses(ModelMixin, ConfigMixin):  # type: ignore[misc]  # as every diffusers model
    """J Gaussians of classes in R^d. Computed with in float64.

    Args:
        dimensions: d.
        directions: r.
        classes: the class of each, J numbers; a class may have several, or none.

    `means` (J, d), `frames` (J, r, d), `variances` (J, r), `rest` (J,) and `weights` (J,) are
    tensors that are loaded.
    """

    @register_to_config
    def __init__(self, dimensions: int, directions: int, classes: list[int]) -> None:
        super().__init__()
        count = len(classes)
        for name, shape in (
            ("means", (count, dimensions)),
            ("frames", (count, directions, dimensions)),
            ("variances", (count, directions)),
            ("rest", (count,)),
            ("weights", (count,)),
        ):
            setattr(self, name, torch.nn.Parameter(torch.zeros(shape), requires_grad=False))

    def _tensors(self, device: torch.device) -> list[torch.Tensor]:
        """Means, frames, variances, rest, weights, float64, and classes, int64 (J,)."""
        floats = (self.means, self.frames, self.variances, self.rest, self.weights)
        classes = torch.tensor(self.config["classes"], device=device)
        return [*(tensor.to(device, torch.float64) for tensor in floats), classes]

    def draw(self, labels: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """A float32 point (N, d) per label, int (N,), on their device.

        A negative label, and a class without Gaussians, is drawn from all by their weights. Random
        numbers are drawn where the generator lies.
        """
        device = labels.device if generator is None else generator.device
        means, frames, variances, rest, weights, classes = self._tensors(device)
        asked = labels.to(device)
        same = (classes[None, :] == asked[:, None]) & (weights > 0)
        allowed = same | ~same.any(dim=1, keepdim=True)
        chosen = torch.multinomial(weights * allowed.double(), 1, generator=generator)[:, 0]
        shape = (len(asked), means.shape[1])
        z = torch.randn(shape, generator=generator, device=device, dtype=torch.float64)
        inside = torch.einsum("nrd,nd->nr", frames[chosen], z)
        more = variances[chosen].sqrt() - rest[chosen].sqrt()[:, None]
        away = rest[chosen].sqrt()[:, None] * z
        away = away + torch.einsum("nr,nrd->nd", inside * more, frames[chosen])
        return (means[chosen] + away).float().to(labels.device)

    def log_posterior(self, x: torch.Tensor, labels: torch.Tensor, abar: float) -> torch.Tensor:
        """log p(label | x_t = sqrt(abar) x), float64 (N,), of x (N, d) and labels int (N,).

        Classes are equally likely before. NaN for a label without Gaussians.
        """
        weights, classes = self._tensors(x.device)[4:]
        _, joint = self._seen(abar**0.5 * x.double(), abar)
        there = classes[weights > 0].unique()
        of_class = (classes[None, :] == there[:, None]) & (weights > 0)  # (K, J)
        prior = (of_class * weights).sum(dim=1).log()
        by_class = joint[:, None, :].masked_fill(~of_class, -math.inf).logsumexp(dim=2) - prior
        posterior = by_class.log_softmax(dim=1)
        own = labels.to(x.device)[:, None] == there
        found = torch.where(own, posterior, 0.0).sum(dim=1)
        return torch.where(own.any(dim=1), found, math.nan)

    def expected(self, x_t: torch.Tensor, labels: torch.Tensor, abar: float) -> torch.Tensor:
        """E[x_0 | x_t, label], float32 (N, d), of x_t (N, d) and labels int (N,).

        A label without Gaussians is answered as no label.
        """
        means, frames, variances, rest, weights, classes = self._tensors(x_t.device)
        x, a, noise = x_t.double(), abar**0.5, 1.0 - abar
        along, joint = self._seen(x, abar)
        same = (classes[None, :] == labels.to(x.device)[:, None]) & (weights > 0)
        allowed = same | ~same.any(dim=1, keepdim=True)
        share = joint.masked_fill(~allowed, -math.inf).softmax(dim=1)
        outside, inside = rest / (abar * rest + noise), variances / (abar * variances + noise)
        weight = share * outside
        mean = (share - abar * weight) @ means + a * weight.sum(dim=1, keepdim=True) * x
        gain = (inside - outside[:, None]) * along * share[:, :, None]
        return (mean + a * torch.einsum("njr,jrd->nd", gain, frames)).float()

    def _seen(self, y: torch.Tensor, abar: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Of noisy y, float64 (N, d): V_j (y - a m_j), (N, J, r), and log w_j p(y | j), (N, J)."""
        means, frames, variances, rest, weights, _ = self._tensors(y.device)
        a, noise, (d, r) = abar**0.5, 1.0 - abar, (means.shape[1], variances.shape[1])
        along = torch.einsum("jrd,nd->njr", frames, y) - a * torch.einsum(
            "jrd,jd->jr", frames, means
        )
        squares = y.square().sum(dim=1, keepdim=True) - 2.0 * a * (y @ means.T)
        squares = squares + abar * means.square().sum(dim=1)
        inside, outside = abar * variances + noise, abar * rest + noise
        left = (squares - along.square().sum(dim=2)).clamp_min(0.0)
        quadratic = left / outside + (along.square() / inside).sum(dim=2)
        scale = (d - r) * outside.log() + inside.log().sum(dim=1) + d * math.log(2.0 * math.pi)
        return along, weights.log() - 0.5 * (quadratic + scale)
