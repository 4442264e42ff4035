"""The rounds of a plan in a client's store: paid for once, each noised once, whatever happens."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpdm.privacy.mechanism import GradientParameters, ReleasedGradient
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.privacy.releases.rounds import LastRound
from fedpdm.storage.files import StoreError, read_tensors
from tests.support.disk_faults import Crash, CrashAt, FullAt
from tests.support.gradient_toys import asked, message, parameters
from tests.support.refusals import tree
from tests.support.release_toys import DELTA, edit, epsilon_of, image_set

# Every image in every round: a Gaussian mechanism of mu = 2 C / sigma each, by hand.
PLAN = parameters(noise_multiplier=3.0, sample_rate=1.0, rounds=4)
MU = math.sqrt(4) * 2.0 / 3.0
OTHER = parameters(noise_multiplier=3.0, sample_rate=1.0, rounds=4, run="f" * 16)
LAST = f"releases/network-{PLAN.run}.last"
EXACT = np.arange(20) * 1000


class Maker:
    """Makes a round's message, each time with noise of its own; `made` counts them."""

    def __init__(self, number: int, *, plan: GradientParameters = PLAN, first: int = 0) -> None:
        self.number, self.plan, self.first, self.made = number, plan, first, 0

    def __call__(self) -> ReleasedGradient:
        self.made += 1
        seed = 1000 * self.first + 100 * self.number + self.made
        return message(self.plan, EXACT, number=self.number, seed=seed)


@pytest.fixture
def store(tmp_path: Path) -> ReleaseStore:
    return ReleaseStore(tmp_path / "client")


def sent(
    store: ReleaseStore,
    number: int,
    make: Callable[[], ReleasedGradient] | None = None,
    *,
    plan: GradientParameters = PLAN,
    count: int = 12,
    **options: Any,
) -> torch.Tensor:
    request = asked(plan, **options)
    made = store.round(image_set(count), request, number, make or Maker(number, plan=plan))
    assert int(made.round) == number
    assert made.parameters == plan
    return made.total.clone()


def on_disk(store: ReleaseStore) -> int:
    """The round that the store kept."""
    return int(read_tensors(store.root / LAST)[0]["round"])


def paid(store: ReleaseStore) -> list[tuple[float, int]]:
    return list(store.spent(delta=DELTA).distribution)


# --- Each round once ---------------------------------------------------------------------------


def test_a_round_that_is_asked_for_again_is_answered_with_the_same_numbers(
    store: ReleaseStore,
) -> None:
    make, other = Maker(1), Maker(1, first=7)  # as at other weights
    first = sent(store, 1, make)
    assert torch.equal(sent(store, 1, make), first)
    assert torch.equal(sent(ReleaseStore(store.root), 1, other), first)
    assert (make.made, other.made) == (1, 0)
    second = sent(store, 2, other_round := Maker(2))
    assert other_round.made == 1
    assert not torch.equal(second, first)


def test_a_store_that_forgets_would_be_seen(
    store: ReleaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault of the test above: a second noise on the same sum."""
    monkeypatch.setattr(LastRound, "answer", lambda _, number, make: make())
    make = Maker(1)
    assert not torch.equal(sent(store, 1, make), sent(store, 1, make))
    assert make.made == 2


def test_missed_rounds_stay_missed_and_what_is_over_is_refused(store: ReleaseStore) -> None:
    sent(store, 1)
    third = sent(store, 3)
    before = tree(store.root)
    for number, words in (
        (2, "round 2 of the plan is over, the last was 3; noising it again would be a second"),
        (1, "round 1 of the plan is over, the last was 3"),
        (0, "the plan has 4 rounds, all images have paid for these and no more; asked for round 0"),
        (5, "asked for round 5"),
        (-1, "asked for round -1"),
        (10**30, "asked for round 1000000000000000000000000000000"),
    ):
        make = Maker(number)
        with pytest.raises(StoreError) as caught:
            sent(store, number, make)
        assert words in str(caught.value)
        assert str(caught.value).startswith(str(store.root))
        assert make.made == 0
        assert tree(store.root) == before
    assert torch.equal(sent(store, 3), third)
    sent(store, 4)


def test_nothing_is_recorded_for_a_round_that_no_plan_has(store: ReleaseStore) -> None:
    for number in (0, 5):
        with pytest.raises(StoreError, match="all images have paid for these and no more"):
            sent(store, number)
    assert store.ledger().releases() == ()


def test_what_cannot_be_made_releases_nothing(store: ReleaseStore) -> None:
    """The images have paid: they are ready for the round to be made."""

    def fail() -> ReleasedGradient:
        raise FloatingPointError("no gradients")

    for number in (1, 2):
        with pytest.raises(FloatingPointError, match="no gradients"):
            sent(store, number, fail)
        assert on_disk(store) == number - 1
        assert [count for _, count in paid(store)] == [12]
        make = Maker(number)
        sent(store, number, make)
        assert make.made == 1
    assert len(store.ledger().releases()) == 1


# --- What it costs -----------------------------------------------------------------------------


def test_all_images_pay_for_all_rounds_before_the_first(store: ReleaseStore) -> None:
    seen = []

    def look() -> ReleasedGradient:
        seen.append((paid(store), on_disk(store)))
        return Maker(1)()

    sent(store, 1, look)
    exact = epsilon_of([1.0 / MU])
    assert seen == [([(pytest.approx(exact, rel=1e-3), 12)], 0)]
    for number in (2, 3, 4):
        sent(store, number)
    assert paid(store) == [(pytest.approx(exact, rel=1e-3), 12)]
    (record,) = store.ledger().releases()
    assert record.parameters == PLAN
    assert record.epsilon == pytest.approx(exact, rel=1e-3)
    assert record.epsilon >= exact
    assert record.seeded
    spent = store.spent(delta=DELTA)
    assert spent.releases_per_image == 1
    # Planted: rounds that paid for themselves alone would have paid half the mu.
    assert epsilon_of([2.0 / MU]) < 0.6 * spent.largest


def test_images_that_come_in_mid_plan_pay_for_all_rounds(store: ReleaseStore) -> None:
    sent(store, 2)
    sent(store, 3, count=16)
    exact = pytest.approx(epsilon_of([1.0 / MU]), rel=1e-3)
    assert paid(store) == [(exact, 16)]
    assert [record.images for record in store.ledger().releases()] == [12, 4]
    kept = store.ledger().head
    sent(store, 4, count=9)  # those that left are not asked
    assert store.ledger().head == kept


def test_another_run_with_the_same_images_is_another_release(store: ReleaseStore) -> None:
    first = sent(store, 2)
    before, exact = tree(store.root), [epsilon_of([1.0 / MU] * n) for n in (1, 2)]
    for changed in (OTHER, parameters(**{**vars(PLAN), "rounds": 5})):
        make = Maker(1, plan=changed)
        with pytest.raises(StoreError, match="12 of 12 images were released before with") as caught:
            sent(store, 1, make, plan=changed)
        assert "--allow-new-release" in str(caught.value)
        assert make.made == 0
        assert tree(store.root) == before
    assert f"run = {PLAN.run} (now {OTHER.run})" in refusal(store, OTHER)
    sent(store, 1, plan=OTHER, allow=True)
    assert paid(store) == [(pytest.approx(exact[1], rel=1e-3), 12)]
    assert store.spent(delta=DELTA).releases_per_image == 2
    assert torch.equal(sent(store, 2), first)  # each run goes on with its own rounds
    sent(store, 2, plan=OTHER)
    sent(store, 3)
    assert paid(store) == [(pytest.approx(exact[1], rel=1e-3), 12)]


def refusal(store: ReleaseStore, plan: GradientParameters, **options: Any) -> str:
    with pytest.raises(StoreError) as caught:
        sent(store, 1, plan=plan, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_stores_of_others_are_refused_before_a_file_is_there(store: ReleaseStore) -> None:
    sent(store, 1)
    before = tree(store.root)
    assert "is the store of client 3, not of client 4" in refusal(store, PLAN, client=4)
    assert "made with seeded noise in a simulation" in refusal(store, PLAN, simulation=False)
    with pytest.raises(StoreError, match="a store of another data set"):
        store.round(image_set(5, seed=9), asked(OTHER), 1, Maker(1))
    assert tree(store.root) == before


# --- Files that were changed -------------------------------------------------------------------


def flipped(data: bytes) -> bytes:
    return data[:-3] + bytes([data[-3] ^ 1]) + data[-2:]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.unlink(), "is gone; rounds of this plan were noised"),
        (lambda path: edit(path, flipped), "is not as it was written"),
        (lambda path: edit(path, lambda data: data[: len(data) // 2]), "cannot be read|damaged"),
        (lambda path: edit(path, lambda _: b""), "cannot be read|damaged"),
        (lambda path: shutil.copy(path.with_name(f"network-{OTHER.run}.last"), path),
         "is of another plan; restore it"),
    ],
    ids=["gone", "flipped", "cut", "empty", "another plan"],
)  # fmt: skip
def test_without_the_last_round_nothing_is_noised(
    store: ReleaseStore, change: Callable[[Path], Any], words: str
) -> None:
    second = sent(store, 2)
    sent(store, 1, plan=OTHER, allow=True)
    kept = (store.root / LAST).read_bytes()
    change(store.root / LAST)
    for number in (1, 2, 3):
        make = Maker(number)
        with pytest.raises(StoreError, match=words) as caught:
            sent(store, number, make)
        assert str(caught.value).startswith(f"{store.root / LAST}: ")
        assert make.made == 0
    (store.root / LAST).write_bytes(kept)
    assert torch.equal(sent(store, 2), second)


# --- Crashes and disks -------------------------------------------------------------------------


def crash_at(at: int, store: ReleaseStore, number: int) -> tuple[list[str] | None, Maker]:
    """Ask for a round that ends at step `at`; the steps if it has no more, and what it made."""
    make = Maker(number, first=1)
    with pytest.MonkeyPatch.context() as patched:
        crashing = CrashAt(patched, at)
        try:
            sent(store, number, make, simulation=False)
        except Crash:
            return None, make
    return crashing.calls, make


def check_after_crash(store: ReleaseStore, number: int) -> bool:
    """That images pay once and a round that was complete is sent; whether it was complete."""
    kept = on_disk(store) if (store.root / LAST).exists() else 0
    if kept:  # no round before all have paid
        assert [count for _, count in paid(store)] == [12]
    there = read_tensors(store.root / LAST)[0]["total"].clone() if kept == number else None
    again = Maker(number, first=2)
    got = sent(store, number, again, simulation=False)
    assert again.made == (0 if kept == number else 1)
    assert there is None or torch.equal(got, there)
    assert torch.equal(sent(store, number, simulation=False), got)
    assert [record.images for record in store.ledger().releases()] == [12]
    assert not list(store.root.rglob("*.ready"))
    return kept == number


@pytest.mark.slow
def test_a_crash_at_any_step_of_the_first_round(tmp_path: Path) -> None:
    outcomes = []
    for at in range(100):
        store = ReleaseStore(tmp_path / str(at))
        steps, make = crash_at(at, store, 1)
        assert make.made <= 1
        outcomes.append(check_after_crash(store, 1))
        if steps is not None:
            break
    assert steps is not None
    assert steps.count("replace") == 6  # round 0, opened, ready, its record, its name, round 1
    assert steps[-2:] == ["replace", "fsync"]
    assert outcomes == [False] * (len(steps) - 1) + [True] * 2


@pytest.mark.slow
def test_a_crash_at_any_step_of_a_later_round(tmp_path: Path) -> None:
    first = ReleaseStore(tmp_path / "first")
    kept = sent(first, 1, simulation=False)
    outcomes = []
    for at in range(20):
        store = ReleaseStore(shutil.copytree(first.root, tmp_path / str(at)))
        steps, _ = crash_at(at, store, 2)
        if on_disk(store) == 1:
            assert torch.equal(read_tensors(store.root / LAST)[0]["total"], kept)
        outcomes.append(check_after_crash(store, 2))
        with pytest.raises(StoreError, match="round 1 of the plan is over"):
            sent(store, 1, simulation=False)
        if steps is not None:
            break
    assert steps is not None
    assert steps[-3:] == ["fsync", "replace", "fsync"]
    assert set(steps[:-3]) == {"write"}
    assert outcomes == [False] * (len(steps) - 1) + [True] * 2


def test_a_full_disk_keeps_the_round_before(store: ReleaseStore) -> None:
    first = sent(store, 1)
    before = tree(store.root)
    for at in range(20):
        line = ""
        with pytest.MonkeyPatch.context() as patched:
            filling = FullAt(patched, at)
            try:
                sent(store, 2)
            except StoreError as error:
                line = str(error)
        if not line:
            break
        assert "\n" not in line
        assert "no space left" in line.lower()
        if "replace" not in filling.calls:
            assert tree(store.root) == before
            assert torch.equal(sent(store, 1), first)
    assert at > 1
