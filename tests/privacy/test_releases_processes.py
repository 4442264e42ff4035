"""Releases in real processes: killed, started at once, out of space, without leave, in memory."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedpdm.privacy.ledger import read_ledger
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.storage.files import read_tensors
from tests.support.disk_faults import files
from tests.support.refusals import tree
from tests.support.release_processes import ReleaseProcesses, release_processes
from tests.support.release_toys import DELTA

NOBODY = 65534
COMPLETE = {"ledger.jsonl", ".release-lock", "releases/000001.safetensors"}


@pytest.fixture(scope="module")
def processes() -> Iterator[ReleaseProcesses]:
    with release_processes() as started:
        yield started


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that everybody may read, with everything above it."""
    folder = Path(tempfile.mkdtemp(prefix="fedpdm-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def sha256_of_release(path: Path) -> str:
    return hashlib.sha256(read_tensors(path)[0]["x_tilde"].numpy().tobytes()).hexdigest()


def wait_for_bytes(path: Path, size: int) -> None:
    """Until a file has so many bytes, or has got another name."""
    for _ in range(100_000):
        try:
            if path.stat().st_size >= size:
                return
        except FileNotFoundError:
            if path.with_suffix(".ready").exists() or path.with_suffix(".safetensors").exists():
                return
        time.sleep(0.0005)
    raise AssertionError(f"{path} does not appear")


def test_processes_killed_in_the_middle_of_a_release(
    tmp_path: Path, processes: ReleaseProcesses
) -> None:
    """At random fractions of the file, and at random moments about its end."""
    chance, count = random.Random(), 2500
    folder = tmp_path / "client" / "releases"
    temporary, ready = folder / "000001.tmp", folder / "000001.ready"
    final, known, halves = folder / "000001.safetensors", set[str](), 0
    moments = [0.8 * chance.random() for _ in range(5)] + [1.0] * 3
    for fraction in moments:
        pid = processes.start(tmp_path / "client", count=count)
        wait_for_bytes(temporary, int(fraction * 4 * 3 * 32 * 32 * count))
        time.sleep(0.03 * chance.random() if fraction == 1.0 else 0.0)
        os.kill(pid, signal.SIGKILL)
        processes.results()
        halves += temporary.exists()
        complete = [path for path in (ready, final) if path.exists()]
        assert len(complete) <= 1
        known |= {sha256_of_release(path) for path in complete}
        assert len(known) <= 1, "noised twice"
        recorded = ReleaseStore(tmp_path / "client").ledger().releases()
        assert len(recorded) <= len(complete)
        assert len(recorded) == 1 or not final.exists()
    assert halves > 0
    told = processes.obtain(tmp_path / "client", count=count)
    assert told["rows"] == count
    assert known <= {told["sha256"]}
    again = processes.obtain(tmp_path / "client", count=count)
    assert again["sha256"] == told["sha256"] == sha256_of_release(final)
    assert files(tmp_path / "client") == COMPLETE
    records = read_ledger(tmp_path / "client" / "ledger.jsonl").records
    assert [record.kind for record in records] == ["opened", "release"]


@pytest.mark.parametrize("number", [2, 8])
def test_processes_started_at_once_share_one_release(
    tmp_path: Path, processes: ReleaseProcesses, number: int
) -> None:
    root, start = tmp_path / "client", time.time() + 0.3
    for _ in range(number):
        processes.start(root, count=400, at=start)
    told = processes.results()
    assert len(told) == number
    assert [answer["error"] for answer in told.values()] == [None] * number
    (digest,) = {answer["sha256"] for answer in told.values()}
    assert digest == sha256_of_release(root / "releases" / "000001.safetensors")
    assert files(root) == COMPLETE
    store = ReleaseStore(root)
    assert [record.images for record in store.ledger().releases()] == [400]
    assert store.spent(delta=DELTA).images == 400


def test_two_stores_do_not_share_a_release(tmp_path: Path, processes: ReleaseProcesses) -> None:
    """So the test above could fail: these processes draw noise of their own."""
    told = [processes.obtain(tmp_path / name, count=10) for name in "ab"]
    assert told[0]["sha256"] != told[1]["sha256"]


def test_processes_that_ask_for_different_images(
    tmp_path: Path, processes: ReleaseProcesses
) -> None:
    """Prefixes of one another: whoever comes first, every image is noised once."""
    root, start = tmp_path / "client", time.time() + 0.3
    for count in (100, 400, 200, 300):
        processes.start(root, count=count, at=start)
    told = processes.results()
    assert [answer["error"] for answer in told.values()] == [None] * 4
    store = ReleaseStore(root)
    assert sum(record.images for record in store.ledger().releases()) == 400
    assert store.spent(delta=DELTA).distribution[0][1] == 400
    assert processes.obtain(root, count=400)["rows"] == 400


def test_a_file_that_may_not_grow_is_a_full_disk(
    tmp_path: Path, processes: ReleaseProcesses
) -> None:
    """A real error of a real write, in the middle of the release."""
    root = tmp_path / "client"
    told = processes.obtain(root, count=1000, file_size=5_000_000)
    assert told["error"] == (
        f"{root}/releases/000001.safetensors: cannot be written: File too large; nothing was "
        "released"
    )
    assert files(root) == {"ledger.jsonl", ".release-lock"}
    assert ReleaseStore(root).ledger().releases() == ()
    assert processes.obtain(root, count=1000, file_size=13_000_000)["error"] is None
    assert files(root) == COMPLETE


def test_a_store_that_may_only_be_read(open_folder: Path, processes: ReleaseProcesses) -> None:
    root = open_folder / "client"
    made = processes.obtain(root, count=10)
    for path in (root, root / "releases"):
        path.chmod(0o555)
    before = tree(root)
    options = {"uid": NOBODY} if os.geteuid() == 0 else {}
    for count in (10, 20):
        told = processes.obtain(root, count=count, **options)
        assert told["error"] == f"{root}: store cannot be written: Permission denied"
    told = processes.obtain(open_folder / "none" / "client", count=10, **options)
    if os.geteuid() == 0:
        assert told["error"].startswith(f"{open_folder}/none/client: store cannot be written: Per")
    assert tree(root) == before
    for path in (root, root / "releases"):
        path.chmod(0o755)
    assert processes.obtain(root, count=10)["sha256"] == made["sha256"]


def test_a_folder_of_releases_that_may_only_be_read(
    open_folder: Path, processes: ReleaseProcesses
) -> None:
    """The ledger could be written, the release could not."""
    root = open_folder / "client"
    processes.obtain(root, count=10)
    root.chmod(0o777)
    (root / ".release-lock").chmod(0o666)
    (root / "releases").chmod(0o555)
    before = tree(root)
    options = {"uid": NOBODY} if os.geteuid() == 0 else {}
    told = processes.obtain(root, count=20, **options)
    assert told["error"] == (
        f"{root}/releases/000002.safetensors: cannot be written: Permission denied; nothing was "
        "released"
    )
    assert tree(root) == before
    assert processes.obtain(root, count=10, **options)["error"] is None
    (root / "releases").chmod(0o755)


# --- Memory ---------------------------------------------------------------------------------


def test_a_release_is_not_held_in_memory(tmp_path: Path, processes: ReleaseProcesses) -> None:
    """20,000 images 3x32x32: 61 MB, their release 246 MB, which stays on the disk."""
    ask = {"count": 20_000}
    for attempt in ("made", "read again"):
        told = processes.obtain(tmp_path / "client", **ask)
        assert told["rows"] == 20_000
        assert told["anonymous"] < 50e6, attempt
    shutil.rmtree(tmp_path / "client")


@pytest.mark.slow
def test_one_that_is_held_in_memory_is_noticed(tmp_path: Path, processes: ReleaseProcesses) -> None:
    """The planted fault of the test above, with a fifth of the images."""
    told = processes.obtain(tmp_path / "client", count=4000, all_at_once=True)
    assert told["anonymous"] > 35e6  # of 49 MB
    assert processes.obtain(tmp_path / "other", count=4000)["anonymous"] < 10e6
