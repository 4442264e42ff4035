"""A `Trainer` whose gradients are computed elsewhere, a step at a time."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from fedpdm.diffusion.training import Model, Trainer
from fedpdm.diffusion.weights import load_named

__all__ = ["FollowingTrainer"]


class FollowingTrainer(Trainer[Model]):
    """AdamW, EMA, state and weights are those of `Trainer`."""

    def follow(self, gradients: Mapping[str, torch.Tensor], *, what: str) -> None:
        """One step with these gradients, by name; they are not clipped.

        `FloatingPointError` for one that is not finite, `ValueError` for other names or shapes.
        """
        for name, gradient in gradients.items():
            if not bool(gradient.isfinite().all()):
                raise FloatingPointError(f"{what}: {name} is not finite at step {self.step + 1}")
        for parameter in self._parameters:
            parameter.grad = torch.empty_like(parameter)
        grads = {name: p.grad for name, p in self._named.items() if p.grad is not None}
        load_named(grads, gradients, what=what)
        self._descend()
        self._optimizer.zero_grad(set_to_none=True)
