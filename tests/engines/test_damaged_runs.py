"""Runs that were interrupted or damaged: what is refused, and that nothing else differs."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

import fedpdm
from clients.pfdm_client import PFDMClient
from fedpdm.config import RunConfig
from fedpdm.engines import inprocess
from fedpdm.engines.inprocess import run_in_process
from fedpdm.storage.client_store import ClientStore
from fedpdm.storage.files import read_json
from strategies.coarse import CoarseStrategy
from strategies.roster import ClientFailure
from tests.support.command_line import call, without_advice
from tests.support.disk_faults import Crash
from tests.support.federations import small_config
from tests.support.made_once import made_once

pytestmark = pytest.mark.slow

CONFIG = small_config(run={"rounds": 3})
CLOCKS = ("seconds", "coarse_seconds", "images_per_second")


def unclocked(value: Any) -> Any:
    """Without what clocks say."""
    if isinstance(value, Mapping):
        return {name: unclocked(v) for name, v in value.items() if name not in CLOCKS}
    return [unclocked(v) for v in value] if isinstance(value, list) else value


def snapshot(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def cut(
    out: Path,
    config: RunConfig,
    owner: type,
    name: str,
    at: int,
    *,
    after: bool,
    resume: bool = False,
) -> None:
    """A run that ends at the `at`-th call of a method, before it or when it is done."""
    real, open_client, calls = getattr(owner, name), inprocess.client_fn, []

    def last(self: Any, *given: Any, **options: Any) -> Any:
        calls.append(name)
        if len(calls) == at and not after:
            raise Crash
        found = real(self, *given, **options)
        if len(calls) == at:
            raise Crash
        return found

    def while_alive(context: Any) -> Any:
        """The other clients' threads end with the process."""
        if len(calls) >= at:
            raise Crash
        return open_client(context)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, last)
        patch.setattr(inprocess, "client_fn", while_alive)
        with pytest.raises((Crash, ClientFailure)):  # Flower takes the first for a client's
            run_in_process(config, out, resume=resume)
    assert len(calls) == at


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run, start to end."""

    def make(folder: Path) -> None:
        run_in_process(CONFIG, folder / "out")

    return made_once(tmp_path_factory, "three-rounds", make) / "out"


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Cut in the second round, when client 1 has half of its fine steps and client 0 all."""

    def make(folder: Path) -> None:
        cut(folder / "out", CONFIG, ClientStore, "save_partial", 5, after=True)

    return made_once(tmp_path_factory, "interrupted", make) / "out"


def refused(capsys: pytest.CaptureFixture[str], *command: Any) -> str:
    """What a command says on standard error, which must be one line and advice; exit code 2."""
    assert call(*command) == 2
    line = without_advice(capsys.readouterr().err)
    assert line.count("\n") == 1, line
    return line


# --- Damage ---------------------------------------------------------------------------------

RESUMED = (
    "config.yaml", "server/checkpoint.safetensors", "clients/1/rounds/000001/coarse.safetensors",
    "clients/1/rounds/000001/fine.safetensors", "clients/1/rounds/000001/reply.safetensors",
    "clients/1/rounds/000001/reply.json", "clients/0/rounds/000002/fine.safetensors",
    "clients/1/partial/fine.safetensors", "clients/1/members.json", "clients/1/classes.json",
    "clients/1/privacy.json", "clients/1/ledger.jsonl", "clients/1/releases/000001.safetensors",
)  # fmt: skip
EXPORTED = (
    "config.yaml", "coarse.safetensors", "privacy.json", "clients/1/rounds/000003/fine.safetensors",
    "clients/1/ledger.jsonl", "clients/1/privacy.json",
)  # fmt: skip
EVALUATED = ("config.yaml", "coarse.safetensors", "clients/1/rounds/000003/fine.safetensors")


def changed_copy(run: Path, out: Path, name: str, where: float) -> dict[str, bytes]:
    """A copy of a run with one bit changed in a file, at that part of it; all its files."""
    shutil.copytree(run, out)
    path = out / name
    data = bytearray(path.read_bytes())
    data[int(where * (len(data) - 1))] ^= 1
    path.write_bytes(data)
    return snapshot(out)


@pytest.mark.parametrize("where", [0.5, 0.9])
@pytest.mark.parametrize("name", RESUMED)
def test_a_damaged_file_stops_a_resume_before_anything_is_written(
    interrupted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, where: float
) -> None:
    out = tmp_path / "out"
    before = changed_copy(interrupted, out, name, where)
    line = refused(capsys, "run", "--resume", "--out", out, "--engine", "inprocess")
    assert f"{out / name}: " in line
    assert snapshot(out) == before


def test_the_in_process_engine_looks_itself(interrupted: Path, tmp_path: Path) -> None:
    """`fedpdm.run(resume=True)` makes no checks of its own before it."""
    name = "clients/2/rounds/000001/fine.safetensors"
    before = changed_copy(interrupted, tmp_path / "out", name, 0.7)
    with pytest.raises(ValueError, match=rf"{name}: is not as it was written"):
        run_in_process(CONFIG, tmp_path / "out", resume=True)
    assert snapshot(tmp_path / "out") == before


@pytest.mark.parametrize("name", EXPORTED)
def test_a_damaged_file_stops_an_export(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out = tmp_path / "out"
    before = changed_copy(whole, out, name, 0.6)
    line = refused(capsys, "export", out, "--client", 1, "--out", tmp_path / "pipeline")
    assert f"{out / name}: " in line
    assert snapshot(out) == before
    assert not (tmp_path / "pipeline").exists()


@pytest.mark.parametrize("name", EVALUATED)
def test_a_damaged_file_stops_an_evaluation(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    out = tmp_path / "out"
    before = changed_copy(whole, out, name, 0.6)
    line = refused(capsys, "evaluate", out, "--clients", 1, "--num", 10, "--out", tmp_path / "s")
    assert f"{out / name}: " in line
    assert snapshot(out) == before
    assert not (tmp_path / "s").exists()


def test_another_client_s_model_is_not_exported(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    name = "rounds/000003/fine.safetensors"
    shutil.copy(out / "clients" / "0" / name, out / "clients" / "1" / name)
    with pytest.raises(ValueError, match=r"clients/1/.*: is the file of client 0 .*of client 1"):
        fedpdm.export_client(out, tmp_path / "pipeline", client=1)
    assert not (tmp_path / "pipeline").exists()


# --- Interruptions --------------------------------------------------------------------------

# A method, the call of it at which the process ends, and whether that call is done first. Each run
# is cut twice, and the second process counts its calls anew.
Cut = tuple[type, str, int, bool]
CUTS: dict[str, tuple[Cut, Cut]] = {
    "inside a client's fine steps, before the last evaluation": (
        (ClientStore, "save_partial", 5, True), (CoarseStrategy, "configure_evaluate", 2, False),
    ),
    "after a client's round, inside the last evaluation": (
        (PFDMClient, "_fit", 4, True), (PFDMClient, "_evaluate", 5, True),
    ),
    "inside an evaluation, inside the round after it": (
        (PFDMClient, "_evaluate", 5, False), (PFDMClient, "_fit", 2, True),
    ),
    "after an evaluation, before the next": (
        (CoarseStrategy, "aggregate_evaluate", 1, True),
        (CoarseStrategy, "configure_evaluate", 2, False),
    ),
}  # fmt: skip


@pytest.mark.parametrize("names", CUTS)
def test_a_resumed_run_has_the_records_of_one_that_was_not_cut(
    whole: Path, tmp_path: Path, names: str
) -> None:
    out = tmp_path / "out"
    for number, (owner, method, at, after) in enumerate(CUTS[names]):
        cut(out, CONFIG, owner, method, at, after=after, resume=number > 0)
    run_in_process(CONFIG, out, resume=True)
    records = [unclocked(read_json(path / "metrics.json")) for path in (out, whole)]
    assert records[0] == records[1]
    assert [record["heldout_coarse_loss"] > 0 for record in records[0]["rounds"]] == [True] * 3
    models = [(path / "coarse.safetensors").read_bytes() for path in (out, whole)]
    assert models[0] == models[1]
    assert not list(out.rglob(".*.tmp"))


def test_a_round_without_an_evaluation_gets_none_on_resume(tmp_path: Path) -> None:
    """And the second process counts the seconds of both."""
    config = small_config(
        run={"rounds": 3}, data={"max_images": 160}, partition={"num_clients": 2},
        evaluation={"every": 2, "image_metrics": False},
    )  # fmt: skip
    run_in_process(config, tmp_path / "whole")
    cut(tmp_path / "cut", config, PFDMClient, "_fit", 3, after=False)
    cut(tmp_path / "cut", config, CoarseStrategy, "configure_evaluate", 1, after=False, resume=True)
    before = read_json(tmp_path / "cut" / "metrics.json")["rounds"][1]["seconds"]
    run_in_process(config, tmp_path / "cut", resume=True)
    records = [unclocked(read_json(tmp_path / run / "metrics.json")) for run in ("cut", "whole")]
    assert records[0] == records[1]
    evaluated = ["heldout_coarse_loss" in record for record in records[0]["rounds"]]
    assert evaluated == [False, True, True]
    after = read_json(tmp_path / "cut" / "metrics.json")["rounds"][1]["seconds"]
    assert before < after < before + 60


def test_temporary_files_of_a_killed_run_are_gone_after_a_resume(
    interrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    shutil.copytree(interrupted, out)
    name = f".{os.getpid()}.tmp"  # in a container, a process may have the number of a killed one
    for place in (".partition.txt", ".samples.png", "server/.checkpoint.safetensors",
                  "clients/1/.classes.json", "clients/2/partial/.fine.safetensors"):  # fmt: skip
        (out / place).parent.mkdir(exist_ok=True)
        (out / f"{place}{name}").touch()
    run_in_process(CONFIG, out, resume=True)
    assert not list(out.rglob(".*.tmp"))
