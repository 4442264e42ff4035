"""Certificates judged by OpenSSL (`ssl`, openssl, ssh-keygen), not by their maker."""

from __future__ import annotations

import datetime
import os
import shutil
import socket
import subprocess
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from fedpdm.cli import main
from fedpdm.config import ConfigError
from fedpdm.deployment.certificates import (
    CertificateError,
    make_authority,
    make_node,
    make_request,
    make_server,
    read_node_certificate,
    sign_request,
)
from fedpdm.deployment.node import shake_hands
from tests.support.command_line import without_advice
from tests.support.tls_servers import server


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ca")
    make_authority(folder)
    return folder


@pytest.fixture(scope="module")
def other_authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another federation's, under the same name."""
    folder = tmp_path_factory.mktemp("other")
    make_authority(folder)
    return folder


def pem(folder: Path) -> str:
    return (folder / "ca.crt").read_text()


# --- Handshakes: both sides are OpenSSL's ----------------------------------------------------


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_handshake_with_the_right_authority(authority: Path, tmp_path: Path, name: str) -> None:
    make_server(authority, tmp_path, names=["localhost", "127.0.0.1"], days=20)
    with server(tmp_path) as port:
        shown = shake_hands(f"{name}:{port}", authority_pem=pem(authority))
    assert shown.tls in ("TLSv1.2", "TLSv1.3")
    assert shown.names == ("localhost", "127.0.0.1")
    left = (shown.not_after - datetime.datetime.now(datetime.UTC)).total_seconds() / 86_400
    assert abs(left - 20) < 0.01


def test_handshake_with_another_authority(
    authority: Path, other_authority: Path, tmp_path: Path
) -> None:
    make_server(authority, tmp_path, names=["127.0.0.1"])
    with server(tmp_path) as port, pytest.raises(ConfigError, match="not signed by this federa"):
        shake_hands(f"127.0.0.1:{port}", authority_pem=pem(other_authority))


def test_handshake_under_another_name(authority: Path, tmp_path: Path) -> None:
    make_server(authority, tmp_path, names=["coordinator.example.org", "10.0.0.1"])
    with server(tmp_path) as port:
        for name in ("127.0.0.1", "localhost"):
            with pytest.raises(ConfigError, match="for another name"):
                shake_hands(f"{name}:{port}", authority_pem=pem(authority))


@pytest.mark.parametrize(("days", "reason"), [(-30, "expired"), (30, "not valid yet")])
def test_handshake_at_another_time(tmp_path: Path, days: float, reason: str) -> None:
    now = datetime.datetime.now(datetime.UTC)
    make_authority(tmp_path, days=100, now=now - datetime.timedelta(days=50))
    then = now + datetime.timedelta(days=days)
    make_server(tmp_path, tmp_path, names=["127.0.0.1"], days=7, now=then)
    with server(tmp_path) as port, pytest.raises(ConfigError, match=reason):
        shake_hands(f"127.0.0.1:{port}", authority_pem=pem(tmp_path))


def test_a_node_certificate_is_no_server(authority: Path, tmp_path: Path) -> None:
    """Its purpose is another, so a participant cannot play the coordinator for the others."""
    made = make_node(authority, tmp_path, client_id=4)
    key = subprocess.run(
        ["ssh-keygen", "-p", "-q", "-N", "", "-m", "pkcs8", "-f", str(made.with_suffix(".key"))],
        check=False,
        capture_output=True,
    )
    assert key.returncode == 0
    shutil.copy(made, tmp_path / "server.pem")
    shutil.copy(made.with_suffix(".key"), tmp_path / "server.key")
    with server(tmp_path) as port, pytest.raises(ConfigError, match="its certificate is refused"):
        shake_hands(f"127.0.0.1:{port}", authority_pem=pem(authority))


def test_a_server_that_is_no_grpc_server(authority: Path, tmp_path: Path) -> None:
    make_server(authority, tmp_path, names=["127.0.0.1"])
    with (
        server(tmp_path, speaks=b"HTTP/1.1 400 Bad Request\r\n\r\n") as port,
        pytest.raises(ConfigError, match="not as a gRPC server"),
    ):
        shake_hands(f"127.0.0.1:{port}", authority_pem=pem(authority))


def test_nobody_there_and_no_tls(authority: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ConfigError, match=r"no answer within 0\.3 s"):
            shake_hands(f"127.0.0.1:{port}", authority_pem=pem(authority), timeout=0.3)
    with pytest.raises(ConfigError, match="cannot be reached: Connection refused"):
        shake_hands(f"127.0.0.1:{port}", authority_pem=pem(authority))


@pytest.mark.parametrize(
    "address", ["host", "host:", ":9092", "host:0", "host:65536", "::1:9092", "a b:1", "http://h:1"]
)
def test_addresses_that_are_none(address: str) -> None:
    with pytest.raises(ConfigError, match="must be HOST:PORT"):
        shake_hands(address, authority_pem="")


# --- What OpenSSL and OpenSSH say of the files -----------------------------------------------


def test_openssl_verifies_the_chain_and_purposes(authority: Path, tmp_path: Path) -> None:
    make_server(authority, tmp_path, names=["::1", "*.example.org"])
    node = make_node(authority, tmp_path, client_id=12)

    def verify(path: Path, purpose: str) -> bool:
        command = ["openssl", "verify", "-x509_strict", "-purpose", purpose]
        command += ["-CAfile", str(authority / "ca.crt"), str(path)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    assert verify(tmp_path / "server.pem", "sslserver")
    assert verify(node, "sslclient")
    assert not verify(tmp_path / "server.pem", "sslclient")
    assert not verify(node, "sslserver")


def test_openssh_reads_the_node_key(authority: Path, tmp_path: Path) -> None:
    made = make_node(authority, tmp_path, client_id=0)
    answer = subprocess.run(
        ["ssh-keygen", "-y", "-f", str(made.with_suffix(".key"))],
        capture_output=True,
        text=True,
        check=True,
    )
    public = made.with_suffix(".pub").read_text()
    assert answer.stdout.split()[:2] == public.split()[:2]
    assert public.startswith("ecdsa-sha2-nistp384 ")
    certificate = x509.load_pem_x509_certificate(made.read_bytes())
    assert certificate.public_key() == load_ssh_public_key(public.encode())


def test_keys_are_the_owners_alone(authority: Path, tmp_path: Path) -> None:
    previous = os.umask(0)
    try:
        make_server(authority, tmp_path, names=["localhost"])
        make_node(authority, tmp_path, client_id=1)
        make_request(tmp_path / "at-node", client_id=2)
    finally:
        os.umask(previous)
    keys = [authority / "ca.key", *tmp_path.rglob("*.key")]
    assert len(keys) == 4
    assert {path.stat().st_mode & 0o777 for path in keys} == {0o600}


# --- Nothing is overwritten; requests ---------------------------------------------------------


def test_nothing_is_overwritten(authority: Path, tmp_path: Path) -> None:
    make_server(authority, tmp_path, names=["localhost"])
    make_node(authority, tmp_path, client_id=1)
    make_request(tmp_path, client_id=2)
    before = {path: path.read_bytes() for path in (*tmp_path.iterdir(), *authority.iterdir())}
    for make in (
        lambda: make_authority(authority),
        lambda: make_server(authority, tmp_path, names=["localhost"]),
        lambda: make_node(authority, tmp_path, client_id=1),
        lambda: make_request(tmp_path, client_id=2),
    ):
        with pytest.raises(CertificateError, match="is there already and is not overwritten"):
            make()
    (tmp_path / "node-9.pub").write_text("mine")  # one of three files is enough to write none
    with pytest.raises(CertificateError, match=r"node-9\.pub"):
        make_node(authority, tmp_path, client_id=9)
    (tmp_path / "node-9.pub").unlink()
    assert {path: path.read_bytes() for path in before} == before
    assert len([*tmp_path.iterdir(), *authority.iterdir()]) == len(before)


def test_a_key_that_never_leaves_the_node(authority: Path, tmp_path: Path) -> None:
    node, coordinator = tmp_path / "node", tmp_path / "coordinator"
    request = make_request(node, client_id=3)
    made = sign_request(authority, request, coordinator, client_id=3)
    assert {path.name for path in coordinator.iterdir()} == {"node-3.crt", "node-3.pub"}
    shutil.copy(made, node)
    assert read_node_certificate(node / made.name).client_id == 3
    # The coordinator decides which client it is, whatever the request calls itself.
    made = sign_request(authority, request, tmp_path / "again", client_id=5)
    shutil.copy(made, node / "node-3.crt")
    assert read_node_certificate(node / "node-3.crt").client_id == 5


def test_a_changed_request_is_refused(authority: Path, tmp_path: Path) -> None:
    request = make_request(tmp_path, client_id=3)
    text = subprocess.run(
        ["openssl", "req", "-in", str(request), "-outform", "der"], capture_output=True, check=True
    ).stdout
    der = text.replace(b"node-3", b"node-4")
    assert der != text
    subprocess.run(
        ["openssl", "req", "-inform", "der", "-out", str(request)], input=der, check=True
    )
    with pytest.raises(CertificateError, match="signature does not fit"):
        sign_request(authority, request, tmp_path / "out", client_id=3)


# --- Reading a node's certificate -------------------------------------------------------------


def test_a_node_reads_its_certificate(authority: Path, tmp_path: Path) -> None:
    found = read_node_certificate(make_node(authority, tmp_path, client_id=7, days=40))
    now = datetime.datetime.now(datetime.UTC)
    assert found.client_id == 7
    assert found.key == tmp_path / "node-7.key"
    assert found.authority_pem == pem(authority)
    assert found.authority_name == "CN=fedpdm federation"
    assert abs(found.days_left(now) - 40) < 0.01
    found.check_time(now)
    with pytest.raises(CertificateError, match="expired on"):
        found.check_time(now + datetime.timedelta(days=40, minutes=1))
    with pytest.raises(CertificateError, match="is valid from"):
        found.check_time(now - datetime.timedelta(minutes=6))


def swap_key(folder: Path, authority: Path, other: Path) -> str:
    make_node(authority, folder / "x", client_id=0)
    shutil.copy(folder / "x" / "node-0.key", folder / "node-0.key")
    return "is not the key of"


def forge_authority(folder: Path, authority: Path, other: Path) -> str:
    node = (folder / "node-0.crt").read_text().split("-----END CERTIFICATE-----\n")[0]
    (folder / "node-0.crt").write_text(f"{node}-----END CERTIFICATE-----\n{pem(other)}")
    return "was not signed by the authority in it"


def use_server(folder: Path, authority: Path, other: Path) -> str:
    made = make_server(authority, folder / "x", names=["localhost"])
    shutil.copy(made, folder / "node-0.crt")
    return "is not the key of"


def open_key(folder: Path, authority: Path, other: Path) -> str:
    (folder / "node-0.key").chmod(0o640)
    return r"others can read it \(mode 0640\)"


def lose_key(folder: Path, authority: Path, other: Path) -> str:
    (folder / "node-0.key").unlink()
    return "cannot be read: No such file"


def lose_authority(folder: Path, authority: Path, other: Path) -> str:
    text = (folder / "node-0.crt").read_text()
    (folder / "node-0.crt").write_text(text[: text.index("-----END") + 26])
    return "then the authority's certificate, holds 1"


def write_nonsense(folder: Path, authority: Path, other: Path) -> str:
    (folder / "node-0.crt").write_text("no certificate")
    return "holds no PEM certificate"


@pytest.mark.parametrize(
    "damage",
    [swap_key, forge_authority, use_server, open_key, lose_key, lose_authority, write_nonsense],
)
def test_certificates_that_do_not_fit(
    authority: Path, other_authority: Path, tmp_path: Path, damage: object
) -> None:
    made = make_node(authority, tmp_path, client_id=0)
    assert callable(damage)
    reason = damage(tmp_path, authority, other_authority)
    with pytest.raises(CertificateError, match=reason) as caught:
        read_node_certificate(made)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["server", "--name", "not a name"], "neither a host name nor an IP address"),
        (["server", "--name", "h", "--days", "0"], "days: must be in"),
        (["server", "--name", "h", "--days", "36000"], "beyond the authority's own end"),
        (["node", "--client", "-1"], "client: must be at least 0"),
    ],
)
def test_bad_input(
    authority: Path,
    tmp_path: Path,
    arguments: list[str],
    reason: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    places = ["--ca", str(authority), "--out", str(tmp_path / "out")]
    assert main(["certificates", *arguments, *places]) == 2
    line = without_advice(capsys.readouterr().err)
    assert reason in line
    assert line.count("\n") == 1
    assert not (tmp_path / "out").exists()
