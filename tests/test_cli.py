"""The `fedpdm` command: fast to ask, honest about its outcome."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import fedpdm
from clients.pfdm_client import PFDMClient
from fedpdm.cli import main
from fedpdm.config import RunConfig, config_to_yaml, load_config
from fedpdm.store import ClientStore, read_tensors
from tests.federations import small_config

ROOT = Path(fedpdm.__file__).resolve().parent.parent
CONFIG = small_config(
    run={"rounds": 1},
    data={"max_images": 120},
    partition={"num_clients": 2},
    coarse={"steps_per_round": 1},
    fine={"steps_per_round": 1},
    sampling={"num_steps": 2},
    evaluation={"num_images": 4},
)
COMMANDS = ("run", "show", "export", "sample", "stop", "config")


@pytest.fixture(autouse=True)
def _plain_surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("FEDPDM_DATA", "FEDPDM_RUNS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def experiment(tmp_path: Path) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(config_to_yaml(CONFIG))
    return path


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run that `main` has brought to its end."""
    folder = tmp_path_factory.mktemp("cli")
    (folder / "small.yaml").write_text(config_to_yaml(CONFIG))
    arguments = ("run", folder / "small.yaml", "--engine", "inprocess", "--out", folder / "out")
    assert main([str(argument) for argument in arguments]) == 0
    yield folder / "out"


def call(*arguments: Any) -> int:
    return main([str(argument) for argument in arguments])


def in_process(*arguments: Any) -> int:
    return call("run", *arguments, "--engine", "inprocess")


# Asking.


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_help_comes_at_once() -> None:
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        answer = python("-m", "fedpdm.cli", "--help")
        seconds.append(time.perf_counter() - started)
        assert answer.returncode == 0
        assert answer.stderr == ""
    assert min(seconds) < 1.0
    assert all(command in answer.stdout for command in COMMANDS)


@pytest.mark.parametrize("arguments", [["--help"], ["config"], ["run", "--help"], ["run", "x"]])
def test_no_heavy_library_for_light_questions(arguments: list[str]) -> None:
    """Also not for a run that is refused because its experiment file is missing."""
    code = (
        "import sys\nfrom fedpdm.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'flwr', 'diffusers', 'ray', 'matplotlib', 'scipy'}\n"
        "print('heavy:', sorted(heavy & sys.modules.keys()))"
    )
    assert python("-c", code).stdout.splitlines()[-1] == "heavy: []"


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        call(command, "--help")
    assert caught.value.code == 0
    assert f"usage: fedpdm {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", [(), ("train",), ("run", "--engine", "grpc"), ("show",), ("run", "--cpus", "two")]
)
def test_what_is_no_command_has_exit_code_2(arguments: tuple[str, ...]) -> None:
    with pytest.raises(SystemExit) as caught:
        call(*arguments)
    assert caught.value.code == 2


def test_config_lists_every_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("config") == 0
    table = capsys.readouterr().out
    listed = re.findall(r"^\| `([\w.]+)` \|", table, flags=re.MULTILINE)
    keys = [
        f"{section}.{key}"
        for section, values in dataclasses.asdict(RunConfig()).items()
        if isinstance(values, dict)
        for key in values
    ]
    assert sorted(listed) == sorted(["name", *keys])
    assert len(listed) > 60
    assert all(len(re.split(r"(?<!\\)\|", line)) == 5 for line in table.splitlines())


# Running.


def test_dry_run_writes_nothing(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for flags in ((), ("--out", tmp_path / "out"), ("--out", tmp_path / "a" / "b")):
        assert in_process(experiment, "--dry-run", *flags) == 0
        told = capsys.readouterr()
        assert "120 images of digits" in told.out
        assert "2 clients with" in told.out
        assert re.search(r"t0 = \d+ of 1000, clip norm 8 around -1, epsilon 9\.\d+", told.out)
        assert told.err == ""
    assert list(tmp_path.iterdir()) == [experiment]


def test_run_writes_its_results(finished: Path) -> None:
    for name in ("config.yaml", "metrics.json", "privacy.json", "log.txt", "coarse.safetensors"):
        assert (finished / name).stat().st_size > 0
    for name in ("samples.png", "partition.png"):
        with Image.open(finished / name) as picture:
            picture.verify()
    assert load_config(finished / "config.yaml") == CONFIG
    metrics = json.loads((finished / "metrics.json").read_text())
    assert [record["round"] for record in metrics["rounds"]] == [1]
    assert {client["client_id"] for client in metrics["final"]["clients"]} == {0, 1}
    assert "round 1/1" in (finished / "log.txt").read_text()


def test_run_prints_its_summary_and_show_repeats_it(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert in_process(experiment, "--out", out, "--set", "run.seed=8") == 0
    told = capsys.readouterr().out
    assert load_config(out / "config.yaml").run.seed == 8
    assert call("show", out) == 0
    shown = capsys.readouterr().out
    assert told.endswith(shown)
    assert "locally differentially private" in shown
    assert "Frechet distance" in shown


def test_default_directory_is_named_after_the_experiment(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(
        "fedpdm.engines.inprocess.run_in_process",
        lambda config, out, resume: seen.append((config.name, out, resume)),
    )
    assert in_process(experiment) == 0
    monkeypatch.setenv("FEDPDM_RUNS", str(tmp_path / "disk"))
    assert in_process(experiment, "--set", "name=other") == 0
    assert seen == [
        ("small", tmp_path / "runs" / "small", False),
        ("other", tmp_path / "disk" / "other", False),
    ]


def test_data_directory_becomes_absolute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flower's processes work elsewhere, and so does whoever resumes."""
    seen = []
    monkeypatch.setattr(
        "fedpdm.engines.preflight.check_run",
        lambda config, out, resume: seen.append(config.data.root) or [],
    )
    (tmp_path / "own.yaml").write_text("data: {name: npz, root: own.npz}")
    (tmp_path / "env.yaml").write_text("data: {name: npz}")
    assert in_process("own.yaml", "--dry-run") == 0
    monkeypatch.setenv("FEDPDM_DATA", "images/own.npz")
    assert in_process("env.yaml", "--dry-run") == 0
    assert in_process("own.yaml", "--dry-run") == 0
    own = str(tmp_path / "own.npz")
    assert seen == [own, str(tmp_path / "images" / "own.npz"), own]


# Failing.


def test_failed_client_has_exit_code_1_and_a_name(
    experiment: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train = PFDMClient._train_fine

    def fail_at_client_1(self: PFDMClient, *arguments: Any) -> Any:
        if self.local.client_id == 1:
            raise FloatingPointError("loss is nan at step 1")
        return train(self, *arguments)

    monkeypatch.setattr(PFDMClient, "_train_fine", fail_at_client_1)
    assert in_process(experiment, "--out", tmp_path / "out") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "fedpdm: round 1 fit: client 1: loss is nan at step 1"
    assert call("show", tmp_path / "out") == 2


def test_unexpected_failure_of_a_client_names_it_too(
    experiment: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    release = PFDMClient.release

    def fail_at_client_0(self: PFDMClient) -> Any:
        if self.local.client_id == 0:
            raise RuntimeError("CUDA error: out of memory")
        return release(self)

    monkeypatch.setattr(PFDMClient, "release", fail_at_client_0)
    assert in_process(experiment, "--out", tmp_path / "out") == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == "fedpdm: round 1 fit: client 0: CUDA error: out of memory"


def test_diverging_server_training_has_exit_code_1(
    experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = ("coarse.training=server", "coarse.lr=1e30", "coarse.steps_per_round=30")
    sets = [word for setting in settings for word in ("--set", setting)]
    assert in_process(experiment, "--out", tmp_path / "out", *sets) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"fedpdm: server round 1 coarse: loss is (nan|inf) at step \d+", last)


def test_interrupted_run_has_exit_code_130_and_resumes(
    experiment: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:

        def interrupt(self: PFDMClient, *arguments: Any) -> Any:
            raise KeyboardInterrupt

        patch.setattr(PFDMClient, "_evaluate", interrupt)
        assert in_process(experiment, "--out", out) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("interrupted; nothing is lost")
    assert in_process("--resume", "--out", out) == 0
    assert "resumed after round 1 of 1" in capsys.readouterr().out
    assert in_process("--resume", "--out", out) == 2  # it has finished


def test_a_bug_is_not_dressed_up(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only foreseen failures become one line; the traceback of a fault in the code stays."""

    def fault(*_: Any, **__: Any) -> None:
        raise RuntimeError("not of ours")

    monkeypatch.setattr("fedpdm.engines.preflight.check_run", fault)
    with pytest.raises(RuntimeError, match="not of ours"):
        in_process(experiment)


# Afterwards.


def test_export_of_an_unknown_client(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("export", finished, "--client", 7, "--out", "pipe") == 2
    line = capsys.readouterr().err
    assert "client 7 has no fine model there; clients that have one: 0, 1" in line
    assert line.count("\n") == 1
    assert not Path("pipe").exists()


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_export_then_sample(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("export", finished, "--client", 1, "--out", "pipe") == 0
    assert capsys.readouterr().out == "pipeline of client 1 written to pipe\n"
    common = ("sample", "pipe", "--num", 2, "--steps", 2, "--label", 3, "--out", "grid.png")
    assert call(*common) == 0
    assert capsys.readouterr().out == "2 samples written to grid.png\n"
    with Image.open("grid.png") as picture:
        picture.verify()
    for wrong in (("--scheduler", "euler"), ("--label", 99), ("--steps", 0)):
        assert call(*common, *wrong) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_results_are_what_the_run_computed(finished: Path) -> None:
    """The published model is the average in the checkpoint, and every client has its own."""
    checkpoint = read_tensors(finished / "server" / "checkpoint.safetensors")[0]
    for name, value in read_tensors(finished / "coarse.safetensors")[0].items():
        assert value.equal(checkpoint[f"ema.{name}"])
    assert all(ClientStore(finished / "clients" / str(k)).last_round() == 1 for k in (0, 1))
