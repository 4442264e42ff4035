"""`fedpdm run --releases` and `fedpdm ledger`: one release for many runs, told and refused."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from clients.local import open_local_client
from clients.pfdm_client import PFDMClient
from fedpdm import wire
from fedpdm.config import config_to_yaml
from fedpdm.privacy.ledger import read_ledger
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.setup.build import build_denoiser
from tests.privacy.test_ledger import bodies_of, forge
from tests.support.command_line import call, forget_surroundings, in_process
from tests.support.federations import flat, node, small_config
from tests.support.refusals import Refuser, tree
from tests.support.release_toys import DELTA, edit, epsilon_of, multiplier

CONFIG = small_config(
    run={"rounds": 1},
    data={"max_images": 40},
    partition={"kind": "iid", "num_clients": 1},
    coarse={"steps_per_round": 1},
    fine={"steps_per_round": 1},
    sampling={"num_steps": 2},
    evaluation={"image_metrics": False},
)
RELEASE = "0/releases/000001.safetensors"


def paid(*t0s: int) -> float:
    """Epsilon of an image that was released at these t0, by arithmetic of the tests' own."""
    return epsilon_of([multiplier(t0=t0, clip_norm=8.0) for t0 in t0s])


@pytest.fixture(scope="module")
def first_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an experiment, its run `first` and the shared releases `shared`."""
    folder = tmp_path_factory.mktemp("releases")
    (folder / "small.yaml").write_text(config_to_yaml(CONFIG))
    flags = ("--out", folder / "first", "--releases", folder / "shared")
    assert in_process(folder / "small.yaml", *flags) == 0
    return folder


@pytest.fixture
def folder(first_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it to work in."""
    forget_surroundings(monkeypatch, tmp_path)
    shutil.copytree(first_run, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture
def refuser(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Refuser:
    made = Refuser(folder, capsys, monkeypatch)
    made.experiment = folder / "small.yaml"
    return made


def run(folder: Path, name: str, *settings: str, flags: tuple[str, ...] = ()) -> dict[str, Any]:
    """The statement of one more run on the shared releases."""
    sets = [word for setting in settings for word in ("--set", setting)]
    out = folder / name
    shared = ("--releases", folder / "shared")
    assert in_process(folder / "small.yaml", "--out", out, *shared, *sets, *flags) == 0
    statement: dict[str, Any] = json.loads((out / "privacy.json").read_text())
    return statement


# --- One release for many runs --------------------------------------------------------------


@pytest.mark.slow
def test_the_first_run_releases(folder: Path) -> None:
    statement = json.loads((folder / "first" / "privacy.json").read_text())
    once = paid(statement["t0"])
    assert 9.5 < once < 10
    assert statement["epsilon"] == pytest.approx(once, rel=1e-6)
    assert statement["epsilon_distribution"] == [[pytest.approx(once, rel=1e-6), 40]]
    ledger = read_ledger(folder / "shared" / "0" / "ledger.jsonl")
    assert [record.kind for record in ledger.records] == ["opened", "release"]
    assert statement["ledger_heads"] == {"0": ledger.head}
    client = json.loads((folder / "first" / "clients" / "0" / "privacy.json").read_text())
    assert client["epsilon"] == statement["epsilon"]
    assert not [*(folder / "first").rglob("0*.safetensors")]  # it is in the shared place alone


@pytest.mark.slow
def test_a_run_with_other_training_and_seed_does_not_release(folder: Path) -> None:
    """An image is known by its pixels, and a release by its settings."""
    before = tree(folder / "shared")
    first = json.loads((folder / "first" / "privacy.json").read_text())
    second = run(folder, "second", "run.seed=99", "coarse.lr=0.003", "fine.lr=0.002")
    assert tree(folder / "shared") == before
    for seal in ("file_sha256", "file_label"):  # of another run
        assert first.pop(seal) != second.pop(seal)
    assert second == first


@pytest.mark.slow
def test_the_seed_gives_other_noise_where_nothing_is_released(folder: Path) -> None:
    """So the test above could fail."""
    before = (folder / "shared" / RELEASE).read_bytes()
    shutil.rmtree(folder / "shared")
    run(folder, "second", "run.seed=99")
    assert (folder / "shared" / RELEASE).read_bytes() != before


@pytest.mark.slow
def test_another_split_noises_only_what_a_client_has_not_had(folder: Path) -> None:
    """A seed also deals the images: what is new to a client is added to what it has released."""
    shutil.rmtree(folder / "shared")
    run(folder, "a", "partition.num_clients=2")
    names = ("0/releases/000001.safetensors", "1/releases/000001.safetensors")
    before = tree(folder / "shared")
    statement = run(folder, "b", "partition.num_clients=2", "run.seed=5")
    after = tree(folder / "shared")
    assert {name: after[name] for name in names} == {name: before[name] for name in names}
    held = 0
    for client in ("0", "1"):
        store = ReleaseStore(folder / "shared" / client)
        first, second = store.ledger().releases()
        assert 0 < second.images < first.images
        assert store.spent(delta=DELTA).images == first.images + second.images
        held += first.images + second.images
    once = paid(statement["t0"])
    assert statement["epsilon_distribution"] == [[pytest.approx(once, rel=1e-6), held]]
    assert statement["releases_per_image"] == 1


# --- Another release ------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting", ["privacy.epsilon=5", "privacy.clip_norm=7.5", "schedule.num_steps=900"]
)
def test_other_settings_are_refused_with_their_cost(refuser: Refuser, setting: str) -> None:
    for flags in ((), ("--dry-run",)):
        line = refuser.run_line(setting, flags=("--releases", "shared", *flags))
        assert "40 of 40 images were released before with " in line
        assert "restore the old setting, or allow it (--allow-new-release)" in line
        cost = re.search(r"epsilon from (\S+) to (\S+) at delta 1e-05", line)
        assert cost
        first = json.loads((refuser.folder / "first" / "privacy.json").read_text())["t0"]
        assert cost[1] == f"{paid(first):.4g}"
        assert float(cost[2]) > 10.5
        if setting == "privacy.epsilon=5":
            now = re.search(r"t0 = (\d+) \(now (\d+)\)", line)
            assert now
            assert int(now[1]) == first
            assert cost[2] == f"{paid(first, int(now[2])):.4g}"
    assert not refuser.out.exists()


@pytest.mark.slow
def test_they_are_told_up_front_where_they_are_allowed(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(folder / "shared")
    settings = ("privacy.epsilon=5",)
    flags = ("--allow-new-release",)
    sets = ("--set", settings[0], "--releases", folder / "shared", *flags)
    assert in_process(folder / "small.yaml", "--out", folder / "dry", *sets, "--dry-run") == 0
    told = capsys.readouterr().out
    assert tree(folder / "shared") == before
    statement = run(folder, "second", *settings, flags=flags)
    first = json.loads((folder / "first" / "privacy.json").read_text())["t0"]
    once, twice = paid(first), paid(first, statement["t0"])
    announced = (
        f"NEW RELEASE of 40 released images: epsilon of an image goes up to {twice:.4g} "
        f"(from {once:.4g}) at delta 1e-05\n"
    )
    assert told.endswith(announced)
    printed = capsys.readouterr().out
    assert announced in printed
    assert printed.index(announced) < printed.index("round 1/1")
    assert statement["epsilon"] == pytest.approx(twice, rel=1e-6)
    assert statement["epsilon_of_this_release"] == pytest.approx(paid(statement["t0"]), rel=1e-6)
    assert statement["epsilon_distribution"] == [[pytest.approx(twice, rel=1e-6), 40]]
    assert statement["releases_per_image"] == 2
    assert f"each image is ({twice:.4g}, 1e-05)-locally" in printed
    assert f"epsilon = {twice:.4g} at delta" in (folder / "second" / "privacy.txt").read_text()
    client = json.loads((folder / "second" / "clients" / "0" / "privacy.json").read_text())
    assert client["epsilon"] == statement["epsilon"]
    after = tree(folder / "shared")
    assert after[RELEASE] == before[RELEASE]
    ledger = ReleaseStore(folder / "shared" / "0").ledger()
    assert [record.images for record in ledger.releases()] == [40, 40]
    old = before["0/ledger.jsonl"]
    assert after["0/ledger.jsonl"].startswith(old[: old.index(b"# end")])
    # Both settings are released now: neither run needs leave.
    assert run(folder, "third")["epsilon"] == statement["epsilon"]
    assert in_process(folder / "small.yaml", "--out", folder / "dry", *sets[:4], "--dry-run") == 0
    assert "NEW RELEASE" not in capsys.readouterr().out
    assert tree(folder / "shared") == after


# --- What is refused ------------------------------------------------------------------------


def cut_ledger(shared: Path) -> None:
    edit(shared / "0" / "ledger.jsonl", lambda data: data[:-40])


def edit_ledger(shared: Path) -> None:
    edit(shared / "0" / "ledger.jsonl", lambda data: data.replace(b'epsilon": 9', b'epsilon": 1'))


def lose_ledger(shared: Path) -> None:
    (shared / "0" / "ledger.jsonl").unlink()


def edit_release(shared: Path) -> None:
    edit(shared / RELEASE, lambda data: data[:-1] + bytes([data[-1] ^ 1]))


def lose_release(shared: Path) -> None:
    (shared / RELEASE).unlink()


def other_client(shared: Path) -> None:
    bodies = bodies_of((shared / "0" / "ledger.jsonl").read_bytes())
    bodies[0]["client_id"] = 7
    edit(shared / "0" / "ledger.jsonl", lambda _: forge(bodies))


DAMAGES = {
    cut_ledger: "ledger.jsonl: ledger was cut",
    edit_ledger: "ledger.jsonl: line 3: record was edited",
    lose_ledger: "000001.safetensors: is not in the ledger",
    edit_release: "000001.safetensors: is not the file that the ledger records",
    lose_release: "000001.safetensors: is gone; its 40 images were released",
    other_client: "is the store of client 7, not of client 0",
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_store_is_refused(refuser: Refuser, damage: Any) -> None:
    shared = refuser.folder / "shared"
    damage(shared)
    assert DAMAGES[damage] in refuser.run_line(flags=("--releases", "shared"))
    if damage is not other_client and damage is not lose_ledger:
        assert DAMAGES[damage] in refuser.line("ledger", shared)
    assert not refuser.out.exists()


@pytest.mark.slow
def test_another_resolution_is_refused(refuser: Refuser) -> None:
    """They are the images that were released, whatever is made of them now."""
    line = refuser.run_line("data.resolution=16", flags=("--releases", "shared"))
    changed = "data.resolution = None (now 16), shape = 3x8x8 (now 3x16x16)"
    words = rf"shared/0: (\d+) of \1 images were released before with {re.escape(changed)};"
    assert re.search(words, line)
    assert "takes their epsilon from 9.956 to 15.39" in line


@pytest.mark.slow
def test_places_for_releases_that_cannot_be_written(
    refuser: Refuser, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = refuser.run_line(flags=("--releases", "small.yaml"))
    assert re.search(r"small\.yaml: cannot be made, .*small\.yaml is not a directory", line)
    may = os.access
    shared = refuser.folder / "shared"
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != shared and may(path, mode))
    line = refuser.run_line(flags=("--releases", "shared"))
    assert f"shared: cannot be written, no permission in {shared}" in line


# --- Between two rounds ---------------------------------------------------------------------


@pytest.mark.slow
def test_a_client_whose_ledger_is_gone_does_not_release_again(tmp_path: Path) -> None:
    """Although nothing else would say that its images were released before."""
    config = small_config(data={"max_images": 40}, partition={"num_clients": 2})

    def answer(round: int) -> dict[str, Any]:
        local = open_local_client(node(config, 0), flat(config, tmp_path), 0)
        client = PFDMClient(local)
        model = build_denoiser(local.setup, "coarse")
        weights = {name: p.detach() for name, p in model.network.named_parameters()}
        asked = {"round": round, "phase": "coarse"}
        return client.fit(wire.encode_model(weights), asked)[2]

    store = tmp_path / "clients" / "0"
    assert "error" not in answer(1)
    kept = tmp_path / "kept"
    shutil.copytree(store, kept)
    shutil.rmtree(store / "releases")
    (store / "ledger.jsonl").unlink()
    before = tree(store / "rounds")
    told = answer(2)
    assert "is not the ledger that earlier rounds were answered with" in told["error"]
    assert not (store / "releases").exists()
    assert tree(store / "rounds") == before
    shutil.copytree(kept, store, dirs_exist_ok=True)
    assert "error" not in answer(2)
    assert len(ReleaseStore(store).ledger().releases()) == 1


# --- `fedpdm ledger` ------------------------------------------------------------------------


@pytest.mark.slow
def test_the_ledger_is_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = json.loads((folder / "first" / "privacy.json").read_text())
    run(folder, "second", "privacy.epsilon=5", flags=("--allow-new-release",))
    second = json.loads((folder / "second" / "privacy.json").read_text())
    before = tree(folder / "shared")
    capsys.readouterr()
    assert call("ledger", folder / "shared") == 0
    words = capsys.readouterr().out
    twice = paid(first["t0"], second["t0"])
    assert f"3 records and 2 release files check out; head {second['ledger_heads']['0']}" in words
    assert f"epsilon {twice:.4g} at most" in words
    assert words.count("40 images of 3x8x8") == 2
    assert "SIMULATION" in words
    assert call("ledger", folder / "shared" / "0", "--json", "--delta", "1e-3") == 0
    (told,) = json.loads(capsys.readouterr().out)
    multipliers = [multiplier(t0=t0, clip_norm=8.0) for t0 in (first["t0"], second["t0"])]
    assert told["epsilon_max"] == pytest.approx(epsilon_of(multipliers, delta=1e-3), rel=1e-6)
    assert told["epsilon_distribution"] == [{"epsilon": told["epsilon_max"], "images": 40}]
    assert told["images"] == 40
    assert [record["kind"] for record in told["records"]] == ["opened", "release", "release"]
    for head in (first["ledger_heads"]["0"], second["ledger_heads"]["0"]):
        assert call("ledger", folder / "shared", "--head", head) == 0
    capsys.readouterr()
    assert call("ledger", folder / "shared", "--head", "ab" * 32) == 2
    assert "is not the ledger that earlier rounds were answered with" in capsys.readouterr().err
    assert tree(folder / "shared") == before


@pytest.mark.slow
def test_a_ledger_that_is_not_there(refuser: Refuser) -> None:
    for place in ("first/server", "small.yaml", "nowhere"):
        line = refuser.line("ledger", refuser.folder / place)
        assert re.search("holds no ledger.jsonl|is not a directory", line)
