"""A node's certificate, with its key and its authority, and whether they belong together."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization

from fedpdm.deployment.certificates.files import CertificateError, load_certificates
from fedpdm.deployment.certificates.making import NODE_URI

__all__ = ["NodeCertificate", "read_node_certificate"]


@dataclass(frozen=True, kw_only=True)
class NodeCertificate:
    """Which client a node is, until when (UTC), its key's path, its authority as PEM."""

    path: Path
    client_id: int
    not_before: datetime.datetime
    not_after: datetime.datetime
    authority_name: str
    authority_pem: str
    authority_not_after: datetime.datetime
    key: Path

    def days_left(self, now: datetime.datetime) -> float:
        """Days until it or its authority ends, the earlier."""
        end = min(self.not_after, self.authority_not_after)
        return (end - now).total_seconds() / 86_400

    def check_time(self, now: datetime.datetime) -> None:
        """`CertificateError` unless both are valid at `now` (aware)."""
        if now < self.not_before:
            raise CertificateError(
                f"{self.path}: is valid from {self.not_before:%F %T} UTC, this clock says "
                f"{now:%F %T}"
            )
        for what, end in (("", self.not_after), ("its authority ", self.authority_not_after)):
            if now > end:
                raise CertificateError(f"{self.path}: {what}expired on {end:%F %T} UTC")


def read_node_certificate(path: Path) -> NodeCertificate:
    """The node certificate in a PEM file that also holds its authority's; the key lies beside it.

    `CertificateError` if it is not a node's, was not signed by that authority, its key (the same
    path ending in `.key`, OpenSSH format) is missing, does not fit or is readable by others. Times
    are not checked here.
    """
    certificates = load_certificates(path)
    if len(certificates) != 2:
        raise CertificateError(
            f"{path}: must hold the node's and then the authority's certificate, holds "
            f"{len(certificates)}"
        )
    node, authority = certificates
    try:
        node.verify_directly_issued_by(authority)
        authority.verify_directly_issued_by(authority)
    except (InvalidSignature, ValueError, TypeError):
        raise CertificateError(f"{path}: was not signed by the authority in it") from None
    key = path.with_suffix(".key")
    _check_key(key, node, path)
    return NodeCertificate(
        path=path,
        client_id=_client_id(path, node),
        not_before=max(node.not_valid_before_utc, authority.not_valid_before_utc),
        not_after=node.not_valid_after_utc,
        authority_name=authority.subject.rfc4514_string(),
        authority_pem=authority.public_bytes(serialization.Encoding.PEM).decode(),
        authority_not_after=authority.not_valid_after_utc,
        key=key,
    )


def _client_id(path: Path, node: x509.Certificate) -> int:
    try:
        names = node.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
    except x509.ExtensionNotFound:
        uris = []
    numbers = [uri.removeprefix(NODE_URI) for uri in uris if uri.startswith(NODE_URI)]
    if len(numbers) != 1 or not numbers[0].isdecimal():
        raise CertificateError(f"{path}: is no node's certificate ({NODE_URI}N is not in it)")
    return int(numbers[0])


def _check_key(path: Path, node: x509.Certificate, certificate: Path) -> None:
    try:
        mode = path.stat().st_mode & 0o777
        key = serialization.load_ssh_private_key(path.read_bytes(), None)
    except OSError as error:
        raise CertificateError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise CertificateError(f"{path}: holds no OpenSSH key without a password") from None
    if key.public_key() != node.public_key():
        raise CertificateError(f"{path}: is not the key of {certificate}")
    if mode & 0o077:
        raise CertificateError(f"{path}: others can read it (mode {mode:04o}); chmod 600 {path}")
