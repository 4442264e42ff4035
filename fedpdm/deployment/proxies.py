"""HTTP proxies, as gRPC takes them from the environment.

gRPC asks `grpc_proxy`, `https_proxy` and `http_proxy` in this order, and `no_grpc_proxy` before
`no_proxy`, in small letters only. What stays on this machine goes through none.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from fedpdm.config import ConfigError

__all__ = ["Proxy", "connect", "proxy_for", "without_proxy_here"]

VARIABLES = ("grpc_proxy", "https_proxy", "http_proxy")
EXCEPTIONS = ("no_grpc_proxy", "no_proxy", "NO_PROXY")
HERE = ("localhost", "127.0.0.1", "::1", "0.0.0.0")


@dataclass(frozen=True, kw_only=True)
class Proxy:
    """`variable` is the environment's that names it."""

    variable: str
    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port} ({self.variable})"


def without_proxy_here(environment: Mapping[str, str]) -> dict[str, str]:
    """The environment in which nothing that stays on this machine goes through a proxy."""
    changed = dict(environment)
    for name in EXCEPTIONS:
        if name in ("no_proxy", "NO_PROXY") or environment.get(name):
            known = [part for part in environment.get(name, "").split(",") if part.strip()]
            changed[name] = ",".join([*known, *(one for one in HERE if one not in known)])
    return changed


def proxy_for(host: str, environment: Mapping[str, str]) -> Proxy | None:
    """The proxy through which gRPC reaches a host; `ConfigError` for one that cannot be read."""
    found = [(name, environment[name]) for name in VARIABLES if environment.get(name)]
    exceptions = next((environment[n] for n in EXCEPTIONS[:2] if environment.get(n)), "")
    if not found or any(_covers(part.strip(), host) for part in exceptions.split(",")):
        return None
    variable, text = found[0]
    try:
        parts = urlsplit(text if "://" in text else f"http://{text}")
        if parts.hostname and parts.scheme == "http":
            return Proxy(variable=variable, host=parts.hostname, port=parts.port or 80)
    except ValueError:
        pass
    raise ConfigError(f"{variable}: must be http://HOST:PORT, got {text!r}")


def _covers(exception: str, host: str) -> bool:
    """Whether an entry of `no_proxy` stands for the host: its name's end, or a network."""
    if not exception:
        return False
    try:
        return ipaddress.ip_address(host) in ipaddress.ip_network(exception, strict=False)
    except ValueError:
        return exception == "*" or host.endswith(exception.removeprefix("*"))


def connect(host: str, port: int, *, proxy: Proxy | None, timeout: float) -> socket.socket:
    """A connection, through the proxy if there is one (CONNECT, RFC 9110 section 9.3.6).

    `OSError` as of a socket; `ConfigError` if the proxy cannot be reached, or does not connect.
    """
    if proxy is None:
        return socket.create_connection((host, port), timeout=timeout)
    try:
        plain = socket.create_connection((proxy.host, proxy.port), timeout=timeout)
    except OSError as error:
        raise ConfigError(
            f"proxy {proxy}: cannot be reached: {error.strerror or error}; no_proxy={host} goes "
            "past it"
        ) from None
    try:
        name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        plain.sendall(f"CONNECT {name} HTTP/1.1\r\nHost: {name}\r\n\r\n".encode())
        answer = b""
        while b"\r\n\r\n" not in answer and len(answer) < 65_536:
            if not (part := plain.recv(1)):
                break
            answer += part
        words = answer.split(b"\r\n", 1)[0].split(b" ")
        if not answer.startswith(b"HTTP/1.") or len(words) < 2 or not words[1].startswith(b"2"):
            status = words[1].decode(errors="replace") if len(words) > 1 else "nothing"
            raise ConfigError(
                f"proxy {proxy}: does not connect to {name} (answers {status!r}); no_proxy={host} "
                "goes past it"
            )
    except BaseException:
        plain.close()
        raise
    return plain
