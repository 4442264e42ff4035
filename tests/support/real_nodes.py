"""A federation of real processes on this machine: certificates, keys, data and SuperNodes.

`fedpdm federation` starts the SuperLink, `flower-supernode` the nodes, and they talk gRPC over TLS.
Nothing is replaced; messages are worked on by forks of a warm process, as under `fedpdm node
start`. Every process is marked, and ended when the block is left.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import datetime
import functools
import ipaddress
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fedpdm.config import RunConfig, config_from_mapping, config_to_yaml
from fedpdm.data import ImageSet
from fedpdm.data.loading import build_partitions, load_split
from fedpdm.data.spec import build_image_spec
from fedpdm.engines.flowercli import flower_environment, tool
from fedpdm.engines.warm import warm_process, write_command

MARK = "FEDPDM_TEST_NODES"
PATIENCE = 900.0  # seconds that a condition is waited for, on a loaded machine


# --- Certificates and keys ------------------------------------------------------------------


def _pem(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    path.chmod(0o600)
    return path


def make_certificates(
    folder: Path,
    addresses: Sequence[str] = ("127.0.0.1",),
    *,
    hours: tuple[float, float] = (-1, 24),
) -> Path:
    """`ca.crt`, `server.pem` and `server.key` for these addresses, good between these hours."""
    folder.mkdir(parents=True, exist_ok=True)
    now = datetime.datetime.now(datetime.UTC)

    def certificate(
        name: str, issuer: str, public: ec.EllipticCurvePublicKey
    ) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now + datetime.timedelta(hours=hours[0]))
            .not_valid_after(now + datetime.timedelta(hours=hours[1]))
        )

    ca_key, key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    ca = (
        certificate("test CA", "test CA", ca_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    names = [x509.IPAddress(ipaddress.ip_address(address)) for address in addresses]
    server = (
        certificate("test server", "test CA", key.public_key())
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(ca_key, hashes.SHA256())
    )
    _pem(folder / "ca.crt", ca.public_bytes(serialization.Encoding.PEM))
    _pem(folder / "server.pem", server.public_bytes(serialization.Encoding.PEM))
    _pem(
        folder / "server.key",
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        ),
    )
    return folder


def make_node_key(path: Path) -> Path:
    """A key pair in OpenSSH's format, as `ssh-keygen -t ecdsa -b 384` makes it; the private one."""
    key = ec.generate_private_key(ec.SECP384R1())
    path.parent.mkdir(parents=True, exist_ok=True)
    _pem(
        path,
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.OpenSSH,
            serialization.NoEncryption(),
        ),
    )
    path.with_suffix(".pub").write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH
        )
    )
    return path


def key_name(name: str, client: int) -> str:
    """`node-N`, and the node's own name where that is another."""
    own = f"node-{client}"
    return name if name == own else f"{own}-{name}"


# --- Data -----------------------------------------------------------------------------------


def save_images(path: Path, images: ImageSet, test: ImageSet) -> Path:
    """A `.npz` file that `data.name: npz` reads: all of `images` is for training."""
    np.savez(
        path,
        images=images.images,
        labels=images.labels,
        images_test=test.images,
        labels_test=test.labels,
        class_names=np.array(images.class_names),
    )
    return path


def share_out(config: RunConfig, folder: Path) -> list[Path]:
    """What each client of the simulated `config` holds, a `.npz` file each; and `public.npz`, a few
    test images, for the coordinator, who needs to know the shape."""
    folder.mkdir(parents=True, exist_ok=True)
    images, test = load_split(config, "train"), load_split(config, "test")
    few = test.subset(np.arange(min(4, len(test))))
    save_images(folder / "public.npz", few, few)
    return [
        save_images(folder / f"part-{part.client_id}.npz", images.subset(part.indices), few)
        for part in build_partitions(config, images)
    ]


def deployed(config: RunConfig, folder: Path, **sections: dict[str, Any]) -> RunConfig:
    """The simulated `config` for the nodes that `share_out` has given their parts of the images."""
    plain = dataclasses.asdict(config)
    shift = build_image_spec(config).shift
    changes: dict[str, dict[str, Any]] = {
        "run": {"simulation": False},
        "data": {
            **dict.fromkeys(("max_images", "coloring", "resolution", "classes")),
            "name": "npz",
            "root": str(folder / "public.npz"),
        },
        "privacy": {"shift": shift},
        "evaluation": {"image_metrics": False},
    }
    for part in (changes, sections):
        for name, values in part.items():
            plain[name] = {**plain[name], **values}
    return config_from_mapping(plain)


# --- Processes ------------------------------------------------------------------------------


# Below the range from which the kernel takes the ports of outgoing connections: one that is free
# now is not taken a moment later by another node's connection. None is handed out twice, by
# workers side by side either: each has every eighth.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_FIRST = 20_000 + 8 * (11 * os.getpid() % 1_000) + _WORKER % 8
_PORTS = iter(range(_FIRST, _FIRST + 4_000, 8))


def free_port() -> int:
    for port in _PORTS:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no free port")


def wait_until(
    condition: Callable[[], Any],
    what: str,
    *,
    seconds: float = PATIENCE,
    unless: Callable[[], str | None] = lambda: None,
) -> Any:
    """The first true value of `condition`; fails after `seconds`, or once `unless` says why."""
    deadline = time.monotonic() + seconds
    while True:
        if value := condition():
            return value
        if (reason := unless()) is not None:
            raise AssertionError(f"waiting until {what}: {reason}")
        if time.monotonic() > deadline:
            raise AssertionError(f"not in {seconds:.0f} s: {what}")
        time.sleep(0.2)


def family(pid: int) -> list[psutil.Process]:
    """A process and all that it has started."""
    with contextlib.suppress(psutil.Error):
        first = psutil.Process(pid)
        return [first, *first.children(recursive=True)]
    return []


def kill_all(processes: Sequence[psutil.Process]) -> None:
    """SIGKILL, as a power cut would: nothing gets to clean up."""
    for process in processes:
        with contextlib.suppress(psutil.Error):
            process.kill()
    psutil.wait_procs(processes, timeout=10)


@functools.cache
def warm_commands() -> Path:
    """A folder for PATH: its `flwr-clientapp` asks a warm process, which lives as long as this one.

    Nodes of all federations share it; it keeps nothing from one message to the next.
    """
    folder = Path(tempfile.mkdtemp(prefix="fedpdm-warm-"))
    block = contextlib.ExitStack()
    environment = {**flower_environment(folder), "OMP_NUM_THREADS": "1"}
    block.enter_context(warm_process(folder / "warm", environment=environment, guarded=False))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    atexit.register(block.close)
    commands = folder / "commands"
    write_command(commands, directory=folder / "warm", otherwise=[tool("flwr-clientapp")])
    return commands


@dataclass
class RunningCommand:
    """`fedpdm ARGUMENTS` in a process of its own; its output grows in a file."""

    process: subprocess.Popen[bytes]
    path: Path

    def output(self) -> str:
        return self.path.read_text(encoding="utf-8", errors="replace")

    def code(self, seconds: float = PATIENCE) -> int:
        return self.process.wait(seconds)

    def ended(self) -> str | None:
        """For `wait_until`: what it said, once it has ended."""
        return None if self.process.poll() is None else f"it ended: {self.output()[-2000:]}"


@dataclass
class RealFederation:
    """A coordinator's state directory and nodes by name, all under `root`."""

    root: Path
    host: str = "127.0.0.1"
    fleet_port: int = field(default_factory=free_port)
    control_port: int = field(default_factory=free_port)
    prefixes: dict[str, list[str]] = field(default_factory=dict)  # e.g. ip netns exec NAME
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def state(self) -> Path:
        return self.root / "coordinator"

    @property
    def keys(self) -> Path:
        return self.root / "keys"

    def fedpdm(self, *arguments: Any, prefix: Sequence[str] = ()) -> RunningCommand:
        """Start the command; its working directory is the root."""
        path = self.root / f"command-{len(self.started) + 1}.log"
        with open(path, "wb") as log:
            process = subprocess.Popen(
                [*prefix, sys.executable, "-m", "fedpdm.cli", *map(str, arguments)],
                cwd=self.root,
                env=self.environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.started.append(process)
        return RunningCommand(process, path)

    def environment(self) -> dict[str, str]:
        return {**os.environ, MARK: str(self.root), "OMP_NUM_THREADS": "1"}

    def done(self, *arguments: Any, code: int = 0) -> str:
        """The output of a command that must end with this code."""
        command = self.fedpdm(*arguments, prefix=self.prefixes.get("coordinator", ()))
        ended = command.code()
        assert ended == code, f"{arguments}: exit code {ended}\n{command.output()}"
        return command.output()

    def start(self, *more: Any) -> str:
        """Start the SuperLink and register all keys."""
        certificates = self.root / "certificates"
        if not certificates.exists():
            make_certificates(certificates, [self.host])
        options: list[Any] = ["--state", self.state, "--certificates", certificates]
        options += ["--fleet", f"{self.host}:{self.fleet_port}"]
        options += ["--control", f"{self.host}:{self.control_port}"]
        if self.keys.exists():
            options += ["--node-keys", self.keys]
        return self.done("federation", "start", *options, *more)

    def run(self, config: RunConfig | None, out: Path, *more: Any) -> RunningCommand:
        """`fedpdm federation run`, in the background; without a config it resumes."""
        given: list[Any] = ["--resume"]
        if config is not None:
            experiment = self.root / f"{out.name}.yaml"
            experiment.write_text(config_to_yaml(config), encoding="utf-8")
            given = [experiment]
        return self.fedpdm(
            "federation", "run", *given, "--state", self.state, "--out", out, *more,
            prefix=self.prefixes.get("coordinator", ()),
        )  # fmt: skip

    def status(self) -> dict[str, Any]:
        output = self.done("federation", "status", "--state", self.state, "--json")
        status: dict[str, Any] = json.loads(output)
        return status

    def superlink_pid(self) -> int:
        return int(json.loads((self.state / "superlink.pid").read_text())["pid"])

    def node(self, name: str, client: int, data: Path, **options: Any) -> Node:
        """A node that is not started yet; its key, which says which client it is, is made and lies
        with those to register."""
        key = self.keys / key_name(name, client)
        if not key.exists():
            make_node_key(key)
        own = {"partition-id": client, "num-partitions": 9, "data-dir": str(data)}
        store = self.root / f"store-{name}"
        return Node(self, name, key, {**own, "store-dir": str(store), **options})


@dataclass
class Node:
    """A SuperNode: started, killed and started again under the same key."""

    federation: RealFederation
    name: str
    key: Path
    config: Mapping[str, Any]
    address: str | None = None  # where it finds the SuperLink; default: at its fleet address
    limits: Callable[[], None] | None = None  # called in the process before it starts
    authority: Path | None = None  # whom it trusts; default: the federation's ca.crt
    leave_out: Sequence[str] = ()  # options that it does without: TLS, key
    process: subprocess.Popen[bytes] | None = None

    @property
    def store(self) -> Path:
        return Path(str(self.config["store-dir"]))

    @property
    def log(self) -> Path:
        return self.federation.root / f"node-{self.name}.log"

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""

    def start(self) -> Node:
        """Start it; whether it was let in is another question."""
        federation, home = self.federation, self.federation.root / f"home-{self.name}"
        (home / "empty").mkdir(parents=True, exist_ok=True)
        values = {k: json.dumps(v) for k, v in self.config.items()}
        command = [
            *federation.prefixes.get(self.name, ()),
            tool("flower-supernode"), "--grpc-rere",
            *self._trust(),
            "--superlink", self.address or f"{federation.host}:{federation.fleet_port}",
            "--host", "127.0.0.1", "--port", str(free_port()),
            *self._identity(),
            "--node-config", " ".join(f"{k}={v}" for k, v in values.items()),
        ]  # fmt: skip
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command,
                cwd=home / "empty",
                env={
                    **federation.environment(),
                    **flower_environment(home),
                    "PATH": self._path(),
                    MARK: str(federation.root),
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                preexec_fn=self.limits,
                start_new_session=True,
            )
        federation.started.append(self.process)
        return self

    def _path(self) -> str:
        """Where it finds Flower's commands. A node with limits or a network of its own starts each
        of its processes itself, so that they have these too."""
        path = flower_environment(self.federation.root)["PATH"]
        if self.limits is not None or self.federation.prefixes.get(self.name):
            return path
        return f"{warm_commands()}{os.pathsep}{path}"

    def _trust(self) -> list[str]:
        authority = self.authority or self.federation.root / "certificates" / "ca.crt"
        return (
            ["--insecure"] if "TLS" in self.leave_out else ["--root-certificates", str(authority)]
        )

    def _identity(self) -> list[str]:
        if "key" in self.leave_out:
            return []
        return ["--auth-supernode-private-key", str(self.key)]

    def twin(self, name: str, **changes: Any) -> Node:
        """Another process that has this node's key, and its config but for `changes`."""
        return Node(self.federation, name, self.key, {**self.config, **changes})

    def family(self) -> list[psutil.Process]:
        assert self.process is not None
        return family(self.process.pid)

    def joined(self) -> bool:
        """Whether the SuperLink has let it in."""
        return "SuperNode ID: " in self.output()

    def working(self, kind: str) -> list[psutil.Process]:
        """The process in which it works on a message of this kind (train, evaluate), if it does."""
        asked = [line for line in self.output().splitlines() if "Receiving: " in line]
        if not asked or f"Receiving: {kind} message" not in asked[-1]:
            return []
        found = []
        for process in self.family():
            with contextlib.suppress(psutil.Error):
                if any(part.endswith("flwr-clientapp") for part in process.cmdline()):
                    found.append(process)
        return found

    def process_ended(self, seconds: float) -> bool:
        """Whether the node ends within this time."""
        assert self.process is not None
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.poll() is not None

    def kill(self) -> None:
        """SIGKILL to the node and all that it has started."""
        assert self.process is not None
        kill_all(self.family())
        self.process.wait()

    def start_again(self) -> None:
        """Until it is let in: the SuperLink refuses a key that it believes to be online."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            self.start()
            assert self.process is not None
            try:
                self.process.wait(8.0)
            except subprocess.TimeoutExpired:
                return
        raise AssertionError(f"{self.name} was not let in again: {self.output()[-1000:]}")


@contextlib.contextmanager
def real_federation(root: Path, **options: Any) -> Iterator[RealFederation]:
    """A federation under `root`; whatever is left of it when the block ends is killed."""
    root.mkdir(parents=True, exist_ok=True)
    federation = RealFederation(root, **options)
    try:
        yield federation
    finally:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.pid != os.getpid() and process.environ().get(MARK) == str(root):
                    found.append(process)
        for process in found:  # what was stopped would not be ended otherwise
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGCONT)
        kill_all(found)
        for started in federation.started:
            started.wait()
