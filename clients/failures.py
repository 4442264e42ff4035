"""What a client tells the server when something goes wrong.

A simulated client says it in full, one line. A deployed one says that it failed and prints why for
its owner: the text of an error, and even its type, may depend on its disk or its images. Two kinds
of error speak of the server's own message and config alone; their text may leave.

Failures of what nobody but the client has (its fine model, its raw images) are kept at home: the
answer is that of a client where nothing failed. Otherwise a server could choose weights so that
success or failure tells it something about the images.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator

from fedpdm.config import ConfigError
from fedpdm.storage.client_store import ClientStore
from fedpdm.storage.files import StoreError
from fedpdm.text import line, visible
from fedpdm.wire import WireError

__all__ = ["ClientError", "Refusal", "failure_line", "kept_at_home"]

LONGEST = 300
LONGEST_SHOWN = 4000  # to the owner
EXPECTED = (ValueError, FloatingPointError, OSError)


class ClientError(RuntimeError):
    """Takes the place of an error that Flower would otherwise send to the server as it is."""


class Refusal(ConfigError):
    """A deployed client does not do what a run asks; the text names the run's config alone."""


def failure_line(error: Exception, *, who: str, deployed: bool) -> str:
    """What the server is told: one line of at most 300 characters. A deployed client's owner gets
    the whole error on standard error, with its traceback where it was not expected."""
    why = line(error, limit=LONGEST_SHOWN) or type(error).__name__
    if not deployed:
        return why[:LONGEST]
    _tell_owner(error, who=who)
    if isinstance(error, (Refusal, WireError)):
        return why[:LONGEST]
    return f"failed; {who} shows the details to its owner alone"[:LONGEST]


@contextlib.contextmanager
def kept_at_home(
    store: ClientStore, what: str, *, who: str, deployed: bool
) -> Iterator[list[Exception]]:
    """The block's failure stays with a deployed client: it is printed, and noted in its store.

    Yields a list that holds the error afterwards, if there was one. In a simulation one party has
    all the data, and errors pass.
    """
    failed: list[Exception] = []
    if not deployed:
        yield failed
        return
    try:
        yield failed
    except Exception as error:
        failed.append(error)
        _tell_owner(error, who=f"{who} {what}")
        with contextlib.suppress(StoreError):  # a full disk is no news for the server either
            store.note_failure(f"{what}: {_described(error)}")


def _described(error: Exception) -> str:
    return f"{type(error).__name__}: {line(error, limit=LONGEST_SHOWN)}"


def _tell_owner(error: Exception, *, who: str) -> None:
    """On standard error, with a traceback where the error was not expected."""
    print(f"{who}: {_described(error)}", file=sys.stderr, flush=True)
    if not isinstance(error, EXPECTED):
        print(visible("".join(traceback.format_exception(error))), file=sys.stderr, flush=True)
