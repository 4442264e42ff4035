"""Ask a node's warm process to work on a message, and wait until it has.

A stand-in for `flwr-clientapp` that starts in milliseconds: run as a file, with the standard
library alone. What it prints and its exit code are those of the process that does the work; if this
one is ended, that one is too. Without a warm process it becomes the command after `--`.

    doorbell.py DIRECTORY NAME [ARGUMENT ...] -- COMMAND ...
"""

import array
import json
import os
import signal
import socket
import sys

SOCKET = "warm.sock"


def _ring(directory: str) -> "socket.socket | None":
    """A connection to the process that serves this directory, or None."""
    connection = socket.socket(socket.AF_UNIX)
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(directory)  # a socket's path may have no more than 107 bytes
        connection.connect(SOCKET)
    except OSError:
        connection.close()
        return None
    finally:
        os.fchdir(here)
        os.close(here)
    return connection


def main() -> int:
    """Exit code of the work; does not return if there is no warm process."""
    directory, *words = sys.argv[1:]
    cut = len(words) - 1 - words[::-1].index("--")
    arguments, command = words[:cut], words[cut + 1 :]
    connection = _ring(directory)
    if connection is None:
        os.execv(command[0], command)
    assert connection is not None
    text = json.dumps(
        {"arguments": arguments, "environment": dict(os.environ), "directory": os.getcwd()}
    ).encode()
    files = array.array("i", [0, 1, 2])
    connection.sendmsg(
        [len(text).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)]
    )
    connection.sendall(text)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: connection.sendall(bytes([number])))
    code = b""
    while len(code) < 4 and (part := connection.recv(4 - len(code))):
        code += part
    return int.from_bytes(code, "big", signed=True) if len(code) == 4 else 1


if __name__ == "__main__":
    code = main()
    if code < 0:  # it was ended by a signal, and so is this
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)
