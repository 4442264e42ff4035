"""Make files as this code writes them, for later code to open: `test_artefacts.py` does.

    python -m tests.artefacts.make_artefacts [DIR]

writes `artefacts.tar.xz` and `expected.json` into DIR (default: beside this file) and takes some
minutes. It uses the command line and the public names of `fedpdm`. Only the configs of an
experiment's cells, which no command prints, come from within; `record_cells` says so.

Run it again only when files of today are to be held as well: what is replaced is no longer tested.

Weights compress badly, and a run keeps the models and moments of two rounds. The recipe below
therefore clips gradients to the smallest float32 numbers there are and takes huge steps: all that
is stored are small multiples of 1.4e-45 or of one step. The models are of no use otherwise.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import lzma
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # sums depend on the number of threads

import numpy as np
import torch
from safetensors.numpy import load_file

import fedpdm
from fedpdm.cli import main

HERE = Path(__file__).resolve().parent
EXPERIMENTS = HERE.parents[1] / "experiments"
ARCHIVE, EXPECTED = "artefacts.tar.xz", "expected.json"
RUNS = ("digits", "cifar10-smoke", "colored-mnist-smoke")
"""Experiments that are one run; suites and the toy are read otherwise."""
INTERRUPTED = 75
"""Exit code of a run that was ended after its first round."""

MODEL = """\
{preset: micro, steps_per_round: 1, batch_size: 8, warmup_steps: 0, decay: constant, ema_decay: 0.0,
  grad_clip: 1.2e-41, lr: 2.0769187434139311e+34, weight_decay: 4.81482486096809e-35}"""
TINY = f"""\
name: tiny
run: {{rounds: 2, seed: 3, threads: 1, device: cpu, precision: float32}}
data: {{name: digits, max_images: 60}}
partition: {{kind: majority_minority, num_clients: 2, majority_classes: 5, majority_ratio: 2}}
privacy: {{epsilon: 10, delta: 1.0e-5, clip_norm: 8}}
coarse: {MODEL}
fine: {MODEL}
aggregation: {{ema_decay: 0.0}}
sampling: {{num_steps: 3, per_class: 1}}
evaluation: {{image_metrics: false}}
"""
CLINIC = """\
name: clinic
run: {rounds: 2, device: cpu}
data: {name: npz, root: public.npz}
partition: {kind: own, num_clients: 2}
privacy: {epsilon: 10, delta: 1.0e-5, clip_norm: 8}
coarse: {preset: micro}
fine: {preset: micro}
evaluation: {image_metrics: false}
"""
TOY_SETTINGS = [
    "measure.replicates=2", "measure.samples=10", "measure.ancestral_steps=1",
    "measure.trained_replicates=2", "measure.training_steps=1", "sweep.sigma2=[]",
    "sweep.minority=[]", "sweep.total=[]", "sweep.clients=[]", "sweep.dim=[]", "sweep.epsilon=[]",
]  # fmt: skip


# What is looked at, now and by the tests.


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    return json.loads(json.dumps(value, default=str))


def machine() -> dict[str, str]:
    """What sums in float32 depend on to the last bit."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cpu": names[0] if names else "",
    }


def weights_digest(path: Path) -> str:
    """SHA-256 of names, shapes and values in a safetensors file, whatever their order."""
    digest = hashlib.sha256()
    for name, array in sorted(load_file(path).items()):
        digest.update(f"{name} {array.dtype} {array.shape}".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def array_digest(array: np.ndarray) -> str:
    """SHA-256 of an array's type, shape and values."""
    head = f"{array.dtype} {array.shape}".encode()
    return hashlib.sha256(head + np.ascontiguousarray(array).tobytes()).hexdigest()


def draw(pipeline: Any) -> np.ndarray:
    """Ten images by each method of a pipeline, uint8 (30, H, W, C), with a fixed seed."""
    pipeline.set_progress_bar_config(disable=True)
    drawn = [
        pipeline(
            labels=list(range(10)),
            num_inference_steps=6,
            generator=torch.Generator().manual_seed(11),
            method=method,
            output_type="np",
        ).images
        for method in ("pfdm", "alone", "coarse")
    ]
    return np.round(np.concatenate(drawn) * 255).astype(np.uint8)


def resolved(name: str) -> dict[str, Any]:
    """Every key of one of the repository's experiments that is one run."""
    return plain(dataclasses.asdict(fedpdm.configure(EXPERIMENTS / f"{name}.yaml")))


def release_again(folder: Path) -> Any:
    """The release of the node's images by the invitation's config; noised when it was made."""
    config = json.loads((folder / "invitation.json").read_text())["config"]
    config["data"]["root"] = str(folder / "hospital.npz")
    opened = fedpdm.configure(**config)
    return fedpdm.release(opened, fedpdm.load_images(opened), folder / "vault", client=0)


# Making.


def call(*arguments: Any) -> str:
    """Standard output of `fedpdm ARGUMENTS`, which must end well."""
    stream = io.StringIO()
    with contextlib.redirect_stdout(stream):
        code = main([str(argument) for argument in arguments])
    if code != 0:
        raise SystemExit(f"fedpdm {' '.join(map(str, arguments))}: exit code {code}")
    return stream.getvalue()


class Fuse(io.TextIOBase):
    """A standard output that ends the process when the first round is reported."""

    def write(self, text: str) -> int:
        if text.startswith("round 1/"):
            os._exit(INTERRUPTED)
        return len(text)


def interrupt(experiment: Path, out: Path) -> None:
    """A run that ends after its first round, as if it were killed."""
    command = [sys.executable, "-m", "tests.artefacts.make_artefacts", "--interrupt"]
    places = [str(experiment.absolute()), str(out.absolute())]
    code = subprocess.run([*command, *places], cwd=HERE.parents[1], check=False).returncode
    if code != INTERRUPTED:
        raise SystemExit(f"{out}: the run was not interrupted, exit code {code}")


def make_runs() -> dict[str, Any]:
    """A finished run with its export, and runs to resume, federated and trained at the server."""
    for name, training in (("tiny", "federated"), ("tiny-server", "server")):
        text = TINY.replace("name: tiny", f"name: {name}")
        text = text.replace("coarse: {", f"coarse: {{training: {training}, ")
        Path(f"{name}.yaml").write_text(text)
    for name, out in (("tiny", "finished"), ("tiny-server", "whole")):
        call("run", f"{name}.yaml", "--engine", "inprocess", "--out", out)
    interrupt(Path("tiny.yaml"), Path("interrupted"))
    interrupt(Path("tiny-server.yaml"), Path("interrupted-server"))
    Path("server-result").mkdir()
    shutil.copy("whole/coarse.safetensors", "server-result/coarse.safetensors")
    shutil.rmtree("whole")
    call("export", "finished", "--client", "0", "--out", "pipeline")
    samples = draw(fedpdm.load_pipeline(Path("pipeline")))
    np.save("samples.npy", samples)
    return {
        "show": json.loads(call("show", "finished", "--json")),
        "ledgers": json.loads(call("ledger", "finished", "--json")),
        "weights": {
            "interrupted": weights_digest(Path("finished/coarse.safetensors")),
            "interrupted-server": weights_digest(Path("server-result/coarse.safetensors")),
        },
        "samples": array_digest(samples),
    }


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextlib.contextmanager
def coordinator(certificates: Path) -> Iterator[str]:
    """The address of a SuperLink that knows node 0."""
    address = f"127.0.0.1:{_free_port()}"
    call(
        "federation", "start", "--state", "state", "--fleet", address,
        "--control", f"127.0.0.1:{_free_port()}", "--certificates", certificates / "server",
        "--node-keys", certificates / "node",
    )  # fmt: skip
    try:
        yield address
    finally:
        call("federation", "stop", "--state", "state")


def make_certificates(folder: Path) -> Path:
    """An authority, the certificate of a server on this machine, and that of client 0."""
    call("certificates", "ca", "--out", folder / "ca")
    call("certificates", "server", "--ca", folder / "ca", "--out", folder / "server",
         "--name", "127.0.0.1")  # fmt: skip
    call("certificates", "node", "--ca", folder / "ca", "--out", folder / "node", "--client", 0)
    return folder


def make_node() -> dict[str, Any]:
    """A participant: invitation, policy, images, and a store that accepted and released."""
    os.environ["LOGNAME"] = "operator"
    here = Path.cwd()
    node = here / "node"
    node.mkdir()
    for name, seed, count in (("public", 1, 4), ("hospital", 7, 24)):
        images = np.random.default_rng(seed).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
        np.savez(node / f"{name}.npz", images=images, labels=np.arange(count) % 2)
    with contextlib.chdir(node):
        Path("clinic.yaml").write_text(CLINIC)
        call("node", "invite", "clinic.yaml", "--out", "invitation.json")
    code = json.loads(call("node", "digest", "--json"))["code"]
    (node / "policy.yaml").write_text(f"max_epsilon: 12\nmin_t0: 600\ncode: [{code}]\n")
    made = make_certificates(here / "certificates")
    with coordinator(made) as address:
        call(
            "node", "check", "--accept", "--coordinator", address,
            "--certificate", made / "node" / "node-0.crt", "--data", node / "hospital.npz",
            "--invitation", node / "invitation.json", "--store", node / "vault",
        )  # fmt: skip
    released = release_again(node)
    (ledger,) = json.loads(call("ledger", node / "vault", "--json"))
    return {"node": {"ledger": ledger, "release": array_digest(released.x_tilde.numpy())}}


def make_toy() -> dict[str, Any]:
    """A run of the Gaussian mixture, without its figures."""
    settings = [part for setting in TOY_SETTINGS for part in ("--set", setting)]
    call("toy", EXPERIMENTS / "gmm.yaml", "--out", "toy", "--jobs", 1, *settings)
    for path in Path("toy").iterdir():
        if path.suffix in (".pdf", ".png"):
            path.unlink()
    rows = json.loads(Path("toy/results.json").read_text())["rows"]
    return {"toy": {"rows": len(rows), "keys": json.loads(call("toy", "--keys", "--json"))}}


def record_cells() -> None:
    """`cells.json`: suite -> profile -> method -> the config that a result of seed 0 holds.

    Reads within `fedpdm`. Where that has moved, the cells that are kept already are kept.
    """
    try:
        from fedpdm.config import load_suite
    except ImportError:
        with tarfile.open(HERE / ARCHIVE) as kept:
            kept.extract("cells.json", filter="data")
        return
    cells: dict[str, Any] = {}
    for name in ("colored-mnist", "cifar10", "celeba"):
        suite = load_suite(EXPERIMENTS / f"{name}.yaml")
        for profile in suite.profiles:
            for method in suite.table:
                config = plain(dataclasses.asdict(suite.compose(profile, method, seed=0)))
                config["data"]["root"] = config["run"]["threads"] = config["run"]["device"] = None
                cells.setdefault(name, {}).setdefault(profile, {})[method] = config
    Path("cells.json").write_text(json.dumps(cells, indent=1))


def make_configs() -> dict[str, Any]:
    """Experiments with every key written out, a result, and all keys with their defaults."""
    record_cells()
    shutil.copy(EXPERIMENTS / "results" / "colored-mnist-cpu" / "ours-seed0.json", "result.json")
    return {
        "keys": json.loads(call("config", "--json")),
        "experiments": {name: resolved(name) for name in RUNS},
    }


def scrub(folder: Path) -> None:
    """Take the place where they were made out of logs; refuse what names it elsewhere."""
    places = [str(folder.resolve()), str(folder), str(HERE.parents[1]), str(Path.home())]
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        if path.name == "log.txt":
            path.write_text(path.read_text().replace(f"{folder}/", ""))
        content = path.read_bytes()
        if found := [place for place in places if place.encode() in content]:
            raise SystemExit(f"{path}: names {found[0]}")


def pack(folder: Path, names: list[str], out: Path) -> None:
    """One archive; its dictionary is as large as all of it, so that equal files count once."""
    largest = {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 28}

    def anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
        entry.uid = entry.gid = entry.mtime = 0
        entry.uname = entry.gname = ""
        return entry

    with (
        lzma.open(out, "wb", filters=[largest]) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for name in names:
            archive.add(folder / name, name, filter=anonymous)


def without_places(expected: Mapping[str, Any]) -> dict[str, Any]:
    """What was seen, without the directories that it was seen in."""
    kept = plain(expected)
    del kept["show"]["run"]
    for ledger in (*kept["ledgers"], kept["node"]["ledger"]):
        del ledger["store"]
    return kept


def make(out: Path) -> None:
    """Write both files into `out`."""
    torch.set_num_threads(1)
    for name in ("FEDPDM_DATA", "FEDPDM_RUNS"):
        os.environ.pop(name, None)
    with tempfile.TemporaryDirectory() as place, contextlib.chdir(place):
        expected = {"machine": machine(), **make_runs(), **make_node(), **make_toy()}
        expected |= make_configs()
        for name in ("certificates", "state"):
            shutil.rmtree(name)
        Path("node/clinic.yaml").unlink()
        names = sorted(path.name for path in Path(place).iterdir())
        names = [name for name in names if not name.endswith(".yaml")]
        scrub(Path(place))
        pack(Path(place), names, out / ARCHIVE)
    text = json.dumps(without_places(expected), indent=1, sort_keys=True)
    (out / EXPECTED).write_text(text + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--interrupt"]:
        sys.stdout = Fuse()
        call_it = ["run", sys.argv[2], "--engine", "inprocess", "--out", sys.argv[3]]
        sys.exit(main(call_it))
    make(Path(sys.argv[1]).resolve() if sys.argv[1:] else HERE)
