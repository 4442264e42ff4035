"""Proxies of the environment: gRPC is the oracle, and a real proxy stands between."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from fedpdm.config import ConfigError
from fedpdm.deployment.certificates import make_authority, make_server
from fedpdm.deployment.node import shake_hands
from fedpdm.deployment.proxies import Proxy, proxy_for, without_proxy_here
from fedpdm.engines.flowercli import flower_environment
from tests.support.tls_servers import server

NAMES = ("grpc_proxy", "https_proxy", "http_proxy", "no_grpc_proxy", "no_proxy", "NO_PROXY")


@pytest.fixture(autouse=True)
def no_settings_of_whoever_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)


@contextlib.contextmanager
def proxy(answer: bytes = b"HTTP/1.1 200 OK\r\n\r\n") -> Iterator[tuple[int, list[str]]]:
    """(port, the first lines that it was sent) of an HTTP proxy that connects to 127.0.0.1."""
    asked: list[str] = []

    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while part := source.recv(4096):
                target.sendall(part)

    def serve(client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            head = b""
            while b"\r\n\r\n" not in head:
                head += client.recv(1)
            asked.append(head.split(b"\r\n")[0].decode())
            client.sendall(answer)
            if b" 200 " not in answer:
                return
            port = int(asked[-1].split()[1].rsplit(":", 1)[1])
            with socket.create_connection(("127.0.0.1", port)) as target:
                back = threading.Thread(target=pump, args=(target, client), daemon=True)
                back.start()
                pump(client, target)

    def accept(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=serve, args=(client,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        yield listener.getsockname()[1], asked


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, None),
        ({"http_proxy": "http://127.0.0.1:PORT"}, "http_proxy"),
        ({"http_proxy": "http://127.0.0.1:PORT", "https_proxy": "http://127.0.0.1:PORT"},
         "https_proxy"),
        ({"https_proxy": "http://127.0.0.1:9", "grpc_proxy": "http://127.0.0.1:PORT"},
         "grpc_proxy"),
        ({"HTTPS_PROXY": "http://127.0.0.1:PORT"}, None),
        ({"http_proxy": "http://127.0.0.1:PORT", "no_proxy": "example.org"}, "http_proxy"),
        ({"http_proxy": "http://127.0.0.1:PORT", "no_proxy": "a.org, nodes.test"}, None),
        ({"http_proxy": "http://127.0.0.1:PORT", "no_proxy": ".test"}, None),
        ({"http_proxy": "http://127.0.0.1:PORT", "no_proxy": "nodes.test",
          "no_grpc_proxy": "b.org"}, "http_proxy"),
    ],
)  # fmt: skip
def test_what_grpc_uses(
    given: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name that no resolver knows is asked of the proxy, or of nobody."""
    with proxy(b"HTTP/1.1 502 Bad Gateway\r\n\r\n") as (port, asked):
        environment = {name: value.replace("PORT", str(port)) for name, value in given.items()}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        channel = grpc.insecure_channel("nodes.test:9092", [("grpc.use_local_subchannel_pool", 1)])
        with channel, contextlib.suppress(grpc.FutureTimeoutError):
            grpc.channel_ready_future(channel).result(timeout=1.0)
        found = proxy_for("nodes.test", environment)
        assert bool(asked) == (expected is not None)
    if expected is None:
        assert found is None
    else:
        assert asked[0] == "CONNECT nodes.test:9092 HTTP/1.1"
        assert found == Proxy(variable=expected, host="127.0.0.1", port=port)


@pytest.mark.parametrize("text", ["ftp://a:1", "http://", "http://a:nine", "socks5://a:1"])
def test_a_proxy_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^https_proxy: must be http://HOST:PORT, got "):
        proxy_for("a.org", {"https_proxy": text})


def test_what_stays_on_this_machine_goes_through_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = {"http_proxy": "http://127.0.0.1:9", "no_proxy": "a.org", "no_grpc_proxy": "b.org"}
    changed = without_proxy_here(given)
    for host in ("localhost", "127.0.0.1", "::1", "b.org"):
        assert proxy_for(host, changed) is None
    assert proxy_for("c.org", changed) == Proxy(variable="http_proxy", host="127.0.0.1", port=9)
    assert without_proxy_here(changed) == changed
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert proxy_for("127.0.0.1", flower_environment(tmp_path)) is None


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ca")
    make_authority(folder)
    make_server(folder, folder, names=["nodes.test", "127.0.0.1"])
    return folder


def test_a_handshake_goes_through_the_proxy_and_says_so(
    authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pem = (authority / "ca.crt").read_text()
    with server(authority) as port, proxy() as (at, asked):
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{at}")
        shown = shake_hands(f"nodes.test:{port}", authority_pem=pem)
        assert asked == [f"CONNECT nodes.test:{port} HTTP/1.1"]
        assert str(shown.proxy) == f"127.0.0.1:{at} (https_proxy)"
        assert shake_hands(f"127.0.0.1:{port}", authority_pem=pem).proxy is None
        assert len(asked) == 1


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (b"HTTP/1.1 407 Proxy Authentication Required\r\n\r\n", "answers '407'"),
        (b"\r\n\r\n", "answers 'nothing'"),
    ],
)
def test_a_proxy_that_refuses_is_named(
    answer: bytes, words: str, authority: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pem = (authority / "ca.crt").read_text()
    with proxy(answer) as (port, _):
        monkeypatch.setenv("http_proxy", f"127.0.0.1:{port}")
        line = rf"proxy 127\.0\.0\.1:{port} \(http_proxy\): does not connect to nodes\.test:5"
        with pytest.raises(ConfigError, match=line) as caught:
            shake_hands("nodes.test:5", authority_pem=pem)
        assert words in str(caught.value)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closed = listener.getsockname()[1]
    monkeypatch.setenv("http_proxy", f"127.0.0.1:{closed}")
    with pytest.raises(ConfigError, match=r"cannot be reached: Connection refused; no_proxy="):
        shake_hands("nodes.test:5", authority_pem=pem)
