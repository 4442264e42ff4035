"""Whatever can be refused is refused at once: exit code 2, one line that names it, no trace."""

from __future__ import annotations

import contextlib
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from fedpdm.engines.flower import _port, run_with_flower
from tests.support.refusals import CONFIG, Refuser


@pytest.fixture
def refuser(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Refuser:
    return Refuser(tmp_path, capsys, monkeypatch)


# The experiment file and its keys.

KEYS = {
    "privacy.clipnorm=3": "privacy.clipnorm: unknown key; did you mean clip_norm?",
    "privcy.clip_norm=3": "privcy: unknown key; did you mean privacy?",
    "privacy.clip_norm=ten": "privacy.clip_norm: must be float, got 'ten'",
    "privacy.clip_norm=-1": "privacy.clip_norm: must be greater than 0, got -1.0",
    "privacy.clip_norm=.inf": "privacy.clip_norm: must be finite, got inf",
    "privacy.delta=1": "privacy.delta: must be less than 1, got 1.0",
    "run.rounds=2.5": "run.rounds: must be int, got 2.5",
    "run.rounds=0": "run.rounds: must be at least 1, got 0",
    "run.rounds=true": "run.rounds: must be int, got True",
    "data.name=digit": "data.name: must be one of .* got 'digit'; did you mean digits?",
    "privacy.clip_norm=[1": "privacy.clip_norm: not valid YAML",
    "privacy.clip_norm": "--set 'privacy.clip_norm': must have the form section.key=value",
    "run=3": "run: must be a mapping, got 3",
    "privacy.t0=500": "privacy: give exactly one of epsilon and t0",
    "name=a/b": "name: must be 1 to 128 letters, digits .* got 'a/b'",
}


@pytest.mark.slow
@pytest.mark.parametrize("setting", KEYS)
def test_key(refuser: Refuser, setting: str) -> None:
    words = KEYS[setting]
    line = refuser.run_line(setting)
    start, _, end = words.partition(" .* ")
    assert line.startswith(f"fedpdm: {start}")
    assert line.endswith(end)


def test_missing_experiment(refuser: Refuser) -> None:
    line = refuser.line("run", "nowhere.yaml", "--out", "out")
    assert "nowhere.yaml: cannot be read: No such file" in line


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"run: {rounds: 2", "bad.yaml: not valid YAML"),
        (b"run:\n\trounds: 2", "bad.yaml: not valid YAML"),
        (b"- 1\n- 2", "bad.yaml: must hold a mapping, got list"),
        (b"\xff\xfe\x00", "bad.yaml: is not UTF-8 text"),
        (b"base: other.yaml", "other.yaml: cannot be read"),
        (b"base: bad.yaml", "bad.yaml: base files nest deeper than 8 levels"),
        (b"!!python/object/apply:os.getcwd []", "bad.yaml: not valid YAML"),
    ],
)
def test_bad_experiment_file(refuser: Refuser, tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "bad.yaml").write_bytes(content)
    assert words in refuser.line("run", "bad.yaml", "--out", "out")


# What only the checks before a run can see.

CHECKS = {
    "far too many clients": (("partition.num_clients=2000",), r"num_clients .* 1442, got 2000"),
    "classes": (("partition.majority_classes=11",), r"majority_classes .*\[1, 10\], got 11"),
    "too many clients": (
        ("partition.num_clients=200",),
        r"client 1\d\d would have none of its m\w+ class \d \(\d\), .* are 1\d\d for 200 clients",
    ),
    "nothing left to train on": (
        (
            "partition.num_clients=9",
            "partition.majority_ratio=1e6",
            "partition.majority_classes=1",
            "data.max_images=90",
            "data.classes=[0,1]",
            "data.holdout_fraction=0.9",
        ),
        r"client \d has no training image of its m\w+ classes \([01]\): .* held out",
    ),
    "class that is not there": (
        ("data.classes=[3,12]",),
        r"data.classes: must be in \[0, 9\], got 12",
    ),
    "unknown class": (("data.classes=['3','x']",), "data.classes: unknown class 'x' .known: 0, 1"),
    "classes of one": (("data.classes=3",), "data.classes: must be a list, got 3"),
    "class label": (
        ("data.class_label=both", "data.coloring=none"),
        "data.class_label: both needs coloured images",
    ),
    "correlation": (
        ("data.color_correlation=0.5",),
        "color_correlation: needs data.coloring: correlated, got 0.5 and by_label",
    ),
    "no correlation": (("data.coloring=correlated",), "data.color_correlation: must be given with"),
    "attributes": (("data.attributes=[Male]",), "only celeba has attributes, got .* digits"),
    "too small for the U-Net": (
        ("data.resolution=4", "fine.preset=paper"),
        "data.resolution: fine.preset paper needs images of at least 8x8, got 4x4",
    ),
    "resolution": (("data.resolution=2",), "data.resolution: must be at least 4, got 2"),
    "no ratio": (("partition.majority_ratio=null",), "majority_ratio must be given"),
    "no alpha": (("partition.kind=dirichlet",), "alpha must be given for kind dirichlet"),
    "epsilon": (("privacy.epsilon=0.01",), "privacy.epsilon 0.01 cannot be reached with clip_norm"),
    "t0 is T": (("privacy.epsilon=null", "privacy.t0=1000"), "truncated needs t0 < T, .* 1000"),
    "scheduler": (("sampling.scheduler=euler",), "sampling.scheduler must be one .* got 'euler'"),
    "flow": (
        ("sampling.scheduler=FlowMatchEulerDiscreteScheduler",),
        "FlowMatchEuler.*trained_betas",
    ),
    "cannot step": (("sampling.scheduler=KarrasVeScheduler",), "KarrasVe.* cannot run here"),
    "fails late": (("sampling.scheduler=EulerAncestralDiscreteScheduler",), "cannot run here"),
    "backwards": (("sampling.scheduler=DDIMInverseScheduler",), "does not lead from noise"),
    "device": (("run.device=gpu",), "run.device 'gpu' cannot be used here"),
    "no such device": (("run.device=meta",), "run.device 'meta' cannot be used here"),
    "waits forever": (("aggregation.min_clients=4",), "min_clients: must be at most .* 3, got 4"),
    "deployment": (
        ("run.simulation=false", "evaluation.image_metrics=false"),
        "run.simulation: false needs a deployed federation",
    ),
    "chain": (("schedule.beta_end=0.9999",), "schedule.beta_end: .* lower beta_end or num_steps"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHECKS)
def test_check_before_the_run(refuser: Refuser, kind: str) -> None:
    settings, words = CHECKS[kind]
    line = refuser.run_line(*settings)
    assert re.search(words, line), line


# The command line.


@contextlib.contextmanager
def taken_port() -> Iterator[int]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def test_port_in_use() -> None:
    with taken_port() as port, pytest.raises(ValueError, match=f"--port: {port} is in use on 127"):
        _port(port)
    assert _port(port) == port  # it is free again
    assert _port(None) != _port(None)


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_port_out_of_range(port: int) -> None:
    with pytest.raises(ValueError, match=rf"--port: must be in \[1, 65535\], got {port}"):
        _port(port)


def test_refused_port_leaves_no_trace(tmp_path: Path) -> None:
    with taken_port() as port, pytest.raises(ValueError, match="is in use"):
        run_with_flower(CONFIG, tmp_path / "out", port=port)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run",), "experiment: give a YAML file, or --resume with --out"),
        (("run", "--resume"), "experiment: give a YAML file, or --resume with --out"),
        (("run", "--resume", "--out", "out", "--set", "run.seed=1"), "out: is not a run directory"),
        (
            ("run", "digits.yaml", "--cpus", "0", "--out", "out"),
            "--cpus: must be at least 1, got 0",
        ),
        (("show", "out"), "out.*is missing"),
        (("export", "out", "--out", "pipe"), "out: is not a run directory"),
        (("sample", "out", "--out", "grid.png"), "out: is not an exported pipeline"),
        (("sample", "out", "--out", "grid.jpg"), r"must end in \.png"),
    ],
)
def test_arguments(refuser: Refuser, arguments: tuple[str, ...], words: str) -> None:
    line = refuser.line(*arguments)
    assert re.search(words, line), line
