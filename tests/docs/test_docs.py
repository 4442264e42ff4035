"""What the documentation tells people to type, parsed by the real parser; its links, its Python.

tests/docs/test_docs_commands.py executes the commands.
"""

from __future__ import annotations

import argparse
import ast
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedpdm.cli import main
from fedpdm.config import RunConfig, config_from_mapping
from tests.support.cases import every
from tests.support.command_line import call, forget_surroundings
from tests.support.markdown_pages import PAGES, ROOT, Block, all_blocks, blocks_of, commands_of
from tests.test_layers import RANKS

BLOCKS = all_blocks()
COMMANDS = [(block, words) for block in BLOCKS for words in commands_of(block, "fedpdm")]
TARGETS = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


class Parsed(BaseException):
    """Ends the command once its words were understood."""


def parse(words: list[str]) -> None:
    """Raise `Parsed` if `fedpdm WORDS` is understood, else `SystemExit`; nothing is run."""
    real = argparse.ArgumentParser.parse_args

    def parse_only(self: argparse.ArgumentParser, *given: Any, **options: Any) -> None:
        real(self, *given, **options)
        raise Parsed

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(argparse.ArgumentParser, "parse_args", parse_only)
        main(words)


def name(value: Any) -> str:
    if isinstance(value, Block):
        return f"{value.page}:{value.line}"
    return " ".join(value)[:50] if isinstance(value, list) else ""


@pytest.mark.slow
@every("block, words", COMMANDS)
def test_commands_are_understood(block: Block, words: list[str]) -> None:
    with pytest.raises(Parsed):
        parse(words)


def test_a_command_that_is_wrong_is_found(capsys: pytest.CaptureFixture[str]) -> None:
    text = "x\n```\nfedpdm show runs/a --colour red   # no such option\nls\n```\n"
    (block,) = blocks_of(text, "page.md")
    ((*words,),) = commands_of(block, "fedpdm")
    assert (block.line, words) == (2, ["show", "runs/a", "--colour", "red"])
    with pytest.raises(SystemExit):
        parse(words)
    assert "--colour" in capsys.readouterr().err
    joined = Block("", 1, "", "$ .venv/bin/fedpdm run a.yaml \\\n  --set 'a.b=[1, 2]'   and so\n")
    assert commands_of(joined, "fedpdm") == [["run", "a.yaml", "--set", "a.b=[1, 2]"]]
    assert len(COMMANDS) > 30  # the pages are read at all


def test_make_targets_exist() -> None:
    asked = [(b, word) for b in BLOCKS for words in commands_of(b, "make") for word in words]
    for page in PAGES:
        inline = re.findall(r"`make ([a-z-]+)", (ROOT / page).read_text())
        asked += [(Block(page, 0, "", ""), word) for word in inline]
    assert len(asked) > 10
    for block, word in asked:
        assert "=" in word or word in TARGETS, f"{name(block)}: make {word}"


def test_examples_exist() -> None:
    asked = [words[0] for block in BLOCKS for words in commands_of(block, "python")]
    assert len(asked) >= 3
    assert all((ROOT / file).is_file() for file in asked if file.endswith(".py"))
    written = {path.relative_to(ROOT).as_posix() for path in (ROOT / "examples").glob("*.py")}
    assert written <= set(asked)


def test_make_help_lists_every_target() -> None:
    done = subprocess.run(
        ["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert TARGETS - {"help"} <= set(re.findall(r"make ([a-z-]+)", done.stdout))


@every("block", [b for b in BLOCKS if b.language == "yaml"])
def test_run_configs_are_accepted(block: Block) -> None:
    mapping = yaml.safe_load(block.text)
    if set(mapping) <= set(RunConfig.__dataclass_fields__):  # others: policies, workflows
        assert config_from_mapping(mapping) is not None


@every("block", [b for b in BLOCKS if b.language == "python"])
def test_python_is_python(block: Block) -> None:
    assert compile(block.text, f"{block.page}:{block.line}", "exec") is not None


def slugs(text: str) -> set[str]:
    """Anchors of a page's headings, as GitHub and Python-Markdown make them."""
    plain = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    heads = re.findall(r"^#+ (.+)$", plain, re.MULTILINE)
    kept = [re.sub(r"[^\w\s-]", "", head.lower()).strip() for head in heads]
    return {re.sub(r"\s+", "-", head) for head in kept}


@every("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    prose = re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", prose):
        if re.match(r"(https|mailto):", target):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), f"{page}: {target}"
        assert not anchor or anchor in slugs(path.read_text()), f"{page}: {target}"


def test_the_readme_is_short_and_shows_a_picture() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    (picture,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert (ROOT / picture).stat().st_size < 300_000
    assert "make demo " in text
    assert "make test " in text


def test_the_readme_claims_no_more_than_the_tables_show() -> None:
    """Each row of its headline table is cut out of the same row of docs/results.md."""

    def rows(text: str) -> list[dict[str, str]]:
        lines = [[c.strip() for c in line.strip("| ").split("|")] for line in text.splitlines()]
        head, cells = lines[0], lines[2:]
        return [dict(zip(head, row, strict=True)) for row in cells]

    readme = (ROOT / "README.md").read_text()
    claimed = rows(re.findall(r"(?:^\| method \|.*\n)(?:^\|.*\n)+", readme, re.MULTILINE)[0])
    page = (ROOT / "docs" / "results.md").read_text().split("## Colorized MNIST, profile cpu")[1]
    shown = rows(re.findall(r"(?:^\| method \|.*\n)(?:^\|.*\n)+", page, re.MULTILINE)[0])
    measured = {row["method"]: row for row in shown}
    assert len(claimed) >= 5
    for row in claimed:
        assert row == {name: measured[row["method"]][name] for name in row}


def test_the_architecture_page_has_every_room_and_the_ranks() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    by_rank: dict[int, list[str]] = {}
    for room, rank in RANKS.items():
        by_rank.setdefault(rank, []).append(f"`{room}`")
    table = [f"| {rank} | {', '.join(by_rank[rank])} |" for rank in sorted(by_rank, reverse=True)]
    assert re.findall(r"^\| \d+ \| .*$", text, re.MULTILINE) == table
    rooms = text.split("## The rooms")[1].split("## The way of an image")[0]
    described = set(re.findall(r"\*\*`([\w.]+)`\*\*", rooms))
    assert described >= RANKS.keys() - {"fedpdm"}


def test_what_the_changelog_says_has_moved_is_there() -> None:
    rows = re.findall(r"^\| .*`([\w.]+)` \|$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert len(rows) > 60
    for module in rows:
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__init__.py").is_file(), module


def test_every_package_says_what_it_is_for() -> None:
    for room in RANKS.keys() - {"fedpdm.rng", "fedpdm.text", "fedpdm.processors", "fedpdm.cli"}:
        text = (ROOT / room.replace(".", "/") / "__init__.py").read_text()
        assert "import" in (ast.get_docstring(ast.parse(text)) or ""), room


def test_the_sites_menu_has_every_page() -> None:
    class Loader(yaml.SafeLoader):
        """Icons of the theme are written with a tag."""

    Loader.add_multi_constructor("!", lambda *_: None)

    def pages(entry: Any) -> set[str]:
        if isinstance(entry, str):
            return {entry}
        values = entry.values() if isinstance(entry, dict) else entry
        return set().union(*(pages(value) for value in values))

    nav = yaml.load((ROOT / "mkdocs.yml").read_text(), Loader)["nav"]
    assert pages(nav) == {p.removeprefix("docs/") for p in PAGES if p.startswith("docs/")}


# Python is executed.


@pytest.fixture(scope="module")
def workplace(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a finished run in runs/eps3."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(finished_run, folder / "runs" / "eps3")
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("page", ["docs/tutorial.md", "docs/how-to/pipelines.md"])
def test_pages_in_python_work(page: str, workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_surroundings(monkeypatch, workplace)
    if not (workplace / "pipeline0").exists():
        assert call("export", "runs/eps3", "--out", "pipeline0") == 0
    names: dict[str, Any] = {}
    for block in BLOCKS:
        if block.page == page and block.language == "python":
            exec(compile(block.text, f"{page}:{block.line}", "exec"), names)
    assert len(names) > 3
