"""Events of subsampled rounds, beside Gaussian ones: added up, compared, kept and told."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from scipy import stats

from fedpdm import wire
from fedpdm.privacy.accountant import (
    ACCOUNTINGS,
    compose,
    delta_bound,
    delta_spent,
    epsilon_bound,
    epsilon_spent,
    grouped,
    repeated,
    worst,
)
from fedpdm.privacy.ledger import append, read_ledger
from fedpdm.privacy.mechanism import door, register
from fedpdm.privacy.planning import plan_release
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.privacy.statement import client_statement, run_statement
from fedpdm.privacy.types import ComposedEvent, GaussianEvent, SubsampledGaussianEvent
from fedpdm.reporting.run_files import privacy_lines
from fedpdm.setup.run_setup import build_schedule
from fedpdm.storage.files import StoreError
from tests.support.cases import every
from tests.support.federations import small_config
from tests.support.own_mechanisms import ClassSums, SumParameters, sum_rounds
from tests.support.release_toys import DELTA, image_set, request

NONE = GaussianEvent(noise_multiplier=math.inf)


def rounds(noise: float = 1.5, rate: float = 0.1, count: int = 20) -> SubsampledGaussianEvent:
    return SubsampledGaussianEvent(noise_multiplier=noise, sample_rate=rate, rounds=count)


def gaussian(multiplier: float) -> GaussianEvent:
    return GaussianEvent(noise_multiplier=multiplier)


@dataclass(frozen=True, kw_only=True)
class SampledParameters(SumParameters):
    mechanism: ClassVar[str] = "sampled_sums"
    sample_rate: float = 0.1
    rounds: int = 20


class SampledSums(ClassSums):
    """Sums over all images, and sums over Poisson samples of them."""

    parameters = SampledParameters

    def plan(self, *_: Any, **__: Any) -> Any:
        return sampled_rounds()

    def event(self, parameters: Any) -> Any:
        if parameters.stage == "means":
            return super().event(parameters)
        return rounds(
            parameters.sigma / parameters.clip_norm, parameters.sample_rate, parameters.rounds
        )


def sampled_rounds() -> tuple[SampledParameters, ...]:
    return tuple(SampledParameters(**vars(parameters)) for parameters in sum_rounds())


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "_registered", dict(door._registered))
    register(SampledSums)


# --- Added up ------------------------------------------------------------------------------------


def test_what_is_alike_becomes_one() -> None:
    assert compose([rounds(count=1)] * 20) == rounds(count=20)
    assert compose([rounds(count=5), NONE, rounds(math.inf)]) == rounds(count=5)
    both = compose([rounds(count=5), gaussian(3.0), rounds(2.0), gaussian(4.0), rounds(count=7)])
    assert isinstance(both, ComposedEvent)
    assert both.gaussian == compose([gaussian(3.0), gaussian(4.0)])
    assert both.subsampled == (rounds(count=12), rounds(2.0))
    assert compose([both]) == both
    assert compose([compose([rounds(2.0), gaussian(3.0)]), both]) == compose(
        [gaussian(4.0), rounds(2.0, count=40), both.gaussian, gaussian(3.0), rounds(count=12)][1:]
    )
    assert hash(both) == hash(compose([both]))


def test_each_adds_to_what_the_others_cost() -> None:
    events = [gaussian(0.9), rounds(1.5), rounds(3.0, 0.5)]
    together = epsilon_spent(events, delta=DELTA)
    assert together == epsilon_spent([compose(events)], delta=DELTA)
    assert together == pytest.approx(epsilon_spent(events[::-1], delta=DELTA), rel=1e-9)
    for left in range(3):
        others = [event for number, event in enumerate(events) if number != left]
        assert epsilon_spent(others, delta=DELTA) < together
    for epsilon in (0.5, 3.0):
        assert delta_spent(events, epsilon=epsilon) == delta_spent(
            [compose(events)], epsilon=epsilon
        )
    assert delta_spent(events, epsilon=together) == pytest.approx(DELTA, rel=1e-3)
    assert epsilon_spent([*events, gaussian(0.0)], delta=DELTA) == math.inf


def test_repeated_are_releases_of_one_image() -> None:
    assert repeated(rounds(count=20), 3) == rounds(count=60)
    both = compose([gaussian(3.0), rounds()])
    assert repeated(both, 4) == compose([gaussian(1.5), rounds(count=80)])
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        repeated(both, 0)


def test_a_group_costs_no_less_than_it_shows() -> None:
    """Two images, both of the worst kind, each drawn by itself: an integral."""
    noise, rate = 2.0, 0.3
    x, step = np.linspace(-24.0, 24.0, 200_001, retstep=True)
    weights = stats.binom.pmf(range(3), 2, rate)
    p, q = (
        sum(w * stats.norm.pdf(x, sign * j, noise) for j, w in enumerate(weights))
        for sign in (1.0, -1.0)
    )
    group = grouped(rounds(noise, rate, 1), 2)
    for epsilon in (0.0, 0.5, 1.0, 2.0):
        shown = float(np.maximum(0.0, p - math.exp(epsilon) * q).sum() * step)
        assert shown <= delta_spent([group], epsilon=epsilon)
        assert shown > delta_spent([rounds(noise, rate, 1)], epsilon=epsilon)
    assert grouped(rounds(), 1) == rounds()
    # Without sampling it is exact: mu grows with k.
    whole = grouped(rounds(8.0, 1.0, 4), 3)
    assert whole == rounds(8.0 / 3.0, 1.0, 4)
    assert grouped(gaussian(3.0), 4) == gaussian(0.75)
    both = grouped(compose([gaussian(3.0), rounds(6.0, 1.0, 1)]), 3)
    assert both == compose([gaussian(1.0), rounds(2.0, 1.0, 1)])
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        grouped(rounds(), 0)


def test_the_worst_is_that_of_the_largest_epsilon() -> None:
    small, large = gaussian(3.0), gaussian(0.5)
    cheap, dear = rounds(count=5), rounds(0.9, 0.3, 200)
    assert worst([small, cheap, dear], delta=DELTA) == dear
    assert worst([large, cheap], delta=DELTA) == large
    assert worst([rounds(400.0, count=1), rounds(300.0, count=1)]) == rounds(300.0, count=1)
    assert worst([compose([small, cheap]), small, cheap]) == compose([small, cheap])
    assert worst([rounds(0.0), dear]) == rounds(0.0)


@dataclass(frozen=True, kw_only=True)
class Shuffled(SubsampledGaussianEvent):
    """A subclass may mean something else."""


@dataclass(frozen=True, kw_only=True)
class Mixed(ComposedEvent):
    """So may this."""


@every(
    "event",
    [
        Shuffled(noise_multiplier=1.5, sample_rate=0.1, rounds=20),
        Mixed(gaussian=NONE, subsampled=(rounds(),)),
        ComposedEvent(
            gaussian=NONE,
            subsampled=(Shuffled(noise_multiplier=1.5, sample_rate=0.1, rounds=20),),
        ),
    ],
)
def test_what_is_no_such_event_is_refused(event: Any) -> None:
    for account in (
        lambda: compose([gaussian(2.0), event]),
        lambda: epsilon_spent([event], delta=DELTA),
        lambda: delta_spent([event], epsilon=1.0),
        lambda: repeated(event, 2),
        lambda: grouped(event, 2),
        lambda: worst([gaussian(2.0), event]),
    ):
        with pytest.raises(ValueError, match=r"cannot read events of type (Shuffled|Mixed)$"):
            account()


def test_the_papers_bound_says_that_it_does_not_apply() -> None:
    line = "^privacy.accounting: paper does not apply to rounds over Poisson samples; set exact$"
    for event in (rounds(), compose([rounds(), gaussian(2.0)])):
        for account in (
            lambda event=event: epsilon_bound(event, delta=DELTA),
            lambda event=event: delta_bound(event, epsilon=1.0),
            lambda event=event: ACCOUNTINGS["paper"].epsilon(event, delta=DELTA),
        ):
            with pytest.raises(ValueError, match=line):
                account()
        exact = ACCOUNTINGS["exact"].epsilon(event, delta=DELTA)
        assert exact == epsilon_spent([event], delta=DELTA)
        assert ACCOUNTINGS["exact"].delta(event, epsilon=exact) == pytest.approx(DELTA, rel=1e-3)


# --- Kept and told -------------------------------------------------------------------------------


def obtain(store: ReleaseStore, stage: int) -> Any:
    asked = dataclasses.replace(
        request(), parameters=sampled_rounds()[stage], planned=sampled_rounds(),
        public={"means": torch.zeros(3, 16)},
    )  # fmt: skip
    return store.obtain(image_set(10), asked)


def test_a_ledger_holds_what_both_kinds_cost(tmp_path: Path) -> None:
    store = ReleaseStore(tmp_path / "client")
    made = [obtain(store, stage) for stage in (0, 1)]
    sampled = rounds(5.0, 0.1, 20)
    assert [release.event for release in made] == [gaussian(2.5), sampled]
    line = (store.root / "ledger.jsonl").read_text().splitlines()[3]
    fields = json.loads(line)
    assert (fields["noise_multiplier"], fields["sample_rate"], fields["rounds"]) == (5.0, 0.1, 20)
    assert fields["epsilon"] == epsilon_spent([sampled], delta=DELTA)
    assert [record.event for record in store.ledger().releases()] == [gaussian(2.5), sampled]
    spent = store.spent(delta=DELTA)
    assert spent.event == compose([gaussian(2.5), sampled])
    assert spent.largest == epsilon_spent([gaussian(2.5), sampled], delta=DELTA)
    statement = client_statement(store, delta=DELTA)
    assert statement["epsilon"] == spent.largest
    assert statement["group_epsilon"]["2"] == epsilon_spent([grouped(spent.event, 2)], delta=DELTA)
    again = obtain(store, 1)  # from the file
    assert again.event == sampled
    assert torch.equal(again.tensors()["sums"], made[1].tensors()["sums"])


@every(
    "name, value, problem",
    [
        ("rounds", 2, "rounds 2 does not follow from its parameters"),
        ("sample_rate", 0.01, "sample rate 0.01 does not follow from its parameters"),
        ("noise_multiplier", 50.0, "noise multiplier 50.0 does not follow from its parameters"),
        ("rounds", 20.0, "its numbers contradict each other"),
        ("epsilon", 0.01, "its numbers contradict each other"),
    ],
)
def test_a_record_may_not_claim_less(name: str, value: Any, problem: str, tmp_path: Path) -> None:
    store = ReleaseStore(tmp_path / f"{name}-{value}")
    obtain(store, 1)
    path = store.root / "ledger.jsonl"
    record = read_ledger(path).records[1]
    empty = dataclasses.replace(read_ledger(path), path=path.with_name("forged"), records=())
    opened = append(empty, "opened", {"client_id": 3})
    append(opened, "release", {**record.fields, name: value})
    with pytest.raises(StoreError, match=f"record 2: {problem}"):
        read_ledger(path.with_name("forged"))


def test_a_message_carries_the_event(tmp_path: Path) -> None:
    released = obtain(ReleaseStore(tmp_path), 1)
    message = wire.encode_release(released, client_id=3)
    back = wire.decode_release(message, who="client 3", client_id=3, mechanism="sampled_sums")
    assert back.event == rounds(5.0, 0.1, 20)


def test_a_plan_and_its_statement_have_no_bound_of_the_paper() -> None:
    config = small_config(privacy={"epsilon": 10.0, "release": "sampled_sums"})
    plan = plan_release(config, build_schedule(config))
    events = [gaussian(2.5), rounds(5.0, 0.1, 20)]
    assert plan.event == compose(events)
    assert plan.epsilon_exact == epsilon_spent(events, delta=config.privacy.delta)
    assert plan.epsilon_paper is None
    statement = run_statement(config, plan, noise_source="seeded")
    assert statement["epsilon_paper_bound"] is None
    told = "\n".join(privacy_lines(statement))
    assert "by privacy loss distributions, which bound it from above;" in told
    assert "paper" not in told
