"""Random streams: the same key repeats, every component of the key changes the draw."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from fedpdm.rng import Purpose, numpy_rng, seed_sequence, torch_generator

KEY = {"client": 3, "round": 5, "chunk": 2}


def first_words(seed: int, purpose: Purpose, **key: int) -> tuple[int, ...]:
    return tuple(seed_sequence(seed, purpose, **key).generate_state(4).tolist())


def test_purposes_keep_their_numbers() -> None:
    # Part of the reproducibility contract: append, never renumber or reuse.
    known = {
        "PARTITION": 0,
        "HOLDOUT": 1,
        "RELEASE_NOISE": 2,
        "COARSE_INIT": 3,
        "FINE_INIT": 4,
        "COARSE_TRAINING": 5,
        "FINE_TRAINING": 6,
        "SAMPLING": 7,
        "EVALUATION": 8,
        "CLIENT_SELECTION": 9,
        "SERVER_TRAINING": 10,
    }
    assert known.items() <= {purpose.name: purpose.value for purpose in Purpose}.items()
    assert len(set(Purpose)) == len(Purpose.__members__)  # no alias


def test_streams_are_the_same_on_every_machine_and_version() -> None:
    # SeedSequence and PCG64 are frozen by numpy's compatibility policy, Mersenne's seed is ours.
    rng = numpy_rng(7, Purpose.PARTITION, client=1, round=2, chunk=3)
    direct = np.random.PCG64(np.random.SeedSequence(7, spawn_key=(0, 1, 2, 3)))
    assert rng.bit_generator.random_raw(3).tolist() == direct.random_raw(3).tolist()
    assert first_words(0, Purpose.FINE_TRAINING) == (299023180, 3432507732, 2948451347, 1261370736)
    generator = torch_generator(0, Purpose.FINE_TRAINING)
    words = first_words(0, Purpose.FINE_TRAINING)
    assert generator.initial_seed() == (words[0] | words[1] << 32) & (2**63 - 1)


def test_the_same_key_repeats() -> None:
    draws = [numpy_rng(7, Purpose.HOLDOUT, **KEY).random(8) for _ in range(2)]
    assert np.array_equal(*draws)
    tensors = [
        torch.randn(8, generator=torch_generator(7, Purpose.SAMPLING, **KEY)) for _ in range(2)
    ]
    assert torch.equal(*tensors)


@pytest.mark.parametrize("component", ["seed", "purpose", "client", "round", "chunk"])
def test_each_component_changes_the_draw(component: str) -> None:
    key = {"seed": 7, "purpose": Purpose.FINE_TRAINING, **KEY}
    other = {**key, component: Purpose.SAMPLING if component == "purpose" else key[component] + 1}
    assert not np.array_equal(numpy_rng(**key).random(8), numpy_rng(**other).random(8))
    mine, theirs = (torch.randn(8, generator=torch_generator(**k)) for k in (key, other))
    assert not torch.equal(mine, theirs)


def test_no_two_keys_share_a_stream() -> None:
    keys = list(itertools.product((0, 1, 7), Purpose, (0, 1, 2), (0, 1, 2), (0, 1)))
    streams = {
        first_words(seed, purpose, client=client, round=round, chunk=chunk)
        for seed, purpose, client, round, chunk in keys
    }
    assert len(streams) == len(keys)
    seeds = {
        torch_generator(seed, purpose, client=client, round=round, chunk=chunk).initial_seed()
        for seed, purpose, client, round, chunk in keys
    }
    assert len(seeds) == len(keys)


def test_neighbouring_clients_are_uncorrelated() -> None:
    n = 20_000
    draws = np.stack(
        [numpy_rng(0, Purpose.RELEASE_NOISE, client=c).standard_normal(n) for c in range(5)]
    )
    correlation = np.corrcoef(draws)[np.triu_indices(5, 1)]
    assert np.abs(correlation).max() < 5.5 / np.sqrt(n)  # 10 pairs, significance 4e-7


@pytest.mark.parametrize("component", ["seed", "client", "round", "chunk"])
def test_negative_components_are_refused(component: str) -> None:
    key = {"seed": 0, "client": 0, "round": 0, "chunk": 0, component: -1}
    for function in (seed_sequence, numpy_rng, torch_generator):
        with pytest.raises(ValueError, match=f"^{component} must be at least 0, got -1$"):
            function(key["seed"], Purpose.HOLDOUT, **{k: v for k, v in key.items() if k != "seed"})
