"""`make test-mutations`: take each refusal, clip and noise away in turn; does a test fail?

    python -m tests.mutations [ROOM ...] [--out DIR] [--list]

A room is some source files and the tests that hold them. Each mutant is one change in a copy of the
repository: a refusal that never comes, one part of its condition left out, a check that is not
called, a bound that is not applied, a noise of zero. The room's tests run until the first fails; a
mutant that none of them notices is a survivor, and wants a test.

Results are kept in DIR (default: runs/mutations) as they come. Started again, the script goes on
where it was, and tries survivors once more whose room's tests have changed.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import hashlib
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support.mutants import changes, mutated

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("bench", "clients", "fedpdm", "strategies", "tests")
HEAVY = ("torch", "numpy", "flwr.server", "flwr.client", "diffusers", "dp_accounting")
SKIPPED = shutil.ignore_patterns(".git", ".venv", "runs", "site", "__pycache__", ".*_cache")
# Room -> (source files, tests): patterns below the repository.
ROOMS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "wire": (
        ("fedpdm/wire/messages.py", "fedpdm/wire/metrics.py", "fedpdm/wire/quantize.py",
         "strategies/answers.py"),
        ("tests/wire/test_wire*.py", "tests/wire/test_quantize.py",
         "tests/engines/test_baselines_promises.py", "tests/privacy/test_mechanism_door.py",
         "tests/strategies/test_message_headers.py",
         "tests/strategies/test_hostile_participants.py",
         "tests/strategies/test_strategies_refusal.py",
         "tests/strategies/test_strategies_server.py"),
    ),
    "ledger": (
        ("fedpdm/privacy/ledger.py", "strategies/ledgers.py"),
        ("tests/privacy/test_ledger*.py", "tests/privacy/test_releases_damage.py",
         "tests/privacy/test_release_identities.py", "tests/privacy/test_release_traces.py",
         "tests/strategies/test_ledgers.py"),
    ),
    "releases": (
        ("fedpdm/privacy/releases/*.py",),
        ("tests/privacy/test_release*.py", "tests/privacy/test_ledger.py",
         "tests/privacy/test_mechanism_door.py"),
    ),
    "policy": (
        ("fedpdm/deployment/policy.py", "fedpdm/deployment/registered.py", "clients/bounds.py"),
        ("tests/deployment/test_node_policy.py", "tests/deployment/test_registered.py",
         "tests/deployment/test_deployed_client.py",
         "tests/deployment/test_hostile_coordinator.py"),
    ),
    "acceptance": (
        ("fedpdm/deployment/acceptance.py", "fedpdm/deployment/invitation.py",
         "fedpdm/engines/deployed/node.py"),
        ("tests/deployment/test_node_policy.py", "tests/deployment/test_node_check.py",
         "tests/deployment/test_invitation.py"),
    ),
    "roster": (("strategies/roster.py",), ("tests/strategies/test_roster.py",)),
    "secure": (
        ("strategies/secure_*.py", "clients/masking.py", "fedpdm/wire/summands.py",
         "fedpdm/wire/totals.py"),
        ("tests/strategies/test_secure*.py",),
    ),
    "mechanism": (
        ("fedpdm/privacy/mechanism/*.py", "fedpdm/privacy/noise.py", "fedpdm/privacy/counts.py"),
        ("tests/privacy/test_mechanism*.py", "tests/privacy/test_noise*.py",
         "tests/privacy/test_release_records.py", "tests/privacy/test_bound_through_client.py",
         "tests/privacy/test_statistics*.py", "tests/privacy/test_component*.py",
         "tests/publishing/test_export_counts.py"),
    ),
    "dpsgd": (("fedpdm/privacy/dpsgd/*.py",), ("tests/privacy/test_dpsgd*.py",)),
    "storage": (("fedpdm/storage/*.py",), ("tests/storage/test_*.py",)),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One change: the `number`-th in a file."""

    room: str
    path: str
    number: int
    line: int
    kind: str
    where: str
    code: str

    @property
    def key(self) -> str:
        """The same as long as its own lines are."""
        return f"{self.path} {self.where} {self.kind}: {self.code}"


def mutants(room: str) -> Iterator[Mutant]:
    """All of a room, in the order of files and lines."""
    for path in _files(ROOMS[room][0]):
        _, found = changes((ROOT / path).read_text(encoding="utf-8"))
        for number, (node, kind, where, code, _) in enumerate(found.found):
            line = getattr(node, "lineno", 0)
            yield Mutant(room=room, path=path, number=number, line=line, kind=kind, where=where,
                         code=code)  # fmt: skip


def _files(patterns: Sequence[str]) -> list[str]:
    found = [path for pattern in patterns for path in sorted(ROOT.glob(pattern))]
    return [path.relative_to(ROOT).as_posix() for path in found]


# Trying one.


class First:
    """Notes the first test that failed; quick tests come first."""

    def __init__(self) -> None:
        self.name = ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=lambda item: item.get_closest_marker("slow") is not None)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.name:
            self.name = f"{report.nodeid} (cannot be imported)"


def run_tests(copy: Path, tests: Sequence[str], log: Path, *, seconds: float) -> str:
    """Which test failed first in the copy, or nothing. A run that takes too long has failed too.

    Tests run in a child that has the heavy libraries already.
    """
    answer = log.with_suffix(".first")
    answer.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        os.setsid()
        with open(log, "wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        os.chdir(copy)
        os.environ |= {"PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        sys.dont_write_bytecode = True
        sys.path[:] = [str(copy), *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
        for name in [name for name in sys.modules if name.split(".")[0] in PACKAGES]:
            del sys.modules[name]
        first = First()
        options = ["-x", "-q", "-p", "no:cacheprovider"]
        options += ["-W", "ignore:Module already imported:pytest.PytestAssertRewriteWarning"]
        code = pytest.main([*options, *tests], plugins=[first])
        answer.write_text(first.name or ("" if code == 0 else f"pytest ended with {code}"))
        sys.stdout.flush()
        os._exit(0)
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            if os.waitpid(child, os.WNOHANG)[0]:
                return answer.read_text() if answer.exists() else "the process of the tests ended"
            time.sleep(0.05)
        return f"no end within {seconds:.0f} s"
    finally:  # with what it has started, and after Ctrl-C too
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            os.waitpid(child, 0)


class Results:
    """Outcomes by mutant, a line of JSON each; the last one of a mutant counts."""

    def __init__(self, folder: Path, room: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / f"{room}.jsonl"
        self._known: dict[str, dict[str, Any]] = {}
        sha = hashlib.sha256()
        for path in _files(ROOMS[room][1]):
            sha.update((ROOT / path).read_bytes())
        self._tests = sha.hexdigest()
        if self._path.exists():
            for line in self._path.read_text().splitlines():
                record = json.loads(line)
                self._known[record["key"]] = record

    def find(self, mutant: Mutant, *, survivors_again: bool = True) -> dict[str, Any] | None:
        record = self._known.get(mutant.key)
        stale = record and not record["failed"] and record["tests"] != self._tests
        return None if stale and survivors_again else record

    def keep(self, mutant: Mutant, failed: str) -> None:
        record = {"key": mutant.key, "failed": failed, "tests": self._tests,
                  **dataclasses.asdict(mutant)}  # fmt: skip
        self._known[mutant.key] = record
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def try_room(room: str, out: Path, copy: Path) -> None:
    """Try what has no result yet. Ends with an error if the tests fail as things are."""
    results, everything = Results(out, room), list(mutants(room))
    todo = [mutant for mutant in everything if results.find(mutant) is None]
    if not todo:
        return
    tests, log = _files(ROOMS[room][1]), out / f"{room}.log"
    started = time.monotonic()
    print(f"{room}: {len(todo)} of {len(everything)} mutants to try; first without any", flush=True)
    if failed := run_tests(copy, tests, log, seconds=3600):
        raise SystemExit(f"{room}: {failed} fails without a mutant; see {log}")
    limit = 60 + 3 * (time.monotonic() - started)
    started = time.monotonic()
    for done, mutant in enumerate(todo):
        path = copy / mutant.path
        source = path.read_text(encoding="utf-8")
        try:
            path.write_text(mutated(source, mutant.number), encoding="utf-8")
            failed = run_tests(copy, tests, log, seconds=limit)
        finally:
            path.write_text(source, encoding="utf-8")
        results.keep(mutant, failed)
        left = (time.monotonic() - started) / (done + 1) * (len(todo) - done - 1)
        what = f"noticed by {failed}" if failed else "SURVIVED"
        print(f"{room} {done + 1}/{len(todo)}, {left / 60:.0f} min left: {mutant.path}:"
              f"{mutant.line} {mutant.kind}: {what}", flush=True)  # fmt: skip


def table(rooms: Sequence[str], out: Path) -> str:
    """Markdown: a row for each room, then the survivors."""
    lines = ["| room | mutants | noticed | survived | not tried |", "|---|---|---|---|---|"]
    survivors = []
    for room in rooms:
        results, everything = Results(out, room), list(mutants(room))
        found = [results.find(mutant, survivors_again=False) for mutant in everything]
        alive = [m for m, r in zip(everything, found, strict=True) if r and not r["failed"]]
        untried = found.count(None)
        noticed = len(everything) - len(alive) - untried
        lines.append(f"| {room} | {len(everything)} | {noticed} | {len(alive)} | {untried} |")
        survivors += [f"- {m.path}:{m.line} {m.where}, {m.kind}: `{m.code}`" for m in alive]
    return "\n".join([*lines, "", *(survivors or ["No survivors."])]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("rooms", nargs="*", choices=[[], *ROOMS], help="default: all")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "mutations")
    parser.add_argument("--list", action="store_true", help="show the mutants, try none")
    options = parser.parse_args()
    rooms = options.rooms or list(ROOMS)
    if options.list:
        for room in rooms:
            for mutant in mutants(room):
                print(f"{room}  {mutant.path}:{mutant.line}  {mutant.kind}: {mutant.code}")
        return
    out = options.out.resolve()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        with tempfile.TemporaryDirectory(prefix="mutations-") as folder:
            copy = Path(folder) / "fedpdm"
            shutil.copytree(ROOT, copy, ignore=SKIPPED)
            for name in HEAVY:
                importlib.import_module(name)
            for room in rooms:
                try_room(room, out, copy)
    finally:
        text = table(rooms, out)
        (out / "table.md").write_text(text)
        print(text)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
