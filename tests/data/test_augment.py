"""Random affine changes: bounded, each image its own, nothing but what was there."""

from __future__ import annotations

import torch

from fedpdm.data.augment import random_affine


def moved(x: torch.Tensor, seed: int = 0) -> torch.Tensor:
    return random_affine(x, generator=torch.Generator().manual_seed(seed))


def test_flat_images_stay_and_values_stay_inside() -> None:
    flat = torch.full((4, 3, 16, 16), 0.7)
    assert torch.allclose(moved(flat), flat)
    x = torch.rand((50, 1, 16, 16))
    assert x.min() - 1e-6 <= moved(x).min() <= moved(x).max() <= x.max() + 1e-6


def test_each_image_has_its_own_change_and_seeds_repeat() -> None:
    one = torch.rand((1, 1, 16, 16)).repeat(8, 1, 1, 1)
    out = moved(one)
    assert (out[0] - out[1:]).abs().amax(dim=(1, 2, 3)).min() > 0.01
    assert torch.equal(out, moved(one))
    assert not torch.equal(out, moved(one, seed=1))


def test_a_dot_moves_no_further_than_the_bounds_allow() -> None:
    """At the middle only the shift moves it, by an eighth of the side."""
    x = torch.zeros((400, 1, 33, 33))
    x[:, :, 15:18, 15:18] = 1.0
    out = moved(x)[:, 0]
    place = torch.arange(33.0)
    rows = (out.sum(dim=2) * place).sum(dim=1) / out.sum(dim=(1, 2)) - 16.0
    columns = (out.sum(dim=1) * place).sum(dim=1) / out.sum(dim=(1, 2)) - 16.0
    for offset in (rows, columns):
        assert offset.abs().max() < 33 / 8 * 1.45  # turned and stretched once more
        assert offset.abs().max() > 33 / 8 * 0.8
        assert offset.mean().abs() < 0.6
    mirrored = torch.zeros((200, 1, 16, 16))
    mirrored[:, :, :, :8] = 1.0  # bright at the left: never brighter at the right
    halves = moved(mirrored)
    assert (halves[..., :8].mean(dim=(1, 2, 3)) > halves[..., 8:].mean(dim=(1, 2, 3))).all()
