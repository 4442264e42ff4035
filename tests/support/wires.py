"""Cables between processes of this machine: they record what passes, and can be cut and healed."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import threading
import time
from pathlib import Path
from types import TracebackType

__all__ = ["Cable"]


class Cable:
    """A TCP forwarder from a free port on loopback to `target`; use as a context manager.

    With `certificates` (a folder with ca.crt, server.pem and server.key) it ends the caller's TLS
    and begins TLS of its own to `target`, as only who holds the server's key can: `sent` and
    `received` are then the plain bytes, else the bytes as they are on the network. `seconds` is a
    delay of every piece, in both directions.
    """

    def __init__(
        self, target: int, *, certificates: Path | None = None, seconds: float = 0.0
    ) -> None:
        self.target, self.seconds = target, seconds
        self.sent, self.received = bytearray(), bytearray()
        self.whole = True
        self.protocols: set[str | None] = set()  # that were agreed on (ALPN)
        self._inner = self._outer = None
        if certificates is not None:
            self._inner = ssl.create_default_context(cafile=str(certificates / "ca.crt"))
            self._outer = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._outer.load_cert_chain(certificates / "server.pem", certificates / "server.key")
            for context in (self._inner, self._outer):
                context.set_alpn_protocols(["h2"])
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]

    def __enter__(self) -> Cable:
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(10)
        self.cut()

    def cut(self) -> None:
        """Break all connections, and let none through until `heal`."""
        self.whole = False
        for end in list(self._open):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def heal(self) -> None:
        self.whole = True

    def _accept(self) -> None:
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(caller,), daemon=True).start()

    def _serve(self, caller: socket.socket) -> None:
        """One connection, to its end."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.suppress(OSError, ValueError))
            stack.enter_context(caller)
            if not self.whole:
                return
            callee = stack.enter_context(socket.create_connection(("127.0.0.1", self.target), 30))
            callee.settimeout(None)
            if self._outer is not None and self._inner is not None:
                outer = stack.enter_context(self._outer.wrap_socket(caller, server_side=True))
                inner = self._inner.wrap_socket(callee, server_hostname="127.0.0.1")
                caller, callee = outer, stack.enter_context(inner)
                self.protocols |= {outer.selected_alpn_protocol(), inner.selected_alpn_protocol()}
            self._open += [caller, callee]
            self._carry(caller, callee)

    def _carry(self, caller: socket.socket, callee: socket.socket) -> None:
        """Both directions in one thread: TLS sockets may not be used in two."""
        ways = {caller: (callee, self.sent), callee: (caller, self.received)}
        while True:
            waiting = [end for end in ways if isinstance(end, ssl.SSLSocket) and end.pending()]
            for source in waiting or select.select(list(ways), [], [])[0]:
                sink, record = ways[source]
                piece = source.recv(1 << 16)
                if not piece:
                    return
                record += piece
                time.sleep(self.seconds)
                sink.sendall(piece)
