"""The `fedpdm` command. Heavy modules are imported by the commands that need them."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedpdm.commands.attack import add_attack_parser
from fedpdm.commands.attack_models import route_attack
from fedpdm.commands.certificates import add_certificates_parser
from fedpdm.commands.evaluate import add_evaluate_parser
from fedpdm.commands.experiment import add_experiment_parser
from fedpdm.commands.export import add_export_parser
from fedpdm.commands.federation import add_federation_parser
from fedpdm.commands.ledger import add_ledger_parser
from fedpdm.commands.node import add_node_parser
from fedpdm.commands.privacy import add_privacy_parser
from fedpdm.commands.report import add_report_parser
from fedpdm.commands.resolving import add_run_arguments, resolve_run
from fedpdm.commands.sample import add_sample_parser
from fedpdm.commands.show import add_show_parser, show_run, tell_run
from fedpdm.commands.sweep import add_sweep_argument, run_sweep
from fedpdm.commands.tables import add_tables_parser
from fedpdm.commands.terminal import (
    Parser,
    add_completion_parser,
    advise,
    complain,
    equip,
    progress_aside,
    quiet,
    show,
    tell,
)
from fedpdm.commands.toy import add_toy_parser
from fedpdm.config import ConfigError, RunConfig, config_keys, config_reference
from fedpdm.text import json_text

__all__ = ["main"]

EXAMPLES = """\
examples:
  fedpdm run experiments/digits.yaml --set privacy.epsilon=3 --out runs/eps3
  fedpdm run --resume --out runs/eps3
  fedpdm show runs/eps3
  fedpdm export runs/eps3 --client 0 --out pipeline0
  fedpdm sample pipeline0 --label 3 --num 64 --out grid.png
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code.

    0 success, 1 the run failed (a training that diverged, too), 2 bad input (one line on standard
    error), 130 interrupted.
    """
    words = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(route_attack(words))
    try:
        with quiet(options):
            code = options.action(options)
        sys.stdout.flush()
        return int(code or 0)
    except BrokenPipeError:  # whoever read has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # nothing is left to flush at exit
        return 0
    except KeyboardInterrupt:
        print("interrupted; nothing is lost, --resume continues a run", file=sys.stderr)
        return 130
    except (ValueError, FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        complain(error)
        advise(error, options)
        return 2
    except MemoryError as error:
        complain(f"not enough memory: {error or 'the data do not fit'}")
        advise(error, options)
        return 2
    except OSError as error:
        complain(f"{error.filename or 'system'}: {error.strerror or error}")
        advise(error, options)
        return 2
    except (RuntimeError, FloatingPointError) as error:
        ours = type(error).__module__.split(".")[0] in ("fedpdm", "strategies")
        if not ours and not isinstance(error, FloatingPointError):
            raise
        complain(error)
        advise(error, options)
        return 1


def _parser() -> Parser:
    parser = Parser(
        prog="fedpdm",
        description="Personalised federated diffusion models with local differential privacy.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print it and end")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="train a federation (Ray simulation through flwr run)")
    add_run_arguments(
        run,
        overrides="config key, e.g. privacy.epsilon=3 (repeatable); with --resume and no file "
        "run.rounds alone, and the run, finished or not, goes on for more rounds",
        dry_run="check everything, train nothing",
    )  # fmt: skip
    run.add_argument(
        "--engine", choices=("flower", "inprocess"), default="flower",
        help="flower: flwr run with Ray; inprocess: one client after the other, no Ray",
    )  # fmt: skip
    run.add_argument(
        "--releases", type=Path, metavar="DIR",
        help="keep the clients' releases and ledgers here and share them between runs; "
        "default: in the run directory",
    )  # fmt: skip
    run.add_argument(
        "--allow-new-release", action="store_true",
        help="noise released images once more if the settings changed; the ledger adds it up",
    )  # fmt: skip
    add_sweep_argument(run)
    run.add_argument("--port", type=int, help="of the local SuperLink; default: a free one")
    run.add_argument("--cpus", type=int, help="processors to use; default: all")
    run.add_argument("--verbose", action="store_true", help="show Flower's own output too")
    run.set_defaults(action=_run)

    add_federation_parser(commands)
    add_privacy_parser(commands)
    add_ledger_parser(commands)
    add_attack_parser(commands)
    add_toy_parser(commands)
    add_experiment_parser(commands)
    add_evaluate_parser(commands)
    add_tables_parser(commands)
    add_report_parser(commands)
    add_node_parser(commands)
    add_certificates_parser(commands)

    add_show_parser(commands)
    add_export_parser(commands)
    add_sample_parser(commands)

    stop = commands.add_parser(
        "stop", help="end the processes that runs of this checkout have left or started"
    )
    stop.add_argument("run", type=Path, nargs="?", help="of this run directory alone")
    stop.add_argument("--all", action="store_true", help="of every checkout on this machine")
    stop.set_defaults(action=_stop)

    keys = commands.add_parser("config", help="every configuration key, default and meaning")
    keys.set_defaults(action=_keys)
    add_completion_parser(commands, parser)
    equip(parser)
    return parser


class _Version(argparse.Action):
    """Prints the version when it is asked for: reading it takes time."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from importlib.metadata import version

        print(f"fedpdm {version('fedpdm')}")
        parser.exit()


def _run(options: argparse.Namespace) -> int:
    if options.sweep:
        return run_sweep(options, check=_check, work=_work)
    with progress_aside(options):
        code, out = _train(options)
    if options.json:
        tell_run(options, out)
    return code


def _train(options: argparse.Namespace) -> tuple[int, Path]:
    """Exit code and run directory."""
    config, out = resolve_run(options)
    for line in _check(options, config, out, resume=options.resume):
        show(line)
    if not options.dry_run:
        _work(options, config, out, resume=options.resume)
    return 0, out


def _chosen(options: argparse.Namespace, *, resume: bool) -> dict[str, Any]:
    """What checks and engines take."""
    return {
        "resume": resume,
        "releases": options.releases.absolute() if options.releases else None,
        "allow_new_release": options.allow_new_release,
    }


def _check(options: argparse.Namespace, config: RunConfig, out: Path, *, resume: bool) -> list[str]:
    """Lines about what will run; `ConfigError` or `ValueError` for what cannot."""
    if options.cpus is not None and options.cpus < 1:
        raise ConfigError(f"--cpus: must be at least 1, got {options.cpus}")
    from fedpdm.engines.preflight import check_run

    return check_run(config, out, **_chosen(options, resume=resume))


def _work(options: argparse.Namespace, config: RunConfig, out: Path, *, resume: bool) -> None:
    """One run, with the engine that was asked for."""
    chosen = _chosen(options, resume=resume)
    if options.engine == "inprocess":
        from fedpdm.engines.inprocess import run_in_process

        previous = signal.signal(signal.SIGINT, _leave)
        try:
            run_in_process(config, out, **chosen)
        finally:
            signal.signal(signal.SIGINT, previous)
    else:
        from fedpdm.engines.flower import run_with_flower

        run_with_flower(
            config,
            out,
            **chosen,
            port=options.port,
            num_cpus=options.cpus,
            verbose=options.verbose,
        )
        if not options.verbose:  # the server's own words, which Flower's stream frames
            show_run(out, as_json=False)


def _leave(*_: object) -> None:
    """End at once: Flower's server waits for its worker threads, and every file is crash-safe."""
    print("interrupted; nothing is lost, --resume continues the run", file=sys.stderr, flush=True)
    os._exit(130)


def _stop(options: argparse.Namespace) -> None:
    from fedpdm.engines.flower import stop_processes

    if options.run and options.all:
        raise ConfigError("stop: give a run directory or --all, not both")
    home = options.run.absolute() / ".flower" if options.run else None
    ended, others = stop_processes(home, every=options.all)
    words = f"{ended} processes ended"
    if others:
        words += f"; {others} of other checkouts go on (--all ends them too)"
    tell(options, words, {"ended": ended, "others": others})


def _keys(options: argparse.Namespace) -> None:
    if options.json:
        print(json_text(config_keys()))
    else:
        print(config_reference())


if __name__ == "__main__":
    sys.exit(main())
