"""A node's warm process works on messages as Flower's own command would."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from fedpdm.engines.flowercli import flower_environment, tool
from fedpdm.engines.warm import warm_process, write_command

NO_SERVER = ("--runtime-api-address", "127.0.0.1:9", "--token", "none", "--insecure")


def wait_for(condition: object, seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def ask(folder: Path, *arguments: str, **options: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [folder / "commands" / "flwr-clientapp", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,  # type: ignore[call-overload]
    )


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder whose warm process is ready, under a path that is too long for a socket's."""
    folder = tmp_path_factory.mktemp("x" * 120)
    write_command(
        folder / "commands", directory=folder / "warm", otherwise=[sys.executable, "-c", "exit(77)"]
    )
    with warm_process(folder / "warm", environment=flower_environment(folder), guarded=False):
        wait_for((folder / "warm" / "warm.sock").exists)
        yield folder


def forked(folder: Path) -> list[psutil.Process]:
    (server,) = [
        process
        for process in psutil.Process().children()
        if {"fedpdm.engines.warm", str(folder / "warm")} <= set(process.cmdline())
    ]
    return server.children()


@pytest.mark.slow
def test_it_says_what_flowers_command_says(warm: Path, tmp_path: Path) -> None:
    for arguments in (["--help"], ["--nonsense"], []):
        own = subprocess.run(
            [tool("flwr-clientapp"), *arguments], capture_output=True, text=True, check=False
        )
        process = ask(warm, *arguments, cwd=tmp_path)
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out, err) == (own.returncode, own.stdout, own.stderr)
    assert forked(warm) == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_work_ends_with_who_asked(warm: Path, tmp_path: Path, number: signal.Signals) -> None:
    process = ask(warm, *NO_SERVER, cwd=tmp_path, env={**os.environ, "FEDPDM_HERE": "1"})
    wait_for(lambda: forked(warm))
    (work,) = forked(warm)
    wait_for(lambda: Path(work.cwd()) == tmp_path)
    process.send_signal(number)
    process.communicate(timeout=120)
    wait_for(lambda: not work.is_running() or work.status() == psutil.STATUS_ZOMBIE)
    # Told to stop, Flower ends in order once it has set up its own handler.
    assert process.returncode != 0 or number == signal.SIGTERM
    wait_for(lambda: forked(warm) == [])


def test_several_at_once(warm: Path, tmp_path: Path) -> None:
    processes = [ask(warm, *NO_SERVER, cwd=tmp_path) for _ in range(3)]
    wait_for(lambda: len(forked(warm)) == 3)
    helped = ask(warm, "--help")
    assert "Run a Flower ClientApp" in helped.communicate(timeout=120)[0]
    for process in processes:
        process.kill()
        process.communicate(timeout=60)
    wait_for(lambda: forked(warm) == [])


def test_without_it_the_command_is_run_as_before(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "import sys; print(sys.argv[1:]); sys.exit(5)"]
    write_command(tmp_path / "commands", directory=tmp_path / "none", otherwise=words)
    process = ask(tmp_path, "--token", "a b")
    out, _ = process.communicate(timeout=60)
    assert (process.returncode, out) == (5, "['--token', 'a b']\n")


@pytest.mark.slow
def test_it_ends_with_the_process_that_began_it(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from fedpdm.engines.warm import warm_process\n"
        "with warm_process(Path(sys.argv[1]), environment={}):\n"
        "    print('begun', flush=True); time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script, tmp_path / "warm"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    (server,) = psutil.Process(process.pid).children()
    process.kill()
    process.communicate(timeout=60)
    with contextlib.suppress(psutil.NoSuchProcess):
        server.wait(timeout=240)
    assert not server.is_running()
