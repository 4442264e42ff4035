"""Gradients of single examples, and their clipped sum.

Opacus (Yousefpour et al. 2021) has a formula per layer type that turns a layer's input and the
gradient of its output into one weight gradient per row. Here they run from hooks on the unmodified
network, so that parameters keep their names and the network stays an ordinary one, and the rows of
one example (its K draws of t and noise) are summed layer by layer: B gradients are held, not B K.

Convolutions are the exception: torch's own weight gradient, example by example, takes a tenth of
the time of Opacus' unfolding on a CPU (96 channels at 8x8, K = 4). Besides, that unfolding (Opacus
1.6, `unfold2d`) takes its input for contiguous: behind an attention block it is not, and the
gradients come out as 0. Tests compare all of it with autograd on single examples, and with Opacus'
`GradSampleModule` on contiguous inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.nn.grad import conv2d_weight
from torch.utils.hooks import RemovableHandle

__all__ = [
    "ExampleGradients",
    "ExampleLosses",
    "add_clipped",
    "check_network",
    "gradient_rows",
]

ExampleLosses = Callable[[torch.Tensor], torch.Tensor]
"""Indices int64 (B,) -> losses (B K,), the K of an example after one another."""


def _convolution(
    layer: nn.Conv2d, inputs: list[torch.Tensor], slopes: torch.Tensor
) -> dict[torch.Tensor, torch.Tensor]:
    """Gradients of inputs (B, K, C, H, W) and slopes (B, K, O, H', W'), summed over K."""
    shape = list(layer.weight.shape)
    weight = [
        conv2d_weight(x, shape, slope, layer.stride, layer.padding, layer.dilation, layer.groups)
        for x, slope in zip(inputs[0], slopes, strict=True)
    ]
    found: dict[torch.Tensor, torch.Tensor] = {layer.weight: torch.stack(weight)}
    if layer.bias is not None:
        found[layer.bias] = slopes.sum(dim=(1, 3, 4))
    return found


@functools.cache
def _samplers() -> dict[type[nn.Module], Any]:
    """Layer type -> (layer, [inputs], slopes) -> gradient per row and parameter."""
    from opacus.grad_sample import GradSampleModule  # it takes seconds

    kinds: tuple[type[nn.Module], ...] = (nn.Linear, nn.Embedding, nn.GroupNorm, nn.LayerNorm)
    theirs = {kind: GradSampleModule.GRAD_SAMPLERS[kind] for kind in kinds}
    return {nn.Conv2d: _convolution, **theirs}


# Those that take the K rows of an example as more positions of one, and sum over them.
_SUMMING = (nn.Conv2d, nn.Linear, nn.Embedding)


def check_network(network: nn.Module) -> None:
    """Refuse layers that mix examples (BatchNorm, running statistics) or have no formula here.

    Raises:
        ValueError: names the first such layer.
    """
    for name, module in network.named_modules():
        own = list(module.parameters(recurse=False))
        where = f"DP-SGD cannot train {name or 'the network'} ({type(module).__name__})"
        if isinstance(module, nn.modules.batchnorm._BatchNorm) or getattr(
            module, "track_running_stats", False
        ):
            raise ValueError(f"{where}: it mixes examples; use GroupNorm")
        if own and type(module) not in _samplers():
            raise ValueError(f"{where}: there is no per-example gradient for it")
        if isinstance(module, nn.Conv2d) and (
            module.padding_mode != "zeros" or isinstance(module.padding, str)
        ):
            raise ValueError(f"{where}: its padding must be a number of zeros")


class ExampleGradients:
    """Per-example gradients of a network's losses; hooks are there inside a `with` block only.

    `multiplicity` K: rows i K .. (i + 1) K - 1 of a batch belong to example i.
    """

    def __init__(self, network: nn.Module, *, multiplicity: int = 1) -> None:
        check_network(network)
        self._parameters = dict(network.named_parameters())
        self._modules = [m for m in network.modules() if list(m.parameters(recurse=False))]
        # One parameter per layer, its smallest: asking for these gradients makes autograd visit
        # every layer, but spares it the weights', which the hooks compute anyway.
        own = (list(module.parameters(recurse=False)) for module in self._modules)
        self._visited = [min(parameters, key=torch.numel) for parameters in own]
        self._multiplicity = multiplicity
        self._handles: list[RemovableHandle] = []
        self._found: dict[torch.Tensor, torch.Tensor] = {}

    def __enter__(self) -> ExampleGradients:
        self._handles = [m.register_forward_hook(self._record) for m in self._modules]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._found = {}

    def backward(self, losses: torch.Tensor) -> list[torch.Tensor]:
        """Gradient of each example's mean loss, from losses (B K,) of a forward pass in this block.

        Returns:
            float32 (B, *shape) for each of the network's parameters, in their order.

        Raises:
            ValueError: a number of losses that K does not divide, or a parameter without gradient.
        """
        if losses.dim() != 1 or len(losses) % self._multiplicity:
            raise ValueError(
                f"losses must be one per row, {self._multiplicity} rows per example, "
                f"got shape {tuple(losses.shape)}"
            )
        self._found = {}
        self._num_rows = len(losses)
        total = losses.sum() / self._multiplicity
        torch.autograd.grad(total, self._visited, allow_unused=True)
        found, self._found = self._found, {}
        for name, parameter in self._parameters.items():
            if parameter not in found:
                raise ValueError(f"{name} has no gradient: DP-SGD needs every parameter in use")
        return [found[parameter] for parameter in self._parameters.values()]

    def _record(self, module: nn.Module, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(functools.partial(self._collect, module, inputs[0].detach()))

    def _collect(self, module: nn.Module, inputs: torch.Tensor, slopes: torch.Tensor) -> None:
        """Add the gradients of one layer, given d total / d output, to those found so far."""
        if len(slopes) != self._num_rows:
            raise ValueError(
                f"{type(module).__name__} got {len(slopes)} rows for {self._num_rows} losses"
            )
        slopes = slopes.float()  # under autocast the two may be of different dtypes
        inputs = inputs.float() if inputs.is_floating_point() else inputs
        summing = isinstance(module, _SUMMING)
        if summing:
            inputs, slopes = (x.unflatten(0, (-1, self._multiplicity)) for x in (inputs, slopes))
        with torch.no_grad():
            for parameter, rows in _samplers()[type(module)](module, [inputs], slopes).items():
                if not summing:
                    rows = rows.unflatten(0, (-1, self._multiplicity)).sum(dim=1)
                if parameter in self._found:
                    rows = rows + self._found[parameter]
                self._found[parameter] = rows


def gradient_rows(
    network: nn.Module,
    losses: ExampleLosses,
    examples: torch.Tensor,
    *,
    multiplicity: int,
    max_rows: int = 64,
) -> Iterator[torch.Tensor]:
    """Gradients of `examples`, int64 (B,), in pieces float32 (n, d): all parameters in a row.

    Each is that of the mean of an example's `multiplicity` losses, which may depend on no other
    example. At most `max_rows` rows go through the network at a time. No piece where there are no
    examples.
    """
    if not len(examples):
        return
    with ExampleGradients(network, multiplicity=multiplicity) as gradients:
        for part in examples.split(max(1, max_rows // multiplicity)):
            found = gradients.backward(losses(part))
            yield torch.cat([rows.flatten(1) for rows in found], dim=1)


def add_clipped(
    totals: list[torch.Tensor], gradients: list[torch.Tensor], *, max_grad_norm: float
) -> torch.Tensor:
    """Add `sum_i g_i min(1, C / ||g_i||)` to `totals` in place; norms over all parameters together.

    Args:
        totals: (*shape) per parameter.
        gradients: (B, *shape) per parameter.
        max_grad_norm: the bound C, which inf lifts.

    Returns:
        The norms before clipping, float32 (B,).
    """
    rows = [g.flatten(1) for g in gradients]
    norms = torch.stack([torch.linalg.vector_norm(row, dim=1) for row in rows])
    norms = torch.linalg.vector_norm(norms, dim=0)
    # The addend, as in Opacus, makes up for the rounding of the norm.
    factors = (max_grad_norm / (norms + 1e-6)).clamp(max=1.0)
    for total, row in zip(totals, rows, strict=True):
        total += (factors @ row).view_as(total)
    return norms
