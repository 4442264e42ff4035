"""What is promised: numbers against arithmetic of another origin, and words for everybody."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpdm.config import RunConfig
from fedpdm.data.spec import build_image_spec
from fedpdm.privacy.noise import SeededNoise, SystemNoise
from fedpdm.privacy.planning import ReleasePlan, build_release_plan
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.privacy.statement import (
    baseline_statement,
    client_statement,
    plain_text,
    run_statement,
)
from fedpdm.setup.run_setup import build_schedule
from fedpdm.storage.files import StoreError
from tests.support.federations import small_config
from tests.support.release_toys import (
    CLIP_NORM,
    DELTA,
    T0,
    edit,
    epsilon_of,
    image_set,
    multiplier,
    request,
)

ONE, OTHER = multiplier(), multiplier(t0=700)
NOT_PROTECTED = ("labels", "number of images", "metrics", "fine model", "more than one image of a")


@pytest.fixture
def store(tmp_path: Path) -> ReleaseStore:
    return ReleaseStore(tmp_path / "3")


def close(value: float) -> Any:
    return pytest.approx(value, rel=1e-7)


def groups_of(multipliers: list[float], delta: float = DELTA) -> dict[str, Any]:
    """k images of one person, each paid for with all these releases."""
    return {str(k): close(epsilon_of(multipliers * k, delta=delta)) for k in (1, 2, 5, 10)}


def planned(simulation: bool = True) -> tuple[RunConfig, ReleasePlan]:
    config = small_config(
        run={"simulation": simulation},
        privacy={"epsilon": None, "t0": T0, "clip_norm": CLIP_NORM, "delta": DELTA, "shift": 0.0},
        evaluation={"image_metrics": False},
    )
    plan = build_release_plan(config, build_schedule(config), build_image_spec(config))
    assert plan is not None
    return config, plan


# --- A client's -----------------------------------------------------------------------------


def test_a_client_s_numbers(store: ReleaseStore) -> None:
    images = image_set(30)
    store.obtain(images.subset(np.arange(20)), request())
    store.obtain(images.subset(np.arange(15, 30)), request(allow=True, t0=700))
    for delta in (DELTA, 1e-3):
        statement = client_statement(store, delta=delta)
        twice = epsilon_of([ONE, OTHER], delta=delta)
        assert statement["epsilon"] == close(twice)
        assert statement["delta"] == delta
        assert statement["epsilon_distribution"] == [
            [close(twice), 5],
            [close(epsilon_of([ONE], delta=delta)), 15],
            [close(epsilon_of([OTHER], delta=delta)), 10],
        ]
        assert statement["group_epsilon"] == groups_of([ONE, OTHER], delta)
    assert (statement["client_id"], statement["images"], statement["releases"]) == (3, 30, 2)
    assert statement["image_shape"] == [1, 4, 4]
    assert statement["latest_release"]["t0"] == 700
    assert statement["latest_release"]["clip_norm"] == CLIP_NORM
    assert statement["noise_sources"] == [SeededNoise.description]
    assert statement["simulation"] is True
    assert statement["ledger_head"] == store.ledger().head
    assert json.loads(json.dumps(statement)) == statement


def test_a_deployed_client_s_statement(store: ReleaseStore) -> None:
    store.obtain(image_set(7), request(simulation=False))
    statement = client_statement(store, delta=DELTA)
    assert statement["simulation"] is False
    assert statement["noise_sources"] == [SystemNoise.description]
    words = plain_text(statement)
    assert "SIMULATION" not in words
    assert f"epsilon = {epsilon_of([ONE]):.4g} at delta = 1e-05" in words


def test_a_client_that_released_nothing_has_no_statement(store: ReleaseStore) -> None:
    with pytest.raises(StoreError, match=r"ledger\.jsonl: nothing was released"):
        client_statement(store, delta=DELTA)
    store.obtain(image_set(7), request())
    edit(store.root / "ledger.jsonl", lambda data: data.replace(b'"images": 7', b'"images": 8'))
    with pytest.raises(StoreError, match="line 3: record was edited"):
        client_statement(store, delta=DELTA)


# --- A run's --------------------------------------------------------------------------------


def test_a_run_s_numbers_without_ledgers() -> None:
    config, plan = planned(simulation=False)
    statement = run_statement(config, plan, noise_source="a source")
    once = epsilon_of([ONE])
    assert statement["epsilon"] == close(once)
    assert statement["epsilon_of_this_release"] == close(once)
    assert statement["epsilon_requested"] is None
    mu = 1 / ONE  # 2 C / sigma
    bound = mu**2 / 2 + mu * math.sqrt(2 * math.log(1 / DELTA))
    assert statement["epsilon_paper_bound"] == close(bound)
    assert statement["group_epsilon"] == groups_of([ONE])
    assert statement["epsilon_distribution"] == []
    assert statement["releases_per_image"] == 1
    assert (statement["t0"], statement["clip_norm"], statement["shift"]) == (T0, CLIP_NORM, 0.0)
    assert statement["schedule"]["num_steps"] == 1000
    assert statement["delta"] == DELTA
    assert statement["noise_source"] == "a source"
    assert 0 < statement["sampler_distance_per_pixel"] < 1e-30
    assert statement["simulation"] is False
    assert statement["ledger_heads"] == {}
    assert json.loads(json.dumps(statement)) == statement


def test_a_run_s_numbers_are_those_of_all_ledgers(tmp_path: Path) -> None:
    """Client 0 has added images since, client 1 has released some again, client 2 nothing."""
    stores = [ReleaseStore(tmp_path / str(k)) for k in range(3)]
    images = image_set(30)
    stores[0].obtain(images.subset(np.arange(20)), request(client=0))
    stores[0].obtain(images, request(client=0))
    stores[1].obtain(images.subset(np.arange(12)), request(client=1))
    config, plan = planned()

    def statement() -> dict[str, Any]:
        return run_statement(config, plan, noise_source="", stores=stores)

    told = statement()
    once, twice = epsilon_of([ONE]), epsilon_of([ONE, OTHER])
    assert told["epsilon"] == close(once)
    assert told["epsilon_distribution"] == [[close(once), 42]]
    assert told["releases_per_image"] == 1  # two releases of client 0, of different images
    stores[1].obtain(images.subset(np.arange(4)), request(client=1, allow=True, t0=700))
    told = statement()
    assert told["epsilon"] == close(twice)
    assert told["epsilon_of_this_release"] == close(once)
    assert told["epsilon_distribution"] == [[close(twice), 4], [close(once), 38]]
    assert told["releases_per_image"] == 2
    assert told["group_epsilon"] == groups_of([ONE, OTHER])
    assert told["group_epsilon"]["1"] == close(told["epsilon"])
    heads = {str(k): stores[k].ledger().head for k in (0, 1)}
    assert told["ledger_heads"] == heads


# --- In words -------------------------------------------------------------------------------


def words_of(statement: dict[str, Any]) -> str:
    """The text in one line."""
    return " ".join(plain_text(statement).split())


def test_the_text_says_who_is_protected_how_much(store: ReleaseStore) -> None:
    images = image_set(1300)
    store.obtain(images, request())
    store.obtain(images.subset(np.arange(5)), request(allow=True, t0=700))
    config, plan = planned()
    run = run_statement(config, plan, noise_source="", stores=[store])
    once, twice = epsilon_of([ONE]), epsilon_of([ONE, OTHER])
    for statement in (run, client_statement(store, delta=DELTA)):
        words = words_of(statement)
        assert words.startswith("PRIVACY STATEMENT THIS IS A SIMULATION. Its noise comes from a se")
        assert f"epsilon = {twice:.4g} at delta = 1e-05 (local differential privacy, per" in words
        assert f"by at most a factor e^{twice:.4g}, plus 1e-05." in words
        assert f"epsilon {twice:.4g}: 5 images epsilon {once:.4g}: 1,295 images" in words
        groups = re.search(r"Epsilon by number of images: ([^a-z]*)\. ", words)
        assert groups
        assert groups[1] == ", ".join(
            f"{k}: {epsilon_of([ONE, OTHER] * k):.4g}" for k in (1, 2, 5, 10)
        )


@pytest.mark.parametrize("simulation", [True, False])
def test_the_text_says_what_is_not_protected(simulation: bool) -> None:
    config, plan = planned(simulation)
    statement = run_statement(config, plan, noise_source="")
    words = plain_text(statement)
    assert ("THIS IS A SIMULATION" in words) is simulation
    assert ("Nothing below protects anybody" in words) is simulation
    _, listed = words.split("What is NOT protected:\n")
    lines = listed.splitlines()
    assert all(line.startswith("  - ") for line in lines)
    assert len(lines) == len(NOT_PROTECTED)
    for line, what in zip(lines, NOT_PROTECTED, strict=True):
        assert what in line
    assert max(map(len, words.splitlines())) <= 100


def test_a_delta_beyond_one_image_is_in_the_statement(store: ReleaseStore) -> None:
    """Of a client by its ledger, of a run by that of the client with most images, of DP-SGD."""
    store.obtain(image_set(30), request())
    assert "delta_warning" not in client_statement(store, delta=1 / 30)
    told = client_statement(store, delta=0.04)["delta_warning"]
    assert told.startswith("delta 0.04 is above 1 / 30 images of a client: whoever published each")
    config, plan = planned()
    assert "delta_warning" not in run_statement(config, plan, noise_source="x", stores=[store])
    large = dataclasses.replace(config, privacy=dataclasses.replace(config.privacy, delta=0.04))
    statement = run_statement(large, plan, noise_source="x", stores=[store])
    assert statement["delta_warning"] == told
    assert f"WARNING: {told}." in " ".join(plain_text(statement).split())
    alone = run_statement(large, plan, noise_source="x")  # a server that knows no number
    assert "for a client with more than 25: whoever" in alone["delta_warning"]
    noisy = small_config(coarse={"images": "dp_sgd"}, privacy={"delta": 0.04})
    assert "WARNING: delta 0.04 is above" in baseline_statement(noisy)["words"]
