"""What all commands share: examples, --json, --quiet, shell completion, advice after an error."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from fedpdm.commands.examples import EXAMPLES
from fedpdm.config import ConfigError
from fedpdm.text import json_text, line, visible

__all__ = [
    "Parser",
    "add_completion_parser",
    "advise",
    "complain",
    "equip",
    "progress_aside",
    "quiet",
    "say",
    "show",
    "tell",
    "terminal_width",
    "walk_commands",
]

# What trainers say (fedpdm.diffusion.training); it comes through Flower as text.
DIVERGED = re.compile(r"(loss|gradient) is (nan|-?inf) at step \d+")
LONGEST_ERROR = 4000  # characters
# Commands that print results even with --quiet: it silences their progress, on standard error.
RESULTS = ("attack linkage", "attack audit", "attack models", "attack controls", "toy")
# Commands without an option that the others have, and why.
WITHOUT = {
    "--json": {"completion": "prints a script for a shell"},
    "--quiet": {"completion": "prints nothing but its script"},
}
HELP = {
    "--json": "print JSON on standard output, all else on standard error",
    "--quiet": "print nothing but errors, and what --json asks for",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors end with what to do next, and that knows what it was given.

    `arguments` are its own, those of its groups and those of its parents, which are `Parser`s;
    `commands` are the parsers below it, by name. Descriptions are filled to the
    terminal's width; examples stay as they are.
    """

    def __init__(self, *words: Any, **options: Any) -> None:
        self.arguments: list[argparse.Action] = []
        self.commands: Mapping[str, Parser] = {}
        self._groups: list[Any] = []
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(*words, **options)
        for parent in options.get("parents", ()):
            self.arguments += parent.arguments

    def format_help(self) -> str:
        """The help text."""
        before = [(part, part.description) for part in (self, *self._groups)]
        epilog = self.epilog
        try:
            for part, text in before:
                part.description = _filled(text, indent=0 if part is self else 2)
            self.epilog = _filled(epilog, indent=0)
            return super().format_help()
        finally:
            for part, text in before:
                part.description = text
            self.epilog = epilog

    def error(self, message: str) -> NoReturn:
        """Usage, the error, and where examples are; exit code 2."""
        self.print_usage(sys.stderr)
        self.exit(2, f"{self.prog}: error: {message}\nNext: {self.prog} --help shows examples\n")

    def add_argument(self, *words: Any, **options: Any) -> argparse.Action:
        """Also kept in `arguments`."""
        return self._know(super().add_argument(*words, **options))

    def add_argument_group(self, *words: Any, **options: Any) -> Any:
        """A group whose arguments are kept in `arguments` too."""
        group = super().add_argument_group(*words, **options)
        self._groups.append(group)
        add = group.add_argument
        group.add_argument = lambda *words, **options: self._know(  # type: ignore[method-assign]
            add(*words, **options)
        )
        return group

    def add_subparsers(self, **options: Any) -> Any:
        """What is added to it is kept in `commands` too."""
        added = super().add_subparsers(**options)
        self.commands = added.choices
        return added

    def _know(self, argument: argparse.Action) -> argparse.Action:
        self.arguments.append(argument)
        return argument


def _filled(text: str | None, *, indent: int) -> str | None:
    """Text that is shown with `indent`, and leaves as much at the right."""
    if text is None or text.startswith("examples:"):
        return text
    width = max(shutil.get_terminal_size().columns - 2 - indent, 11) - indent
    paragraphs = (" ".join(part.split()) for part in text.strip().split("\n\n"))
    return "\n\n".join(textwrap.fill(part, width) for part in paragraphs)


def equip(parser: Parser) -> None:
    """Give every command below `parser` its examples and its name; --json and --quiet to each that
    does something, if it has them not yet."""
    for name, command in walk_commands(parser):
        if "examples:" not in (command.epilog or "") and name in EXAMPLES:
            command.epilog = f"examples:\n{EXAMPLES[name]}"
        command.set_defaults(command=name)
        if command.commands:
            continue
        known = {word for argument in command.arguments for word in argument.option_strings}
        for option, words in HELP.items():
            if option in known or name in WITHOUT[option]:
                continue
            if option == "--quiet" and name in RESULTS:
                words = "no progress lines"
            command.add_argument(option, action="store_true", help=words)


def walk_commands(parser: Parser, above: str = "") -> Iterator[tuple[str, Parser]]:
    """(name without fedpdm, parser) of every command and group of commands."""
    for name, command in parser.commands.items():
        yield f"{above}{name}", command
        yield from walk_commands(command, f"{above}{name} ")


@contextlib.contextmanager
def quiet(options: argparse.Namespace) -> Iterator[None]:
    """Where --quiet asks for it, silence the progress of the commands in `RESULTS`, and all that
    others print; not their JSON."""
    results = getattr(options, "command", "") in RESULTS
    if not getattr(options, "quiet", False) or (not results and getattr(options, "json", False)):
        yield
        return
    redirect: Any = contextlib.redirect_stderr if results else contextlib.redirect_stdout
    with open(os.devnull, "w") as nowhere, redirect(nowhere):
        yield


@contextlib.contextmanager
def progress_aside(options: argparse.Namespace) -> Iterator[None]:
    """What is printed in the block goes nowhere with --quiet, to standard error with --json."""
    with contextlib.ExitStack() as stack:
        if options.quiet:
            nowhere = stack.enter_context(open(os.devnull, "w"))
            stack.enter_context(contextlib.redirect_stdout(nowhere))
        elif options.json:
            stack.enter_context(contextlib.redirect_stdout(sys.stderr))
        yield


def say(words: str) -> None:
    """A line of progress, on standard error: standard output is for results."""
    print(line(words, limit=LONGEST_ERROR), file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Results on standard output, in lines; what of them came from outside cannot draw on it."""
    print(visible(text), flush=True)


def terminal_width() -> int | None:
    """Columns of the terminal that shows standard output; None where none does."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def complain(error: object) -> None:
    """The one line of an error, on standard error."""
    print(f"fedpdm: {line(error, limit=LONGEST_ERROR)}", file=sys.stderr)


def tell(options: argparse.Namespace, words: str, facts: Mapping[str, Any]) -> None:
    """The outcome of a command: a line, or JSON with --json; nothing else with --quiet."""
    if options.json:
        print(json_text(dict(facts)), flush=True)
    elif not options.quiet:
        show(words)


def advise(error: BaseException, options: argparse.Namespace) -> None:
    """A line after the error that says what to do next; with --quiet the error stands alone."""
    if not getattr(options, "quiet", False):
        print(f"Next: {next_step(error, options)}", file=sys.stderr)


def next_step(error: BaseException, options: argparse.Namespace) -> str:
    """What to do about an error of a command."""
    name = getattr(options, "command", "")
    if isinstance(error, MemoryError):
        return "lower coarse.batch_size, fine.batch_size or sampling.batch_size (--set KEY=VALUE)"
    if DIVERGED.search(str(error)):
        return "lower coarse.lr or fine.lr, or raise their warmup_steps (--set KEY=VALUE)"
    if isinstance(error, ConfigError) and _is_key(str(error)):
        return "fedpdm config lists every key, its default and meaning; --set KEY=VALUE changes one"
    if isinstance(error, RuntimeError) and name in ("run", "federation run"):
        return f"fedpdm {name} --resume --out {options.out or 'DIR'} goes on from the last round"
    if type(error).__name__ == "StoreError":
        return "fedpdm ledger DIR checks a client's store; nothing of it was changed"
    if isinstance(error, OSError):
        return "check that this path exists and may be read or written"
    return f"fedpdm {name} --help shows examples" if name else "fedpdm --help lists the commands"


def _is_key(message: str) -> bool:
    """Whether a message begins with a config key, as in `privacy.epsilon: must be ...`."""
    start = message.split(":", 1)[0]
    return start.replace(".", "").replace("_", "").isalnum() and "." in start


def add_completion_parser(commands: Any, parser: Parser) -> None:
    """Add `completion` to the subparsers of `parser`."""
    completion = commands.add_parser("completion", help="print a completion script for a shell")
    completion.add_argument("shell", choices=("bash", "zsh", "tcsh"))
    completion.set_defaults(action=lambda options: _print_completion(parser, options.shell))


def _print_completion(parser: Parser, shell: str) -> None:
    import shtab

    for _, command in walk_commands(parser):
        first, *_ = (command.description or "").split("\n\n")
        command.description = " ".join(first.split()) or None  # shtab shows its first line
        for argument in command.arguments:
            if argument.type is Path:
                argument.complete = shtab.FILE  # type: ignore[attr-defined]
    print(shtab.complete(parser, shell))
