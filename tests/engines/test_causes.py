"""Of a failed run's log, the cause is shown: logs as Flower and Ray write them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedpdm.engines.causes import last_error

SOCKET = """\
INFO :      Starting Flower ServerApp
(raylet) warming up
2026-11-30 20:50:44,123 ERROR services.py:1 -- Failed to start
Traceback (most recent call last):
  File "ray/_private/node.py", line 9, in _prepare_socket_file
    validate_socket_filename(result)
OSError: validate_socket_filename failed: AF_UNIX path length cannot exceed 107 bytes: '/long/x'
\x1b[91mERROR \x1b[0m:     An error was encountered. Ending simulation.
Traceback (most recent call last):
RuntimeError: Simulation Engine crashed.
RuntimeError: An error was encountered. Ending simulation.
"""
CHAINED = """\
Traceback (most recent call last):
  File "a.py", line 1, in read
KeyError: 'earlier, and caught'

Traceback (most recent call last):
  File "a.py", line 1, in read
fedpdm.storage.files.StoreError: ledger.jsonl: record 3 is damaged

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
ValueError: client 0: cannot go on

The above exception was the direct cause of the following exception:

flwr.server.ServerAppException: the app ended badly
ERROR: ServerApp raised an exception
"""
ACTOR = """\
(ClientAppActor pid=44, ip=10.0.0.1) Traceback (most recent call last):
(ClientAppActor pid=4) FloatingPointError: client 1 round 2 fine: loss is nan at step 7
ERROR :     ClientApp raised an exception
Exception:
"""
MEMORY = """\
(raylet) 1 Workers (tasks / actors) killed due to memory pressure (OOM), 0 workers crashed
ray.exceptions.RayActorError: The actor died unexpectedly before finishing this task.
strategies.roster.ClientFailure: round 1 fit: client 0: the actor died
"""
OURS = """\
round 1 fit failed: client 0: StoreError; client 0 shows the details to its owner alone
    raise ClientFailure(f"round {round} {what}: {'; '.join(problems)}")
strategies.roster.ClientFailure: round 1 fit: client 0: StoreError; client 0 shows the details
"""
BOX = """\
Starting local SuperLink on 127.0.0.1:39275...
\u256d\u2500 Error \u2500\u2500\u2500\u256e
\u2502 Failed to start local SuperLink within 15s. See logs at  \u2502
\u2502 /tmp/x/superlink.log.                                    \u2502
\u2570\u2500\u2500\u2500\u256f
"""


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        (SOCKET, "OSError: validate_socket_filename failed: AF_UNIX path length cannot exceed 107"),
        (CHAINED, "fedpdm.storage.files.StoreError: ledger.jsonl: record 3 is damaged"),
        (ACTOR, "FloatingPointError: client 1 round 2 fine: loss is nan at step 7"),
        (MEMORY, "1 Workers (tasks / actors) killed due to memory pressure (OOM)"),
        (OURS, "strategies.roster.ClientFailure: round 1 fit: client 0: StoreError; client 0 sh"),
        ("ERROR :     Port 9 is taken\nERROR: An exception was raised\n", "Port 9 is taken"),
        ("all is well\n", "no error was printed"),
    ],
)
def test_the_cause_is_shown(text: str, cause: str, tmp_path: Path) -> None:
    (tmp_path / "flower.log").write_text(text, encoding="utf-8")
    assert last_error(tmp_path / "flower.log").startswith(cause)


def test_a_log_that_points_to_another(tmp_path: Path) -> None:
    log, superlink = tmp_path / "flower.log", tmp_path / "superlink.log"
    log.write_text(BOX, encoding="utf-8")
    assert last_error(log, superlink) == (
        "Failed to start local SuperLink within 15s. See logs at /tmp/x/superlink.log."
    )
    superlink.write_text("Traceback (most recent call last):\nOSError: [Errno 98] in use: 9093\n")
    assert last_error(log, superlink) == "OSError: [Errno 98] in use: 9093"
    assert last_error(tmp_path / "none.log") == "no error was printed"
