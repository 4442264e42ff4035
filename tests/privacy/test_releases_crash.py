"""A release that is interrupted at any step, a disk that fails, files that were changed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpdm.privacy.mechanism import NoiseSource, SeededNoise, SystemNoise
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.privacy.releases.archive import ReleaseArchive
from fedpdm.storage.files import StoreError, read_tensors
from tests.support.disk_faults import Crash, CrashAt, FullAt, files
from tests.support.refusals import tree
from tests.support.release_toys import DELTA, image_set, request

IMAGES = image_set(12)
FIRST = "releases/000001.safetensors"


@pytest.fixture
def store(tmp_path: Path) -> ReleaseStore:
    return ReleaseStore(tmp_path / "client")


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Twelve images take three chunks, so three writes."""
    monkeypatch.setattr("fedpdm.privacy.mechanism.gaussian.CHUNK", 64)


def seeded(noises: Noises) -> Callable[[int], NoiseSource]:
    """As `noises`, but for a simulation."""

    def make(release: int) -> NoiseSource:
        noises(release)
        return SeededNoise(np.random.SeedSequence(8))

    return make


class Noises:
    """Noise of the operating system; `numbers` are the releases that it was asked for."""

    def __init__(self) -> None:
        self.numbers = list[int]()

    def __call__(self, release: int) -> NoiseSource:
        self.numbers.append(release)
        return SystemNoise()


def complete_releases(store: ReleaseStore) -> dict[str, torch.Tensor]:
    """x_tilde of the releases that are complete, by number; nothing else has a final name."""
    found = {}
    for path in sorted((store.root / "releases").glob("0*")):
        if path.suffix == ".tmp":
            continue
        tensors, metadata = read_tensors(path)
        assert metadata["delta"] == repr(DELTA)
        assert tensors["digests"].shape[1:] == (32,)
        assert tensors["x_tilde"].shape == (len(tensors["digests"]), 1, 4, 4)
        found[path.stem] = tensors["x_tilde"].clone()
    return found


def crash_at(
    at: int, patched: pytest.MonkeyPatch, store: ReleaseStore, count: int, noises: Noises
) -> list[str] | None:
    """Ask for a release that ends at step `at`; the steps of it if it has no more than that."""
    crashing = CrashAt(patched, at)
    asked = request(simulation=False, noise=noises)
    try:
        store.obtain(IMAGES.subset(np.arange(count)), asked)
    except Crash:
        return None
    finally:
        patched.undo()
    return crashing.calls


def check_after_crash(store: ReleaseStore, count: int, releases: int) -> bool:
    """That nothing is half there, nor noised again; whether the last release was complete."""
    for leftover in store.root.glob(".*.tmp"):  # named after the process, and the next is another
        leftover.rename(store.root / leftover.name.replace(str(os.getpid()), "1"))
    there = complete_releases(store)
    recorded = store.ledger().releases()  # checks names and files
    assert len(recorded) <= len(there) <= releases
    spent_before = store.spent(delta=DELTA).images
    noises = Noises()
    got = store.obtain(IMAGES.subset(np.arange(count)), request(simulation=False, noise=noises))
    assert len(got) == count
    complete = len(there) == releases
    assert noises.numbers == ([] if complete else [releases])
    for start, number in ((0, "000001"), (len(there.get("000001", ())), "000002")):
        if number in there:  # the images are asked for in the order of their releases
            kept = got.x_tilde[start : start + len(there[number])]
            assert torch.equal(kept, there[number])
    ledger = store.ledger()
    assert [record.kind for record in ledger.records] == ["opened"] + ["release"] * releases
    assert sum(record.images for record in ledger.releases()) == count >= spent_before
    names = {f"releases/{number:06d}.safetensors" for number in range(1, releases + 1)}
    assert files(store.root) == {"ledger.jsonl", ".release-lock", *names}
    return complete


@pytest.mark.usefixtures("small_chunks")
def test_a_crash_at_any_step_of_the_first_release(tmp_path: Path) -> None:
    outcomes = []
    for at in range(100):
        store, noises = ReleaseStore(tmp_path / str(at)), Noises()
        with pytest.MonkeyPatch.context() as patched:
            steps = crash_at(at, patched, store, 12, noises)
        outcomes.append(check_after_crash(store, 12, 1))
        if steps is not None:
            break
    assert steps == [
        *["fsync"] * 1,  # the store's own directory
        *["write", "fsync", "replace", "fsync"],  # ledger: opened
        "fsync",  # the directory of the releases
        *["write"] * 5,  # header, digests, three chunks
        *["fsync", "replace", "fsync"],  # .ready
        *["write", "fsync", "replace", "fsync"],  # ledger: release
        *["replace", "fsync"],  # its name
    ]
    named = steps.index("replace", steps.index("replace") + 1)
    assert outcomes == [False] * (named + 1) + [True] * (len(steps) - named)


@pytest.mark.usefixtures("small_chunks")
def test_a_crash_at_any_step_of_a_second_release(tmp_path: Path) -> None:
    first = ReleaseStore(tmp_path / "first")
    before = first.obtain(IMAGES.subset(np.arange(5)), request(simulation=False)).x_tilde
    outcomes = []
    for at in range(100):
        root = shutil.copytree(first.root, tmp_path / str(at))
        store = ReleaseStore(root)
        with pytest.MonkeyPatch.context() as patched:
            steps = crash_at(at, patched, store, 12, Noises())
        assert torch.equal(complete_releases(store)["000001"], before)
        outcomes.append(check_after_crash(store, 12, 2))
        if steps is not None:
            break
    assert steps is not None
    named = steps.index("replace")
    assert outcomes == [False] * (named + 1) + [True] * (len(steps) - named)


@pytest.mark.slow
@pytest.mark.usefixtures("small_chunks")
def test_a_crash_in_the_recovery_from_a_crash(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patched:
        steps = crash_at(10**6, patched, ReleaseStore(tmp_path / "all"), 12, Noises())
    assert steps is not None
    tried = 0
    for at in range(len(steps) - 9, len(steps)):  # from the flush before .ready on
        once = ReleaseStore(tmp_path / str(at))
        with pytest.MonkeyPatch.context() as patched:
            assert crash_at(at, patched, once, 12, Noises()) is None
        for again in range(100):
            store = ReleaseStore(shutil.copytree(once.root, tmp_path / f"{at}-{again}"))
            with pytest.MonkeyPatch.context() as patched:
                ended = crash_at(again, patched, store, 12, Noises())
            check_after_crash(store, 12, 1)
            tried += 1
            if ended is not None:
                break
    assert tried > 25


def test_a_complete_release_that_is_thrown_away_would_be_seen(
    store: ReleaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The planted fault of the tests above: recovery discards what is not in the ledger."""

    def forgetful(self: ReleaseArchive) -> Any:
        shutil.rmtree(self.folder)
        return self.ledger()

    with pytest.MonkeyPatch.context() as patched:
        assert crash_at(14, patched, store, 12, Noises()) is None  # before the ledger
    assert complete_releases(store).keys() == {"000001"}
    monkeypatch.setattr(ReleaseArchive, "recover", forgetful)
    with pytest.raises(AssertionError, match=r"\[1\] == \[\]"):
        check_after_crash(store, 12, 1)


# --- Disks ----------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_chunks")
def test_a_disk_that_fills_up_at_any_step(tmp_path: Path) -> None:
    """Of a second release: one line, nothing half there, and what was complete is kept."""
    first = ReleaseStore(tmp_path / "first")
    rows = first.obtain(IMAGES.subset(np.arange(5)), request()).x_tilde
    for at in range(100):
        store = ReleaseStore(shutil.copytree(first.root, tmp_path / str(at)))
        before = tree(store.root)
        with pytest.MonkeyPatch.context() as patched:
            filling = FullAt(patched, at)
            try:
                store.obtain(IMAGES, request())
            except StoreError as error:
                line = str(error)
            else:
                break
        assert "\n" not in line
        assert line.startswith(str(store.root))
        complete = complete_releases(store)
        renamed = filling.calls.count("replace")
        assert len(complete) == 1 + (renamed > 0)
        after = tree(store.root)
        if renamed == 0:
            assert after == before
            assert line.endswith(
                "releases/000002.safetensors: cannot be written: no space left on the device; "
                "nothing was released"
            )
        if renamed < 2:
            assert after["ledger.jsonl"] == before["ledger.jsonl"]
        assert "space left on" in line
        noises = Noises()
        got = store.obtain(IMAGES, request(noise=seeded(noises)))
        assert noises.numbers == ([2] if renamed == 0 else [])
        assert torch.equal(got.x_tilde[:5], rows)
        if renamed:
            assert torch.equal(got.x_tilde[5:], complete["000002"])
    assert filling.calls == [
        *["write"] * 4,  # header, digests, two chunks
        *["fsync", "replace", "fsync"],
        *["write", "fsync", "replace", "fsync"],
        *["replace", "fsync"],
    ]
    assert at == len(filling.calls)


def test_too_little_room_is_seen_before_the_first_byte(
    store: ReleaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = 4 * IMAGES.images.size
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    with pytest.raises(StoreError, match=r"000001\.safetensors: .*no space left .*; nothing was"):
        store.obtain(IMAGES, request())
    assert files(store.root) == {"ledger.jsonl", ".release-lock"}
    assert store.ledger().releases() == ()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed))
    assert len(store.obtain(IMAGES, request())) == 12


def test_a_place_that_cannot_be_a_store_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for root in (tmp_path / "file", tmp_path / "file" / "client", Path("/proc/client")):
        for asked in (request(), request(allow=True)):
            with pytest.raises(StoreError) as caught:
                ReleaseStore(root).obtain(IMAGES, asked)
            assert str(caught.value).startswith(f"{root}: store cannot be written: ")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "releases").touch()
    with pytest.raises(StoreError, match=r"releases/000001\.safetensors: cannot be written: Not a"):
        ReleaseStore(tmp_path / "taken").obtain(IMAGES, request())
