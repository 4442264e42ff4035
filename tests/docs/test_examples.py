"""The examples, run as their readers run them; those that train long take few steps here."""

from __future__ import annotations

import ast
import json
import runpy
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

import fedpdm
from fedpdm import wire
from fedpdm.privacy.ledger import read_ledger
from fedpdm.setup.build import build_denoiser
from fedpdm.setup.run_setup import set_up
from fedpdm.storage.client_store import ClientStore
from tests.support.apart import run_apart
from tests.support.markdown_pages import ROOT
from tests.support.oracles import GaussianPosterior

EXAMPLES = ROOT / "examples"
NOTEBOOK = EXAMPLES / "quickstart.ipynb"


# What makes examples quick: text of theirs, and what stands in its place here.
FEW = '"image_metrics": False}, sampling={"num_steps": 2, "per_class": 1}'
QUICK: dict[str, dict[str, str]] = {
    "quickstart.py": {"num_steps=100)": "num_steps=2)", "num_steps=200)": "num_steps=2)"},
    "quickstart.ipynb": {"num_steps=60)": "num_steps=2)", "num_steps=200)": "num_steps=2)"},
    "own_denoiser.py": {"num_steps=200)": "num_steps=2)"},
    "own_mechanism.py": {'"image_metrics": False}': FEW},
    "own_model.py": {'"image_metrics": False}': FEW},
    "gaussian_classifier.py": {"num_steps=500": "num_steps=200",
                               "sampling={": 'sampling={"num_steps": 2, "per_class": 1, '},
    "custom_strategy.py": {"evaluation=quick": 'evaluation=quick, sampling={"num_steps": 2}',
                           ": 10}": ": 2}"},
}  # fmt: skip


def quick_text(name: str) -> str:
    """An example's text with `QUICK` settings; the rest of it is as its readers have it."""
    text = (EXAMPLES / name).read_text()
    for old, new in QUICK.get(name, {}).items():
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def run_example(folder: Path, name: str, *arguments: str) -> str:
    """What an example prints; it runs in `folder`, on one core."""
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = folder / name
    script.write_text(quick_text(name))
    done = run_apart(script, *arguments, directory=folder, environment=environment)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


def test_the_quickstart_is_short() -> None:
    source = (EXAMPLES / "quickstart.py").read_text()
    assert len(source.splitlines()) <= 60
    names = {node.attr for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Attribute)}
    for name in ("calibrate", "release", "account", "train_coarse", "train_fine", "sample"):
        assert name in names
    assert {"attack_uploads", "attack_model"} <= names


@pytest.mark.slow
def test_quickstart(tmp_path: Path) -> None:
    lines = run_example(tmp_path, "quickstart.py", "made").splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "client 0",
        "client 1",
        "epsilon 9.950 at t0 = 567, noise 5.02 per pixel",
        "client 0's ledger",
        "linkage of uploads",
        "membership, coarse model",
        "membership, fine model",
    ]
    assert lines[3] == "client 0's ledger: epsilon 9.950 per image"
    with Image.open(tmp_path / "made" / "samples.png") as picture:
        assert picture.width > 500
    records = read_ledger(tmp_path / "made" / "clients" / "1" / "ledger.jsonl").records
    assert [record.kind for record in records] == ["opened", "release"]


def test_the_notebook_is_committed_without_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text())
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 8
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert str(Path.home()) not in NOTEBOOK.read_text()


@pytest.mark.slow
def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Jupyter's own
        import nbformat
        from nbclient import NotebookClient

        notebook = nbformat.reads(quick_text(NOTEBOOK.name), as_version=4)
        NotebookClient(
            notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
        ).execute()
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert not [out for out in outputs if out.output_type == "error"]
    pictures = [out for out in outputs if "image/png" in out.get("data", {})]
    assert len(pictures) == 2
    printed = "".join(out.text for out in outputs if out.output_type == "stream")
    assert "t0 = 567" in printed
    assert "client 0's ledger: epsilon 9.950 per image" in printed
    assert (tmp_path / "quickstart" / "clients" / "0" / "ledger.jsonl").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_bring_your_own_images(tmp_path: Path) -> None:
    """From PNGs of two classes and several sizes to a pipeline that diffusers loads."""
    rng = np.random.default_rng(0)
    for kind, level in (("dark", 40), ("light", 200)):
        (tmp_path / "images" / kind).mkdir(parents=True)
        for number in range(20):
            size = (12 + number % 3, 12, 3)
            pixels = rng.integers(level - 30, level + 30, size).astype(np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / kind / f"{number}.png")
    options = ["--resolution", "8", "--rounds", "1", "--steps", "2", "--preset", "nano"]
    printed = run_example(
        tmp_path, "bring_your_own_images.py", "images", "out", *options, "--epsilon", "20"
    )
    assert "load it with diffusers" in printed
    folder = tmp_path / "out" / "pipeline"
    pipeline = DiffusionPipeline.from_pretrained(
        str(folder), custom_pipeline=str(folder), trust_remote_code=True
    )
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline.config["id2label"] == {"0": "dark", "1": "light"}
    assert pipeline([0, 1], num_inference_steps=2).images[0].size == (8, 8)
    assert (tmp_path / "out" / "samples.png").exists()
    statement = json.loads((folder / "privacy.json").read_text())
    assert 19 < statement["epsilon"] <= 20


@pytest.mark.slow
def test_a_mechanism_of_ones_own(tmp_path: Path) -> None:
    """The example is short, is what the page shows, and releases what it says."""
    source = (EXAMPLES / "own_mechanism.py").read_text()
    assert len(source.splitlines()) <= 40
    assert source in (ROOT / "docs" / "extending.md").read_text()
    words, epsilon = run_example(tmp_path, "own_mechanism.py", "made").splitlines()[-2:]
    assert words.startswith("Images are first averaged over blocks of 2x2. Of each image its label")
    assert epsilon == "epsilon 9.969 per image, by the ledger"  # as without blocks
    lines = (tmp_path / "made" / "clients" / "1" / "ledger.jsonl").read_text().splitlines()
    assert json.loads(lines[2])["mechanism"] == "block_means"


DOORS = ("custom_strategy.py", "own_data_set.py", "own_denoiser.py", "own_model.py")


@pytest.mark.parametrize("name", DOORS)
def test_an_example_of_ones_own_code_is_short_and_on_its_page(name: str) -> None:
    source = (EXAMPLES / name).read_text()
    assert len(source.splitlines()) <= 40
    assert source in (ROOT / "docs" / "extending.md").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["own_data_set.py", "own_model.py"])
def test_code_of_ones_own_runs_by_name(tmp_path: Path, name: str) -> None:
    printed = run_example(tmp_path, name, "made")
    assert 0 < float(printed.splitlines()[-1].removeprefix("held-out loss ")) < 3
    config = (tmp_path / "made" / "config.yaml").read_text()
    assert f" {name.removesuffix('.py')}:" in config


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
def test_a_denoiser_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The closed form is exact, the fine model takes over at its level, and a picture is drawn."""
    monkeypatch.setattr(sys, "argv", ["own_denoiser.py", str(tmp_path / "drawn.png")])
    script = tmp_path / "own_denoiser.py"
    script.write_text(quick_text(script.name))
    example = runpy.run_path(str(script))
    with Image.open(tmp_path / "drawn.png") as picture:
        assert picture.width > 500
    x_t = torch.randn((3, 1, 8, 8), generator=torch.Generator().manual_seed(4))
    labels, flag = torch.tensor([7, 0, 7]), torch.zeros(3, dtype=torch.bool)
    cov = np.cov((example["x_0"] - example["means"][example["classes"]]).numpy().T)
    levels = torch.tensor([900, 301, 500])
    with torch.no_grad():
        for label in (7, 0):
            mean = example["x_0"][example["classes"] == label].mean(0)
            exact = GaussianPosterior(example["schedule"].alphas_cumprod, mean, cov)
            rows, given = labels == label, {"labels": labels[labels == label]}
            expected = exact(x_t[rows], levels[rows], **given)
            assert torch.allclose(example["gaussians"](x_t[rows], levels[rows], **given), expected,
                                  atol=1e-3)  # fmt: skip
        both, level = example["both"], torch.full((3,), 300)
        assert torch.equal(both(x_t, level + 1, labels=labels),
                           example["gaussians"](x_t, level + 1, labels=labels))  # fmt: skip
        fine = example["fine"](x_t, level, labels=torch.full((3,), -1), clipped=flag)
        assert torch.equal(both(x_t, level, labels=labels), fine)
        assert not torch.allclose(fine, example["gaussians"](x_t, level, labels=labels), atol=0.05)


@pytest.mark.slow
def test_gaussians_help_a_clients_own_classifier(tmp_path: Path) -> None:
    """With a few images of each minority class, what all clients released adds to its own."""
    source = (EXAMPLES / "gaussian_classifier.py").read_text()
    assert len(source.splitlines()) <= 40
    assert "alone + 0.75 * gaussians" in source  # as docs/method.md says
    lines = run_example(tmp_path, "gaussian_classifier.py", "made").splitlines()[-3:]
    shares = {name: float(share) for name, share in (one.split(": right in ") for one in lines)}
    assert shares.keys() == {"own", "Gaussians", "together"}
    assert shares["together"] > max(shares["own"], 0.8)


@pytest.mark.slow
def test_custom_strategy(tmp_path: Path) -> None:
    printed = run_example(tmp_path, "custom_strategy.py", "made")
    assert printed.count("clients disagree by") == 3


@pytest.mark.slow
def test_the_custom_strategy_does_what_it_says(tmp_path: Path) -> None:
    """One round on real clients of unequal size: new = old + share (mean - old), unweighted."""
    example = runpy.run_path(str(EXAMPLES / "custom_strategy.py"))
    small = {"preset": "nano", "steps_per_round": 2, "warmup_steps": 1}
    config = fedpdm.configure(
        name="alike",
        run={"rounds": 1},
        data={"max_images": 200},
        partition={"kind": "dirichlet", "num_clients": 3, "alpha": 1.0},
        coarse=small,
        fine=small,
        sampling={"num_steps": 2, "per_class": 1},
        evaluation={"image_metrics": False},
    )
    run = fedpdm.run(config, tmp_path / "run", strategy=example["ClientsAlike"])
    setup = set_up(config)
    model = build_denoiser(setup, "coarse")
    before = {name: p.detach() for name, p in model.network.named_parameters()}
    updates = []
    for client in range(3):
        reply = ClientStore(run.client_path(client)).load_reply(1)
        assert reply is not None
        assert reply.payload is not None
        message = [np.frombuffer(reply.payload, dtype=np.uint8).copy()]
        updates.append(wire.decode_update(message, like=before, round=1, who=f"client {client}"))
    counts = [update.num_examples for update in updates]
    assert max(counts) > 1.5 * min(counts)  # so that weighing would show
    saved = run.load_checkpoint()
    assert saved is not None
    squares, apart = 0.0, 0.0
    for name, old in before.items():
        every = np.stack([update.weights[name].numpy() for update in updates]).astype(np.float64)
        expected = old.numpy() + example["SHARE"] * (every.mean(axis=0) - old.numpy())
        got = saved[1][f"weights.{name}"].numpy()
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        weighed = np.average(every, axis=0, weights=counts)
        apart = max(apart, float(np.abs(weighed - every.mean(axis=0)).max()))
        squares += float(every.var(axis=0).sum())
    assert apart > 1e-4
    record = saved[2]["rounds"][0]
    assert record["disagreement"] == pytest.approx(squares**0.5, rel=1e-4)
