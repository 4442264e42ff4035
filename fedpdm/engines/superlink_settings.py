"""Where a coordinator listens and with which certificates, checked before anything is started."""

from __future__ import annotations

import datetime
import json
import os
import socket
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fedpdm.config import ConfigError
from fedpdm.deployment.certificates.files import load_certificates

__all__ = [
    "SuperLinkSettings",
    "answers",
    "check_certificates",
    "check_free",
    "connection_config",
    "split_address",
]


@dataclass(frozen=True, kw_only=True)
class SuperLinkSettings:
    """Addresses HOST:PORT and PEM files. `nodes` maps Flower's node ids to the names of their
    keys, `runs` Flower's run ids to run directories."""

    fleet: str
    control: str
    ca: str
    certificate: str
    key: str
    nodes: Mapping[str, str] = field(default_factory=dict)
    runs: Mapping[str, str] = field(default_factory=dict)


def split_address(address: str, *, what: str) -> tuple[str, int]:
    """HOST:PORT taken apart; `ConfigError` if it is none."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise ConfigError(f"{what}: must be HOST:PORT with a port in [1, 65535], got {address!r}")
    return host.strip("[]"), int(port)


def connection_config(settings: SuperLinkSettings, name: str) -> str:
    """Flower's `config.toml`: how its command line finds the SuperLink."""
    return (
        f'[superlink]\ndefault = "{name}"\n\n[superlink.{name}]\n'
        f"address = {json.dumps(settings.control)}\n"
        f"root-certificates = {json.dumps(settings.ca)}\n"
    )


def check_certificates(settings: SuperLinkSettings) -> ssl.SSLContext:
    """A client's TLS context for these certificates; `ConfigError` if they cannot be used."""
    for path in (settings.ca, settings.certificate, settings.key):
        if not os.access(path, os.R_OK) or not Path(path).is_file():
            raise ConfigError(f"{path}: is not a file that can be read (certificate or key)")
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    try:
        server.load_cert_chain(settings.certificate, settings.key)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(
            f"{settings.certificate}: does not go with {settings.key}: {error}"
        ) from None
    now = datetime.datetime.now(datetime.UTC)
    for path in (settings.ca, settings.certificate):
        certificate = load_certificates(Path(path))[0]
        if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
            raise ConfigError(
                f"{path}: is valid from {certificate.not_valid_before_utc:%F %T} to "
                f"{certificate.not_valid_after_utc:%F %T} UTC, this clock says {now:%F %T}"
            )
    try:
        client.load_verify_locations(settings.ca)
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"{settings.ca}: is no CA certificate: {error}") from None
    return client


def check_free(what: str, address: tuple[str, int]) -> None:
    """`ConfigError` if nobody can listen there."""
    host, port = address
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"{what}: {host}:{port}: {error.strerror or error}") from None


def answers(address: tuple[str, int], context: ssl.SSLContext, *, name: str | None) -> bool:
    """Whether a TLS handshake works there; `ConfigError` if the certificate is not good for `name`
    (any where that is None)."""
    host, port = address
    anywhere = {"0.0.0.0": "127.0.0.1", "::": "::1"}
    context.check_hostname = name is not None
    try:
        with (
            socket.create_connection((anywhere.get(host, host), port), timeout=5.0) as plain,
            context.wrap_socket(plain, server_hostname=name),
        ):
            return True
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(
            f"the server certificate cannot be used at {host}: {error.verify_message}"
        ) from None
    except OSError:
        return False
