"""Make an authority, server and node certificates. Nothing is overwritten; keys get mode 0600.

All keys are elliptic (P-384, ECDSA with SHA-384). A node's key is in OpenSSH format, as Flower
reads it; the others are PKCS #8 PEM.
"""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import re
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedpdm.deployment.certificates.files import (
    CertificateError,
    load_authority,
    load_certificates,
    load_request,
    node_key_files,
    pem,
    pkcs8,
    ssh,
    write_new,
)

__all__ = [
    "NODE_URI",
    "make_authority",
    "make_node",
    "make_request",
    "make_server",
    "sign_request",
]

NODE_URI = "fedpdm:node:"  # followed by the client's number, in a node certificate
Moment = datetime.datetime | None  # aware; None: now
BACKDATED = datetime.timedelta(minutes=5)
_HOST = re.compile(r"(?=.{1,253}\Z)(\*\.)?([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z0-9-]{1,63}\Z")


def make_authority(
    folder: Path, *, name: str = "fedpdm federation", days: int = 3650, now: Moment = None
) -> Path:
    """Make `ca.crt` and `ca.key` in `folder`; returns the certificate's path. Keep the key offline.

    Valid from five minutes before `now` (here and below), for clocks that are not quite together.

    `CertificateError` if one of them is there already, or for a number of days below 1.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    subject = _name(name)
    builder = _builder(subject, subject, key.public_key(), days, now)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(signs_certificates=True), critical=True)
    certificate = builder.sign(key, hashes.SHA384())
    write_new(folder, {"ca.key": (pkcs8(key), 0o600), "ca.crt": (pem(certificate), 0o644)})
    return folder / "ca.crt"


def make_server(
    ca: Path, out: Path, *, names: Sequence[str], days: int = 365, now: Moment = None
) -> Path:
    """Make the coordinator's `server.pem` (its certificate, the authority's) and `server.key`.

    Where `out` is another folder than `ca`, the authority's certificate is copied there too: the
    coordinator needs `ca.crt` and never `ca.key`.

    Args:
        ca: folder with `ca.crt` and `ca.key`; out: folder to write to.
        names: every host name and IP address under which nodes reach the coordinator.
        days: how long it is valid, at most as long as the authority.
    """
    if not names:
        raise CertificateError("names: a server certificate needs at least one name or address")
    authority, ca_key = load_authority(ca)
    key = ec.generate_private_key(ec.SECP384R1())
    certificate = _issue(
        authority,
        ca_key,
        key.public_key(),
        common_name=names[0],
        alternatives=[_alternative(name) for name in names],
        usage=ExtendedKeyUsageOID.SERVER_AUTH,
        days=days,
        now=now,
    )
    both = pem(certificate) + pem(authority)
    files = {"server.key": (pkcs8(key), 0o600), "server.pem": (both, 0o644)}
    beside = out / "ca.crt"
    if not beside.exists():
        files["ca.crt"] = (pem(authority), 0o644)
    elif load_certificates(beside)[0] != authority:
        raise CertificateError(f"{beside}: is another authority's; choose another folder")
    write_new(out, files)
    return out / "server.pem"


def make_node(ca: Path, out: Path, *, client_id: int, days: int = 365, now: Moment = None) -> Path:
    """Make `node-N.key`, `.pub` and `.crt` (node, then authority) in `out` for client N.

    The key is made here and must be carried to the node in secret; with `make_request` and
    `sign_request` it never leaves the node.
    """
    authority, ca_key = load_authority(ca)
    key = ec.generate_private_key(ec.SECP384R1())
    files = node_key_files(key, _checked_id(client_id))
    certificate = _issue_node(authority, ca_key, key.public_key(), client_id, days, now)
    files[f"node-{client_id}.crt"] = (certificate, 0o644)
    write_new(out, files)
    return out / f"node-{client_id}.crt"


def make_request(out: Path, *, client_id: int) -> Path:
    """At a node: make `node-N.key`, `.pub` and a signing request `.csr` for the coordinator."""
    key = ec.generate_private_key(ec.SECP384R1())
    files = node_key_files(key, _checked_id(client_id))
    builder = x509.CertificateSigningRequestBuilder().subject_name(_name(f"node-{client_id}"))
    request = builder.sign(key, hashes.SHA384())
    files[f"node-{client_id}.csr"] = (request.public_bytes(serialization.Encoding.PEM), 0o644)
    write_new(out, files)
    return out / f"node-{client_id}.csr"


def sign_request(
    ca: Path, request: Path, out: Path, *, client_id: int, days: int = 365, now: Moment = None
) -> Path:
    """At the coordinator: make `node-N.crt` and `.pub` in `out` from a node's request.

    Of the request only the key counts; the coordinator says which client it is.
    """
    authority, ca_key = load_authority(ca)
    asked = load_request(request)
    public = asked.public_key()
    if not asked.is_signature_valid:
        raise CertificateError(f"{request}: its signature does not fit its key")
    if not isinstance(public, ec.EllipticCurvePublicKey):
        raise CertificateError(f"{request}: needs an elliptic key, got {type(public).__name__}")
    certificate = _issue_node(authority, ca_key, public, _checked_id(client_id), days, now)
    name = f"node-{client_id}"
    write_new(out, {f"{name}.crt": (certificate, 0o644), f"{name}.pub": (ssh(public), 0o644)})
    return out / f"{name}.crt"


# --- What goes into a certificate ------------------------------------------------------------


def _name(common_name: str) -> x509.Name:
    if not 1 <= len(common_name) <= 64:
        raise CertificateError(f"name: must have 1 to 64 characters, got {common_name!r}")
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])


def _checked_id(client_id: int) -> int:
    if client_id < 0:
        raise CertificateError(f"client: must be at least 0, got {client_id}")
    return client_id


def _alternative(name: str) -> x509.GeneralName:
    with contextlib.suppress(ValueError):
        return x509.IPAddress(ipaddress.ip_address(name))
    if not _HOST.match(name.lower()):
        raise CertificateError(f"names: {name!r} is neither a host name nor an IP address")
    return x509.DNSName(name)


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int, now: Moment
) -> x509.CertificateBuilder:
    if not 1 <= days <= 36500:
        raise CertificateError(f"days: must be in [1, 36500], got {days}")
    now = now or datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - BACKDATED)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _issue(
    authority: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    key: ec.EllipticCurvePublicKey,
    *,
    common_name: str,
    alternatives: Sequence[x509.GeneralName],
    usage: x509.ObjectIdentifier,
    days: int,
    now: Moment,
) -> x509.Certificate:
    builder = _builder(_name(common_name[:64]), authority.subject, key, days, now)
    until = (now or datetime.datetime.now(datetime.UTC)) + datetime.timedelta(days=days)
    if until > authority.not_valid_after_utc:
        raise CertificateError(
            f"days: {days} is beyond the authority's own end, {authority.not_valid_after_utc:%F}"
        )
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(ca_key.public_key())
    return (
        builder.add_extension(issuer, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
        .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
        .sign(ca_key, hashes.SHA384())
    )


def _issue_node(
    authority: x509.Certificate,
    ca_key: ec.EllipticCurvePrivateKey,
    key: ec.EllipticCurvePublicKey,
    client_id: int,
    days: int,
    now: Moment,
) -> bytes:
    certificate = _issue(
        authority,
        ca_key,
        key,
        common_name=f"node-{client_id}",
        alternatives=[x509.UniformResourceIdentifier(f"{NODE_URI}{client_id}")],
        usage=ExtendedKeyUsageOID.CLIENT_AUTH,
        days=days,
        now=now,
    )
    return pem(certificate) + pem(authority)
