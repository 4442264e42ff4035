"""Numbers in fewer bits: error bounds, unbiased rounding, and what travels in them."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fedpdm import wire
from fedpdm.config.names import ENCODINGS
from fedpdm.engines.inprocess import run_in_process
from fedpdm.wire.quantize import dequantize, quantize
from fedpdm.wire.types import CoarseUpdate
from tests.support.federations import small_config


def some(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    rows = 10.0 ** torch.arange(-3, 3).view(-1, 1, 1)  # rows of very different size
    return {
        "conv": rows * torch.randn(6, 5, 7, generator=generator),
        "bias": torch.randn(9, generator=generator),
        "one": torch.tensor(-0.3),
        "zero": torch.zeros(3, 4),
        "none": torch.zeros(0, 4),
    }


@pytest.mark.parametrize("stochastic", [False, True])
@pytest.mark.parametrize("encoding", ENCODINGS)
def test_error_is_within_the_step(encoding: str, stochastic: bool) -> None:
    """bfloat16 keeps 8 bits of the significand; int8 steps are a row's largest value over 127."""
    given = some()
    generator = torch.Generator().manual_seed(1) if stochastic else None
    sent = quantize(given, encoding=encoding, generator=generator)
    got = dequantize(sent, encoding=encoding)
    assert got.keys() == given.keys()
    share = 1.0 if stochastic else 0.5
    for name, tensor in given.items():
        assert got[name].shape == tensor.shape
        assert got[name].dtype == torch.float32
        error = (got[name] - tensor).abs()
        if encoding == "float32":
            assert torch.equal(got[name], tensor)
        elif encoding == "bfloat16":
            assert bool((error <= share * 2.0**-7 * tensor.abs()).all())
        elif tensor.ndim > 1 and tensor.numel():
            step = tensor.abs().flatten(1).amax(1) / 127
            assert bool((error.flatten(1).amax(1) <= share * 1.001 * step).all())
        elif tensor.numel():
            assert float(error.max()) <= share * 1.001 * float(tensor.abs().max()) / 127


def test_bfloat16_is_torchs() -> None:
    given = some()
    for name, tensor in quantize(given, encoding="bfloat16").items():
        assert torch.equal(tensor, given[name].to(torch.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["bfloat16", "int8"])
def test_stochastic_rounding_is_unbiased_and_rounding_to_nearest_is_not(encoding: str) -> None:
    """Mean of n draws against its standard error, at most half a step over sqrt(n)."""
    value = {"w": torch.tensor([[1.0, 0.3001, -0.7003, 0.01234]])}
    generator = torch.Generator().manual_seed(0)
    draws = [
        dequantize(quantize(value, encoding=encoding, generator=generator), encoding=encoding)["w"]
        for _ in range(4000)
    ]
    step = value["w"].abs() * 2.0**-7 if encoding == "bfloat16" else torch.tensor(1 / 127)
    error = (torch.stack(draws).double().mean(0) - value["w"].double()).abs()
    bound = 5 * 0.5 * step.double() / 4000**0.5 + 1e-7
    assert bool((error <= bound).all())
    nearest = dequantize(quantize(value, encoding=encoding), encoding=encoding)["w"]
    assert not bool(((nearest - value["w"]).abs() <= bound).all())  # the bound can fail


def test_sizes() -> None:
    given = {"w": torch.randn(64, 128)}
    sizes = {e: sum(t.nbytes for t in quantize(given, encoding=e).values()) for e in ENCODINGS}
    assert sizes == {"float32": 32768, "bfloat16": 16384, "int8": 8192 + 4 * 64}


@pytest.mark.parametrize(
    ("tensors", "encoding", "words"),
    [
        ({"w": torch.zeros(2)}, "bfloat16", "w must be bfloat16, got torch.float32"),
        ({"w": torch.zeros(2)}, "int8", "w must be int8"),
        ({"w": torch.zeros(2, 2, dtype=torch.int8)}, "int8", "w must have 2 float32 scales"),
        ({"v#scale": torch.ones(1)}, "int8", "v#scale is the scale of nothing"),
        (
            {"w": torch.zeros(2, 2, dtype=torch.int8), "w#scale": torch.ones(3)},
            "int8",
            "w must have 2 float32 scales",
        ),
        (
            {"w": torch.zeros(2, 2, dtype=torch.int8), "w#scale": torch.ones(2).double()},
            "int8",
            "w must have 2 float32 scales",
        ),
        ({}, "int4", "encoding must be one of float32, bfloat16, int8, got 'int4'"),
    ],
)
def test_malformed_numbers_are_refused(tensors: Any, encoding: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dequantize(tensors, encoding=encoding)


def test_an_encoding_that_there_is_not_is_refused() -> None:
    with pytest.raises(ValueError, match="one of float32, bfloat16, int8, got 'int4'"):
        quantize({"w": torch.zeros(2)}, encoding="int4")


def test_rows_of_zeros_have_a_scale_and_stay_zeros() -> None:
    given = {"w": torch.tensor([[0.0, 0.0], [1.0, -2.0]])}
    encoded = quantize(given, encoding="int8")
    assert bool((encoded["w#scale"] > 0).all())
    torch.testing.assert_close(
        dequantize(encoded, encoding="int8")["w"], given["w"], atol=0.01, rtol=0
    )


def coarse_update(weights: dict[str, torch.Tensor]) -> CoarseUpdate:
    return CoarseUpdate(weights=weights, num_examples=3, client_id=1, round=2, seeded=True)


@pytest.mark.parametrize("encoding", ["bfloat16", "int8"])
def test_an_update_is_sent_as_a_difference(encoding: str) -> None:
    """Of the weights before, however large, nothing is lost: the error is the change's."""
    before = {"w": torch.full((4, 6), 1000.0)}
    change = torch.linspace(-1e-2, 1e-2, 24).view(4, 6)
    after = {"w": before["w"] + change}
    message = wire.encode_update(
        coarse_update(after), encoding=encoding, base=before, generator=torch.Generator()
    )
    got = wire.decode_update(message, like=before, round=2, who="client 1", encoding=encoding)
    assert float((got.weights["w"] - after["w"]).abs().max()) <= 2e-4
    with pytest.raises(wire.WireError, match=f"encoding must be float32, got '{encoding}'"):
        wire.decode_update(message, like=before, round=2, who="client 1")
    with pytest.raises(wire.WireError, match="needs the weights that it started from"):
        wire.encode_update(coarse_update(after), encoding=encoding)


@pytest.fixture(scope="module")
def metrics_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Any]:
    """The metrics of a federation by (training, encoding), run once."""
    root = tmp_path_factory.mktemp("encodings")

    @functools.cache
    def run(training: str, encoding: str) -> Any:
        out = root / f"{training}-{encoding}"
        config = small_config(
            run={"rounds": 2},
            data={"max_images": 160},
            partition={"num_clients": 2},
            coarse={"training": training, "steps_per_round": 10},
            aggregation={"encoding": encoding},
            fine={"steps_per_round": 0},
            evaluation={"image_metrics": False},
        )
        run_in_process(config, out)
        return json.loads((out / "metrics.json").read_text())

    return run


@pytest.mark.slow
@pytest.mark.parametrize("encoding", ["bfloat16", "int8"])
@pytest.mark.parametrize("training", ["federated", "server"])
def test_a_federation_in_fewer_bits_comes_close(
    metrics_of: Callable[[str, str], Any], encoding: str, training: str
) -> None:
    """The coarse model's held-out loss within 2%, for less than 0.55 or 0.35 of the bytes."""
    results = {e: metrics_of(training, e) for e in ("float32", encoding)}
    final = [results[e]["final"]["heldout_coarse_loss"] for e in ("float32", encoding)]
    sent = [
        sum(r["bytes_up"] + r["bytes_down"] for r in results[e]["rounds"])
        for e in ("float32", encoding)
    ]
    assert final[0] != final[1]
    assert final[1] == pytest.approx(final[0], rel=0.02)
    assert sent[1] < {"bfloat16": 0.55, "int8": 0.35}[encoding] * sent[0]


def test_rounding_repeats_with_the_seed() -> None:
    given = {"w": torch.from_numpy(np.random.default_rng(0).standard_normal((5, 5)))}
    one, two, other = (
        quantize(given, encoding="int8", generator=torch.Generator().manual_seed(s))["w"]
        for s in (0, 0, 1)
    )
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
