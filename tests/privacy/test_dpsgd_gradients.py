"""Gradients of single examples against autograd one by one and Opacus, and their clipped sum."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import pytest
import torch
from opacus.grad_sample import GradSampleModule
from opacus.validators import ModuleValidator
from torch import nn

from fedpdm.diffusion.denoisers import Denoiser
from fedpdm.diffusion.presets import PRESETS
from fedpdm.privacy.dpsgd import ExampleGradients, add_clipped, check_network
from tests.support.dpsgd_toys import K, N, denoiser, drawn, rows_loss
from tests.support.toys import seeded

# --- Gradients of single examples -----------------------------------------------------------


def one_by_one(model: Denoiser, t: torch.Tensor, noise: torch.Tensor) -> list[torch.Tensor]:
    """Autograd on one row at a time: (rows, *shape) per parameter."""
    parameters = list(model.network.parameters())
    rows = []
    for row in range(len(t)):
        loss = rows_loss(model, torch.tensor([row // K]), t[row, None], noise[row, None])
        rows.append(torch.autograd.grad(loss.sum(), parameters))
    return [torch.stack(each) for each in zip(*rows, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["micro", "tiny_patch"])
def test_gradients_are_those_of_single_examples(preset: str) -> None:
    model = denoiser(preset)
    t, noise = drawn(N * K)
    expected = [g.unflatten(0, (N, K)).mean(dim=1) for g in one_by_one(model, t, noise)]
    indices = torch.arange(N).repeat_interleave(K)
    if preset == "tiny_patch":  # as on a GPU
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    with ExampleGradients(model.network, multiplicity=K) as gradients:
        found = gradients.backward(rows_loss(model, indices, t, noise))
    names = [name for name, _ in model.network.named_parameters()]
    for name, ours, theirs in zip(names, found, expected, strict=True):
        assert ours.shape == theirs.shape, name
        scale = float(theirs.abs().max())
        assert scale > 0, name
        assert float((ours - theirs).abs().max()) < 1e-4 * scale + 1e-7, name
    # Nothing stays behind: no hook, no gradient, no attribute.
    assert all(not m._forward_hooks for m in model.network.modules())
    assert all(p.grad is None and not hasattr(p, "grad_sample") for p in model.parameters())
    # Planted fault: the rows of an example interleaved with those of another.
    with ExampleGradients(model.network, multiplicity=K) as gradients:
        wrong = gradients.backward(rows_loss(model, torch.arange(N).repeat(K), t, noise))
    assert not torch.allclose(wrong[0], expected[0], rtol=0.1)


def test_gradients_are_those_of_opacus() -> None:
    model = denoiser()
    t, noise = drawn(N)
    with ExampleGradients(model.network) as gradients:
        found = gradients.backward(rows_loss(model, torch.arange(N), t, noise))
    theirs = denoiser()
    for module in theirs.network.modules():
        if isinstance(module, nn.Conv2d):  # without this Opacus 1.6 finds 0 for seven of them
            module.register_forward_pre_hook(lambda _, inputs: inputs[0].contiguous())
    theirs.network = GradSampleModule(theirs.network, loss_reduction="sum")
    with warnings.catch_warnings():  # of torch, about hooks where no input requires a gradient
        warnings.simplefilter("ignore", UserWarning)
        rows_loss(theirs, torch.arange(N), t, noise).sum().backward()
    for (name, p), ours in zip(theirs.network.named_parameters(), found, strict=True):
        sample: Any = p.grad_sample  # type: ignore[attr-defined]
        assert torch.allclose(ours, sample, rtol=1e-3, atol=1e-6), name


def test_draws_are_averaged_before_clipping() -> None:
    model = denoiser()
    t, noise = drawn(N * K)
    singles = [g.flatten(1).double() for g in one_by_one(model, t, noise)]
    flat = torch.cat(singles, dim=1).unflatten(0, (N, K))
    bound = float(flat.mean(dim=1).norm(dim=1).median())

    def clipped(rows: torch.Tensor) -> torch.Tensor:
        return rows * (bound / rows.norm(dim=-1, keepdim=True)).clamp(max=1.0)

    expected = clipped(flat.mean(dim=1)).sum(dim=0)
    wrong = clipped(flat).mean(dim=1).sum(dim=0)  # planted fault: clipped before the average
    totals = [torch.zeros_like(p) for p in model.network.parameters()]
    with ExampleGradients(model.network, multiplicity=K) as gradients:
        found = gradients.backward(rows_loss(model, torch.arange(N).repeat_interleave(K), t, noise))
    norms = add_clipped(totals, found, max_grad_norm=bound)
    assert torch.allclose(norms.double(), flat.mean(dim=1).norm(dim=1), rtol=1e-4)
    total = torch.cat([each.flatten() for each in totals]).double()
    assert float((total - expected).norm() / expected.norm()) < 1e-4
    assert float((wrong - expected).norm() / expected.norm()) > 1e-2


def test_one_example_more_changes_the_sum_by_at_most_the_bound() -> None:
    generator = seeded(3)
    for scale in (1e-3, 1.0, 1e4):
        gradients = [
            scale * torch.randn(shape, generator=generator) for shape in ((9, 4, 7), (9, 5))
        ]
        sums = []
        for rows in (9, 8):
            totals = [torch.zeros(4, 7), torch.zeros(5)]
            add_clipped(totals, [g[:rows] for g in gradients], max_grad_norm=0.25)
            sums.append(torch.cat([total.flatten() for total in totals]).double())
        change = float((sums[0] - sums[1]).norm())
        assert change <= 0.25 * (1 + 1e-5)
        own = math.sqrt(sum(float(g[8].square().sum()) for g in gradients))
        assert change == pytest.approx(min(own, 0.25), rel=1e-3)


def test_layers_without_private_gradients_are_refused() -> None:
    for preset in PRESETS:
        if preset != "paper":
            network = denoiser(preset).network
            check_network(network)
            assert ModuleValidator.validate(network, strict=False) == []
    conv = nn.Conv2d(3, 4, 3)
    for layer, message in (
        (nn.BatchNorm2d(4), "cannot train 1 (BatchNorm2d): it mixes examples; use GroupNorm"),
        (nn.BatchNorm2d(4, affine=False), "1 (BatchNorm2d): it mixes examples"),
        (nn.InstanceNorm2d(4, track_running_stats=True), "1 (InstanceNorm2d): it mixes examples"),
        (nn.ConvTranspose2d(4, 4, 2), "1 (ConvTranspose2d): there is no per-example gradient"),
        (nn.Conv2d(4, 4, 3, padding="same"), "1 (Conv2d): its padding must be a number of zeros"),
        (nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), "1 (Conv2d): its padding"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)) as error:
            check_network(nn.Sequential(conv, layer))
        assert "\n" not in str(error.value)


def test_a_parameter_out_of_use_is_named() -> None:
    network = nn.ModuleList([nn.Linear(3, 2), nn.Linear(3, 2)])
    with (
        ExampleGradients(network) as gradients,
        pytest.raises(ValueError, match=r"^1\.weight has no gradient"),
    ):
        gradients.backward(network[0](torch.ones(4, 3)).sum(dim=1))
