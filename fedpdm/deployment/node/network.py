"""A real TLS handshake with the coordinator, and the first frame of HTTP/2, on which gRPC runs."""

from __future__ import annotations

import contextlib
import datetime
import os
import ssl
from dataclasses import dataclass

from fedpdm.config import ConfigError
from fedpdm.deployment.node.settings import split_address
from fedpdm.deployment.proxies import Proxy, connect, proxy_for, without_proxy_here

__all__ = ["Handshake", "shake_hands"]

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")
SETTINGS_FRAME = 4  # RFC 9113 section 6.5: the first frame that a server sends


@dataclass(frozen=True, kw_only=True)
class Handshake:
    """What the coordinator showed: TLS version, names in its certificate, when that ends (UTC).

    `proxy` is what the connection goes through.
    """

    proxy: Proxy | None
    tls: str
    names: tuple[str, ...]
    not_after: datetime.datetime


def shake_hands(address: str, *, authority_pem: str, timeout: float = 10.0) -> Handshake:
    """Connect to HOST:PORT and trust what this authority signed for that very name, nothing else.

    `ConfigError`, one line, if nobody answers within `timeout` seconds, the certificate is of
    another authority, of another name or expired, or it is not a gRPC server that answers. It goes
    through the proxy that gRPC takes from the environment.
    """
    host, port = split_address(address)
    context = ssl.create_default_context(cadata=authority_pem)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["h2"])
    proxy = proxy_for(host, without_proxy_here(os.environ))
    try:
        with (
            connect(host, port, proxy=proxy, timeout=timeout) as plain,
            context.wrap_socket(plain, server_hostname=host) as secure,
        ):
            shown = secure.getpeercert() or {}
            version = secure.version() or "TLS"
            frame = _first_frame(secure)
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(f"coordinator: {address}: {_refusal(error)}") from None
    except ssl.SSLError as error:
        reason = (error.reason or str(error)).lower().replace("_", " ")
        raise ConfigError(f"coordinator: {address}: no TLS handshake: {reason}") from None
    except TimeoutError:
        raise ConfigError(
            f"coordinator: {address}: no answer within {timeout:g} s (firewall?)"
        ) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError(f"coordinator: {address}: cannot be reached: {reason}") from None
    if len(frame) < 9 or frame[3] != SETTINGS_FRAME:
        raise ConfigError(f"coordinator: {address}: answers over TLS, but not as a gRPC server")
    names = tuple(str(pair[1]) for pair in shown.get("subjectAltName", ()))
    end = datetime.datetime.fromtimestamp(
        ssl.cert_time_to_seconds(str(shown["notAfter"])), tz=datetime.UTC
    )
    return Handshake(proxy=proxy, tls=version, names=names, not_after=end)


def _first_frame(secure: ssl.SSLSocket) -> bytes:
    """The first frame's 9 bytes of header, or what came of them."""
    received = b""
    with contextlib.suppress(TimeoutError, ConnectionError):
        secure.sendall(PREFACE)
        while len(received) < 9 and (more := secure.recv(9 - len(received))):
            received += more
    return received


def _refusal(error: ssl.SSLCertVerificationError) -> str:
    """OpenSSL's reason in words that say what to do."""
    reason = error.verify_message
    if "expired" in reason:
        return "its certificate has expired (or this clock is wrong)"
    if "not yet valid" in reason:
        return "its certificate is not valid yet (or this clock is wrong)"
    if "self-signed" in reason or "self signed" in reason or "issuer" in reason:
        return "its certificate was not signed by this federation's authority"
    if "match" in reason or "valid for" in reason:
        return f"its certificate is for another name: {reason}"
    return f"its certificate is refused: {reason}"
