"""Every command of the documentation is executed: here, by another test, or by the workflow.

The few that are not say why (tests/support/documented_commands.py). Here they are executed in the
order of the pages, in a folder that has what the pages speak of; options that make them cheap are
added, and nothing of what is written is taken away.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import DDPMScheduler
from PIL import Image

from fedpdm.privacy.ledger import read_ledger
from fedpdm.storage.files import read_json
from strategies.rounds import RoundBook
from tests.attacks.test_attack_unet import tiny
from tests.data.test_data_public import write_idx
from tests.support.command_line import call, forget_surroundings
from tests.support.documented_commands import (
    RULES,
    Ci,
    Elsewhere,
    Here,
    Never,
    rule_of,
    typed_lines,
)
from tests.support.markdown_pages import ROOT, all_blocks
from tests.support.pixels import random_pixels

LINES = {line: block for block in reversed(all_blocks()) for line in typed_lines(block)}


def test_every_command_has_its_place() -> None:
    nowhere = [f"{block.page}:{block.line}: {line}" for line, block in LINES.items()
               if rule_of(line) is None]  # fmt: skip
    assert nowhere == []
    assert {rule_of(line) for line in LINES} == {*RULES}  # no rule of a command that is gone
    counts = [sum(isinstance(rule_of(line), kind) for line in LINES) for kind in (Here, Never)]
    assert counts[0] > 35
    assert counts[1] <= 20


def test_what_follows_a_prompt_is_a_command() -> None:
    """So that a program that is not known yet does not pass for output; `...` is the reader's."""
    for block in all_blocks():
        if block.language in ("", "bash", "sh", "shell", "console"):
            text = block.text.replace("\\\n", " ")
            prompts = len(re.findall(r"^ *[a-z]*\$ (?!.* \.\.\. )", text, re.MULTILINE))
            assert prompts <= len(typed_lines(block)), f"{block.page}:{block.line}"


@pytest.mark.parametrize("rule", [r for r in RULES if isinstance(r, Elsewhere)], ids=repr)
def test_what_is_said_to_be_done_elsewhere_is_there(rule: Elsewhere) -> None:
    assert rule.words in (ROOT / rule.file).read_text()


def test_what_the_workflow_is_said_to_do_it_does() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    asked = [line for line in LINES if isinstance(rule_of(line), Ci)]
    assert len(asked) > 4
    assert [line for line in asked if f"- run: {line}\n" not in workflow] == []


@pytest.mark.parametrize("line", [line for line in LINES if isinstance(rule_of(line), Never)])
def test_what_is_never_executed_is_understood(line: str) -> None:
    """By the shell; what it calls exists where it is ours."""
    rule = rule_of(line)
    assert isinstance(rule, Never)
    assert len(rule.why) > 10
    subprocess.run(["bash", "-n", "-c", line], check=True)
    program, *rest = shlex.split(line)
    if program == "make":
        subprocess.run(["make", "-n", *rest], cwd=ROOT, check=True, capture_output=True)
    if program == "python":
        assert (ROOT / f"{rest[1].replace('.', '/')}.py").is_file()
    if program.startswith("deploy/"):
        assert os.access(ROOT / program, os.X_OK)


# A folder that has what the pages speak of.


def write_data(folder: Path) -> None:
    """MNIST's files with random pixels, and a folder of images of two classes."""
    for part, count in (("train", 1200), ("t10k", 400)):
        pixels = random_pixels(count, 28, 28, seed=count)
        raw = folder / "data" / "MNIST" / "raw"
        write_idx(raw / f"{part}-images-idx3-ubyte", pixels)
        write_idx(raw / f"{part}-labels-idx1-ubyte", (np.arange(count) % 10).astype(np.uint8))
    for kind in ("cats", "dogs"):
        (folder / "images" / kind).mkdir(parents=True)
        for number, pixels in enumerate(random_pixels(60, 32, 32, 3, seed=len(kind))):
            Image.fromarray(pixels).save(folder / "images" / kind / f"{number}.png")


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    for name in ("experiments", "examples", "deploy"):
        (folder / name).symlink_to(ROOT / name)
    write_data(folder)
    (lungs,) = [b.text for b in all_blocks() if b.language == "yaml" and "benign" in b.text
                and b.page == "docs/deployment.md"]  # fmt: skip
    (folder / "lungs.yaml").write_text(lungs)
    (own,) = [b.text for b in all_blocks() if b.language == "yaml" and "name: mine" in b.text
              and b.page == "docs/how-to/own-images.md"]  # fmt: skip
    (folder / "mine.yaml").write_text(own.replace("/path/to/images", str(folder / "images")))
    for name in ("model", "MODEL"):
        tiny().save_pretrained(folder / name / "unet")
        DDPMScheduler(num_train_timesteps=50).save_pretrained(folder / name / "scheduler")
    for seed, names in enumerate((("a.npz", "A"), ("b.npz", "B"))):
        for name in names:
            with open(folder / name, "wb") as file:
                pixels = random_pixels(24, 8, 8, seed=seed)
                np.savez(file, images=pixels, labels=np.arange(24) % 2)
    return folder


def prepare(line: str, folder: Path) -> None:
    """What a line speaks of and no line before has made."""
    runs = folder / "runs"
    if "runs/eps10" in line:
        for name in ("eps10", "alone"):
            shutil.copytree(runs / "eps3", runs / name)
    if "STORE" in line and not (folder / "STORE").exists():
        (folder / "STORE").symlink_to(runs / "eps3" / "clients" / "0")
    if line.startswith("deploy/make-certificates"):
        shutil.rmtree(folder / "certificates", ignore_errors=True)
    if "node-1.csr" in line:
        shutil.copy(folder / "node-1" / "node-1.csr", folder)


def execute(line: str, rule: Here, folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of a line with its rule's further options."""
    program, *words = shlex.split(line)
    words += rule.more
    if "9d1173..." in words:  # the head that the page's reader has noted
        head = read_head(folder / "STORE")
        words = [head if word == "9d1173..." else word for word in words]
    if program != "fedpdm":
        path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
        done = subprocess.run(
            [program if "/" in program else shutil.which(program, path=path) or program, *words],
            cwd=folder, env={**os.environ, "PATH": path}, capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return 0
    with monkeypatch.context() as patch:
        if rule.interrupted:
            patch.setattr(RoundBook, "tell", interrupt)
        return call(*words)


def interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


def read_head(store: Path) -> str:
    return read_ledger(store / "ledger.jsonl").head


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_the_pages_from_top_to_bottom(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forget_surroundings(monkeypatch, workplace)
    monkeypatch.setenv("FEDPDM_DATA", str(workplace / "data"))
    failed, done = [], set()
    for block in sorted(all_blocks(), key=lambda block: block.page != "README.md"):
        for line in typed_lines(block):
            rule = rule_of(line)
            if not isinstance(rule, Here) or line in done:
                continue
            done.add(line)
            prepare(line, workplace)
            capsys.readouterr()
            code = execute(line, rule, workplace, monkeypatch)
            if code not in rule.codes:
                said = capsys.readouterr().err[-500:]
                failed.append(f"{block.page}:{block.line}: {line}: exit code {code}: {said}")
    assert not failed, "\n".join(failed)
    for name in (
        "runs/eps3/report.html", "compared.html", "grid.png", "releases.png", "invitation.json",
        "attacks/summary.md", "linkage/linkage.json", "signed/node-1.crt", "toy/rates.png",
        "certificates/node-1/node-1.key", "runs/mine/samples.png",
    ):  # fmt: skip
        assert (workplace / name).is_file(), name
    assert read_json(workplace / "runs" / "eps3" / "metrics.json")["rounds"][-1]["round"] == 3
