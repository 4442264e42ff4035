"""The files that certificates and keys are kept in: PEM, and OpenSSH for nodes' keys."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

__all__ = [
    "CertificateError",
    "load_authority",
    "load_certificates",
    "load_request",
    "node_key_files",
    "pem",
    "pkcs8",
    "ssh",
    "write_new",
]


class CertificateError(ValueError):
    """A certificate or key that cannot be made or used; one line that names the file."""


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CertificateError(f"{path}: cannot be read: {error.strerror}") from None


def load_certificates(path: Path) -> list[x509.Certificate]:
    """The certificates of a PEM file, in order; `CertificateError` if there is none."""
    data = _read(path)
    try:
        return x509.load_pem_x509_certificates(data)
    except ValueError:
        raise CertificateError(f"{path}: holds no PEM certificate") from None


def pem(certificate: x509.Certificate) -> bytes:
    """A certificate as PEM."""
    return certificate.public_bytes(serialization.Encoding.PEM)


def pkcs8(key: ec.EllipticCurvePrivateKey) -> bytes:
    """A private key as PEM, without a password."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def ssh(key: ec.EllipticCurvePublicKey) -> bytes:
    """A public key as one line in OpenSSH format."""
    encoding, form = serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
    return key.public_bytes(encoding, form) + b"\n"


def node_key_files(key: ec.EllipticCurvePrivateKey, client_id: int) -> dict[str, tuple[bytes, int]]:
    """`node-N.key` and `node-N.pub`, for `write_new`."""
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.NoEncryption(),
    )
    name = f"node-{client_id}"
    return {f"{name}.key": (private, 0o600), f"{name}.pub": (ssh(key.public_key()), 0o644)}


def load_authority(folder: Path) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """`ca.crt` and its key `ca.key`; `CertificateError` if one is missing or they do not fit."""
    certificate = load_certificates(folder / "ca.crt")[0]
    path = folder / "ca.key"
    data = _read(path)
    try:
        key = serialization.load_pem_private_key(data, None)
    except (ValueError, TypeError):
        raise CertificateError(f"{path}: holds no private key without a password") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise CertificateError(f"{path}: needs an elliptic key, got {type(key).__name__}")
    if key.public_key() != certificate.public_key():
        raise CertificateError(f"{path}: is not the key of {folder / 'ca.crt'}")
    return certificate, key


def load_request(path: Path) -> x509.CertificateSigningRequest:
    """A signing request; `CertificateError` if the file holds none."""
    data = _read(path)
    try:
        return x509.load_pem_x509_csr(data)
    except ValueError:
        raise CertificateError(f"{path}: holds no signing request") from None


def write_new(folder: Path, files: Mapping[str, tuple[bytes, int]]) -> None:
    """Write files that are not there yet, all or none; a key is never readable by others."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for name in files:
            if (folder / name).exists() or (folder / name).is_symlink():
                raise CertificateError(
                    f"{folder / name}: is there already and is not overwritten; "
                    "move it away or choose another folder"
                )
        written: list[Path] = []
        try:
            for name, (data, mode) in files.items():
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
                handle = os.open(folder / name, flags, mode)
                written.append(folder / name)
                with open(handle, "wb") as file:
                    os.fchmod(handle, mode)
                    file.write(data)
                    file.flush()
                    os.fsync(handle)
        except OSError:
            for path in written:
                path.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise CertificateError(
            f"{error.filename or folder}: cannot be written: {error.strerror}"
        ) from None
