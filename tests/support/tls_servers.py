"""A TLS server with Python's `ssl` module, for handshakes without Flower."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

SETTINGS = bytes.fromhex("000000040000000000")  # an empty SETTINGS frame, RFC 9113


@contextmanager
def server(folder: Path, *, speaks: bytes = SETTINGS) -> Iterator[int]:
    """A TLS server with the certificate in `folder` that says `speaks` to everybody; its port."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    context.set_alpn_protocols(["h2"])
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.1)
    done = threading.Event()

    def serve() -> None:
        while not done.is_set():
            try:
                plain, _ = listener.accept()
            except TimeoutError:
                continue
            try:
                with plain, context.wrap_socket(plain, server_side=True) as secure:
                    secure.recv(4096)
                    secure.sendall(speaks)
            except OSError:
                pass  # refused by the client

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        done.set()
        thread.join()
        listener.close()
