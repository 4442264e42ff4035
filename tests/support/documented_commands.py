"""How each command of the documentation is executed: cheaply, by whom else, or why not.

A rule's pattern is matched against the whole line as it is typed (`fedpdm show runs/eps3`); the
first rule that matches counts.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass

from tests.support.markdown_pages import Block

__all__ = ["RULES", "Ci", "Elsewhere", "Here", "Never", "Rule", "rule_of", "typed_lines"]

PROGRAMS = (
    r"fedpdm|make|python|cp|flwr|tensorboard|deploy/\S+|\.venv/bin/\S+|export|pip|systemctl|useradd|"
    r"install|mkdocs|pytest|docker|podman|git|wandb|mlflow"
)
_TYPED = re.compile(rf"^(?:[a-z]*\$ +)?((?:[A-Z_]+=\S* )*(?:{PROGRAMS})(?: .*|$))")
# Settings that make any run last seconds.
TINY = (
    "data.max_images=400", "partition.num_clients=2", "partition.majority_ratio=2",
    "run.rounds=2", "coarse.preset=nano", "fine.preset=nano", "coarse.steps_per_round=1",
    "fine.steps_per_round=1", "coarse.batch_size=8", "fine.batch_size=8", "sampling.num_steps=2",
    "sampling.per_class=1", "evaluation.num_images=40", "evaluation.classifier_steps=20",
)  # fmt: skip
TINY_TOY = (
    "release.num_steps=100", "measure.replicates=16", "measure.samples=50",
    "measure.trained_replicates=2", "measure.training_steps=20", "federation.total=200",
    "sweep.minority=[5, 10, 20]", "sweep.total=[100, 200, 400]", "sweep.clients=[2, 4]",
    "sweep.dim=[1]", "sweep.epsilon=[30]", "sweep.epsilon_dim=2",
)  # fmt: skip


def sets(*settings: str) -> tuple[str, ...]:
    return tuple(word for setting in settings for word in ("--set", setting))


@dataclass(frozen=True)
class Rule:
    """What is done about the lines that match `pattern`."""

    pattern: str


@dataclass(frozen=True)
class Here(Rule):
    """Executed by tests/docs/test_docs_commands.py, with further options and one of `codes`.

    `interrupted`: in its second round, so that the next line can resume it.
    """

    more: tuple[str, ...] = ()
    codes: tuple[int, ...] = (0,)
    interrupted: bool = False


@dataclass(frozen=True)
class Elsewhere(Rule):
    """Executed by another test: its file, and words of it that do so."""

    file: str
    words: str


@dataclass(frozen=True)
class Ci(Rule):
    """Executed by the workflow as it stands, before the tests."""


@dataclass(frozen=True)
class Never(Rule):
    """Not executed, and why; its words are understood all the same."""

    why: str


ATTACK = ("--subjects", "10", "--samples", "40", "--uploads", "4")
FIXED = ("--seed", "1", "--seeded", "0")  # with noise of the operating system, chance decides
INPROCESS = ("--engine", "inprocess")
RULES: tuple[Rule, ...] = (
    # Runs, and what is done with them.
    Here(r"fedpdm run .*epsilon=3 --out runs/eps3$", (*INPROCESS, *sets(*TINY)), (130,), True),
    Here(r"fedpdm run --resume --out runs/eps3$", INPROCESS),
    Here(r"fedpdm run --resume .*run.rounds=20", (*INPROCESS, *sets("run.rounds=3"))),
    Here(r"fedpdm run (experiments/digits|mine)\.yaml ", (*INPROCESS, *sets(*TINY))),
    Elsewhere(r"fedpdm (show|sample|export|report) /srv", "tests/deployment/test_own_store.py",
              'called(capsys, "export", root / "vault-1"'),
    Here(r"fedpdm sample .*--num (2000|500) ", ("--steps", "1", "--num", "10")),
    Here(r"fedpdm sample ", ("--steps", "2", "--num", "4")),
    Here(r"fedpdm ledger (runs|STORE)"),
    Elsewhere(r"fedpdm export .*--push-to-hub", "tests/publishing/test_push_to_hub.py",
              '"export", out, "--push-to-hub"'),
    Here(r"fedpdm (show|export|report|privacy) "),
    Here(r"tensorboard --logdir", ("--inspect",)),
    Here(r"fedpdm evaluate ", ("--num", "40", "--handover", "0,642")),
    # Attacks. Images that must be fetched are replaced by those that come with scikit-learn.
    Here(r"fedpdm attack linkage --release statistics",
         ("--data", "digits", "--repeats", "10", *FIXED)),
    Here(r"fedpdm attack linkage", ("--data", "digits", "--pairs", "50", *FIXED)),
    Here(r"fedpdm attack audit", ("--canaries", "100", "--data", "digits", *FIXED)),
    Here(r"fedpdm attack controls", ("--images", "20", "--steps", "5", "--samples", "40",
                                     "--attacks", "loss"), (0, 1)),
    Never(r"fedpdm attack '?runs/experiments/", "the run of an experiment: minutes to hours"),
    Here(r"fedpdm attack --unet ", ("--attacks", "loss")),
    Here(r"fedpdm attack .*--public", ("--public", "digits", "--public-steps", "2", "--attacks",
                                       "reconstruction", *ATTACK)),
    Here(r"fedpdm attack .*--attacks pia,gsa,linkage", ATTACK),
    Here(r"fedpdm attack runs/eps3 ", (*ATTACK, "--attacks", "loss,memorisation,collusion")),
    # Experiments print the table of what is there; test_experiment_command.py runs cells.
    Here(r"fedpdm toy ", (*sets(*TINY_TOY), "--jobs", "1", "--out", "toy")),
    Here(r"fedpdm experiment ", ("--table",)),
    # Between institutions. What begins with ~ is the transcript of `make deploy-test`.
    Elsewhere(r"fedpdm .*'~/", "tests/deployment/deploy_run.py", '"federation", "start"'),
    Here(r"cp examples/"),
    Here(r"deploy/make-certificates "),
    Here(r"fedpdm certificates (request|sign) "),
    Here(r"fedpdm node invite lungs.yaml "),
    Elsewhere(r"fedpdm federation start ", "tests/support/real_nodes.py", '"federation", "start"'),
    Elsewhere(r"fedpdm federation run ", "tests/support/real_nodes.py", '"federation", "run"'),
    Elsewhere(r"fedpdm node check ", "tests/deployment/test_node_check.py", '"check", "--accept"'),
    Elsewhere(r"fedpdm node start ", "tests/deployment/test_node_check.py", 'node.call("start")'),
    Elsewhere(r"fedpdm ledger /srv", "tests/commands/test_release_commands.py", '"ledger"'),
    # Python.
    Elsewhere(r"python examples/quickstart.py", "tests/docs/test_examples.py", '"quickstart.py"'),
    Elsewhere(r"python examples/bring_", "tests/docs/test_examples.py", 'your_own_images.py"'),
    Elsewhere(r"python examples/custom_", "tests/docs/test_examples.py", '"custom_strategy.py"'),
    Elsewhere(
        r"python examples/gaussian_", "tests/docs/test_examples.py", '"gaussian_classifier.py"'
    ),
    Elsewhere(r"python examples/own_", "tests/docs/test_examples.py", '"own_data_set.py"'),
    # Make.
    Ci(r"make (install|demo|test|lint|licences|docs|experiment-gmm|deploy-test)$"),
    Elsewhere(r"make tables$", "tests/reporting/test_results.py", '"tables"'),
    Never(r"make test-fast$", "a part of make test"),
    Never(r"make test-mutations$", "hours; it runs the tests once for each refusal taken away"),
    Never(r"make experiment-", "hours, on data that must be fetched"),
    # Other programs.
    Never(r"flwr run ", "leaves a SuperLink running; fedpdm run calls it and ends that"),
    Never(r"python -m tests.deployment.deploy_large", "large models, many minutes"),
    Never(r"export FEDPDM_DATA", "the reader's own path"),
    Never(r"\.venv/bin/pre-commit install", "changes the checkout's git hooks"),
    Never(r"useradd |install -|systemctl |deploy/systemd/", "for root on a machine with systemd"),
)  # fmt: skip


def rule_of(line: str) -> Rule | None:
    """The first rule that matches."""
    return next((rule for rule in RULES if re.match(rule.pattern, line)), None)


def typed_lines(block: Block) -> list[str]:
    """What a shell block asks to type: no prompts, comments, settings of variables or output."""
    if block.language not in ("", "bash", "sh", "shell", "console"):
        return []
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        match = _TYPED.match(line.strip())
        if match is None:
            continue
        words = re.split(r"(?<=\S) {2,}(?=[^-\s])", match[1])[0]
        words = re.sub(r"^([A-Z_]+=\S* )+", "", words).replace(".venv/bin/fedpdm ", "fedpdm ")
        try:
            plain = shlex.join(shlex.split(words, comments=True))
        except ValueError:  # an apostrophe: prose that begins like a command
            continue
        if "..." not in plain.split():
            found.append(plain)
    return found
