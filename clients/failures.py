"""What a client tells the server when something goes wrong.

A simulated client says it in full, one line. A deployed one says what kind of error it was and
prints the rest for its owner: the text of an error may hold paths of its disk, names of its files
or numbers of its images. Two kinds of error speak of the server's own message and config alone;
their text may leave.
"""

from __future__ import annotations

import sys
import traceback

from fedpdm.config import ConfigError
from fedpdm.text import line, visible
from fedpdm.wire import WireError

__all__ = ["ClientError", "Refusal", "failure_line"]

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
    print(f"{who}: {type(error).__name__}: {why}", file=sys.stderr, flush=True)
    if not isinstance(error, EXPECTED):
        print(visible("".join(traceback.format_exception(error))), file=sys.stderr, flush=True)
    if isinstance(error, (Refusal, WireError)):
        return why[:LONGEST]
    return f"{type(error).__name__}; {who} shows the details to its owner alone"[:LONGEST]
