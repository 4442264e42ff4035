"""Files notice that they were changed or have changed places, and what killed processes left."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from fedpdm.storage.client_store import ClientStore
from fedpdm.storage.files import (
    SEAL,
    StoreError,
    clear_leftovers,
    read_json,
    read_sealed_text,
    read_tensors,
    write_json,
    write_sealed_text,
    write_tensors,
)
from fedpdm.storage.run_directory import RunDirectory
from fedpdm.storage.tensorfile import pack
from tests.storage.test_files import FINE
from tests.storage.test_store import make_reply
from tests.support.disk_faults import files
from tests.support.federations import small_config

RECORD = {"epsilon": 9.956, "t0": 642, "names": ["a", "b"], "nested": {"none": None}}
KINDS: dict[str, tuple[Callable[[Path], None], Callable[[Path], Any]]] = {
    "tensors": (
        lambda path: write_tensors(path, FINE, {"round": "3"}, {"client": "1"}),
        lambda path: _plain(*read_tensors(path, {"client": "1"})),
    ),
    "json": (
        lambda path: write_json(path, RECORD, {"client": "1"}),
        lambda path: [read_json(path, {"client": "1"})[name] for name in RECORD],
    ),
    "text": (
        lambda path: write_sealed_text(path, "a: 1\nb: 2\n"),
        lambda path: read_sealed_text(path).split(b"\n")[:2],
    ),
}


def _plain(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> Any:
    values = {name: (str(t.dtype), t.tolist()) for name, t in tensors.items()}
    return values, {name: v for name, v in metadata.items() if name in ("round", "chunk")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_no_bit_can_change_what_is_read(tmp_path: Path, kind: str) -> None:
    """Either the file is refused, by name and in one line, or what it says is what was written."""
    write, read = KINDS[kind]
    path = tmp_path / "file"
    write(path)
    data, wanted = path.read_bytes(), read(path)
    refused = []
    for at in range(len(data)):
        for bit in (1, 16):
            changed = bytearray(data)
            changed[at] ^= bit
            path.write_bytes(changed)
            try:
                assert read(path) == wanted, at
            except StoreError as error:
                refused.append(str(error))
    assert all(line.startswith(f"{path}: ") and "\n" not in line for line in refused)
    # What may pass: blanks, and the name of the digest's entry (all else is as it was).
    assert len(refused) > (2 * len(data)) * (0.6 if kind == "json" else 0.8)


@pytest.mark.slow
def test_no_byte_of_samples_can_change_what_is_drawn(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    arrays = {"labels": np.arange(3), "pfdm": np.arange(12, dtype=np.uint8).reshape(3, 1, 2, 2)}
    store.save_samples(arrays)
    path = tmp_path / "samples.npz"
    data, refused = path.read_bytes(), []
    for at in range(len(data)):
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        try:
            found = store.load_samples()
            assert found is not None
            assert all(np.array_equal(found[name], arrays[name]) for name in arrays), at
        except StoreError as error:
            refused.append(str(error))
    assert all(line.startswith(f"{path}: ") and "\n" not in line for line in refused)
    assert len(refused) > len(data) / 2


def test_files_of_earlier_versions_are_read_unchecked(tmp_path: Path) -> None:
    (tmp_path / "old.safetensors").write_bytes(pack(FINE, {"round": "3"}))
    tensors, metadata = read_tensors(tmp_path / "old.safetensors", {"client": "1"})
    assert metadata == {"round": "3"}
    assert torch.equal(tensors["model.w"], FINE["model.w"])
    (tmp_path / "old.json").write_text(json.dumps(RECORD))
    assert read_json(tmp_path / "old.json", {"client": "1"}) == RECORD
    (tmp_path / "old.yaml").write_text("a: 1\n")
    assert read_sealed_text(tmp_path / "old.yaml") == b"a: 1\n"
    (tmp_path / "classes.json").write_text("[3, 0, 2]\n")
    counts = ClientStore(tmp_path, {"client": "1"}).load_class_counts()
    assert counts is not None
    assert counts.tolist() == [3, 0, 2]


def test_seals_are_seen_by_others_as_plain_entries(tmp_path: Path) -> None:
    """A sealed file is still what its name says, and a seal says nothing of what is in it."""
    write_tensors(tmp_path / "a", FINE, {"round": "3"})
    assert torch.equal(safetensors.torch.load_file(tmp_path / "a")["model.w"], FINE["model.w"])
    write_tensors(tmp_path / "b", FINE, {"round": "3"})
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    write_json(tmp_path / "c", {**RECORD, SEAL: "of something else"})
    assert read_json(tmp_path / "c") == RECORD
    own = json.loads((tmp_path / "c").read_text())
    assert own.keys() == {*RECORD, SEAL}


def test_a_file_just_written_is_not_read_to_be_checked(tmp_path: Path) -> None:
    path = tmp_path / "t"
    write_tensors(path, FINE)
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")
    assert read_tensors(path, check=False)[0].keys() == FINE.keys()
    with pytest.raises(StoreError, match="is not as it was written: its SHA-256 is another"):
        read_tensors(path)


# --- Files that have changed places ---------------------------------------------------------


def _filled(root: Path, client: str, config: str = "c0") -> ClientStore:
    """A store with two rounds, a checkpoint inside the third, and the small records."""
    store = ClientStore(root, {"client": client, "config": config})
    for round in (1, 2):
        store.begin_round(round)
        weights = {"model.w": torch.full((2, 3), float(f"{client}{round}"))}
        for name in ("coarse", "fine"):
            store.draft_state(round, name, weights)
        store.finish_round(make_reply(round, f"update {client} {round}".encode()))
    store.save_partial(3, 1, FINE)
    store.save_class_counts(np.array([1, 2]))
    store.save_statement({"epsilon": 9.0}, "words")
    return store


SWAPS = {
    "another client's model": ("b/rounds/000002/fine.safetensors", "rounds/000002"),
    "another client's moments": ("b/rounds/000002/coarse.safetensors", "rounds/000002"),
    "another client's reply": ("b/rounds/000002/reply.json", "rounds/000002"),
    "another client's update": ("b/rounds/000002/reply.safetensors", "rounds/000002"),
    "another client's round": ("b/rounds/000002", ""),
    "an earlier round's model": ("a/rounds/000001/fine.safetensors", "rounds/000002"),
    "an earlier round's reply": ("a/rounds/000001/reply.json", "rounds/000002"),
    "another client's part of a round": ("b/partial/fine.safetensors", "partial"),
    "a part of a round as its end": ("a/partial/fine.safetensors", "rounds/000002"),
    "another client's classes": ("b/classes.json", ""),
    "another client's statement": ("b/privacy.json", ""),
    "another run's model": ("c/rounds/000002/fine.safetensors", "rounds/000002"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", SWAPS)
def test_a_file_in_another_s_place_is_refused(tmp_path: Path, name: str) -> None:
    store = _filled(tmp_path / "a", "1")
    _filled(tmp_path / "b", "2")
    _filled(tmp_path / "c", "1", config="c1")
    store.check()
    source, folder = SWAPS[name]
    target = tmp_path / "a" / (folder or ("rounds" if name.endswith("round") else ""))
    if (tmp_path / source).is_dir():
        shutil.rmtree(target / "000002")
        shutil.copytree(tmp_path / source, target / "000002")
    else:
        shutil.copy(tmp_path / source, target)
    with pytest.raises(StoreError, match=r"is the file of |is not what reply\.json") as caught:
        store.check()
    place = target / ("000002" if (tmp_path / source).is_dir() else Path(source).name)
    assert str(caught.value).startswith(str(place))


def test_a_model_in_its_moments_place_is_refused(tmp_path: Path) -> None:
    store = _filled(tmp_path, "1")
    folder = tmp_path / "rounds" / "000002"
    shutil.copy(folder / "fine.safetensors", folder / "coarse.safetensors")
    wanted = "of client 1 config c0 part fine round 2, not of client 1 config c0 part coarse round"
    with pytest.raises(StoreError, match=wanted):
        store.check()


@pytest.mark.parametrize(
    "name", ["coarse.safetensors", "privacy.json", "server/checkpoint.safetensors",
             "server/releases/000001.safetensors"],
)  # fmt: skip
def test_a_run_refuses_another_run_s_files(tmp_path: Path, name: str) -> None:
    runs = []
    for seed in (0, 1):
        run = RunDirectory(tmp_path / str(seed))
        run.open(small_config(run={"seed": seed}), resume=False)
        run.save_checkpoint(1, FINE, {"rounds": []})
        run.save_upload(1, FINE, {})
        run.save_shared(FINE, noise_source="none")
        run.write_json("privacy.json", {"epsilon": 9.0})
        runs.append(run)

    def read() -> None:
        run = RunDirectory(tmp_path / "0")
        run.check(small_config(run={"seed": 0}), resume=True)
        run.load_shared()
        run.read_json("privacy.json")

    read()
    shutil.copy(runs[1].root / name, runs[0].root / name)
    with pytest.raises(StoreError, match=r"is the file of config .* restore it$") as caught:
        read()
    assert str(caught.value).startswith(str(runs[0].root / name))


def test_a_config_that_was_edited_is_refused_unless_its_seal_goes_too(tmp_path: Path) -> None:
    run, config = RunDirectory(tmp_path), small_config()
    run.open(config, resume=False)
    path = tmp_path / "config.yaml"
    path.write_text(path.read_text().replace("lr: 0.002", "lr: 0.003", 1))
    assert "lr: 0.003" in path.read_text()
    with pytest.raises(StoreError, match=r"config\.yaml: .*; if the change is meant, remove its l"):
        run.config()
    path.write_text("\n".join(path.read_text().splitlines()[:-1]) + "\n")
    assert run.config() != config


# --- What killed processes leave ------------------------------------------------------------


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


@pytest.fixture
def living() -> Iterator[int]:
    """The number of another process that goes on."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    yield process.pid
    process.communicate()


def test_leftovers_of_ended_processes_go_and_all_else_stays(
    tmp_path: Path, dead: int, living: int
) -> None:
    gone = {f".a.json.{dead}.tmp", f".a.json.{os.getpid()}.tmp", f".b.{dead}.tmp"}
    stay = {f".a.json.{living}.tmp", ".a.json.tmp", ".000007.tmp", f"a.{dead}.tmp", "a.json"}
    for name in gone | stay:
        (tmp_path / name).touch()
    (tmp_path / f".folder.{dead}.tmp" / "deep").mkdir(parents=True)
    clear_leftovers(tmp_path, of="a.json")
    assert files(tmp_path) == stay | {f".b.{dead}.tmp"}
    clear_leftovers(tmp_path)
    assert files(tmp_path) == stay
    assert not (tmp_path / f".folder.{dead}.tmp").exists()
    clear_leftovers(tmp_path / "nowhere")


def test_who_holds_a_store_s_lock_cleans_up(tmp_path: Path, dead: int) -> None:
    store = ClientStore(tmp_path)
    with store.lock():
        store.save_class_counts(np.array([1]))
        store.save_partial(1, 1, FINE)
    kept = files(tmp_path)
    for name in (f".classes.json.{dead}.tmp", f"partial/.fine.safetensors.{dead}.tmp"):
        (tmp_path / name).touch()
    with store.lock():
        assert files(tmp_path) == kept


def test_a_run_killed_before_its_first_file_can_start_again(tmp_path: Path, dead: int) -> None:
    run, config = RunDirectory(tmp_path / "run"), small_config()
    run.root.mkdir()
    (run.root / f".config.yaml.{dead}.tmp").touch()
    run.check(config, resume=False)
    run.open(config, resume=False)
    for name in (f".partition.txt.{dead}.tmp", f"server/.checkpoint.safetensors.{dead}.tmp"):
        (run.root / name).parent.mkdir(exist_ok=True)
        (run.root / name).touch()
    with contextlib.suppress(StoreError):
        run.open(config, resume=True)
    assert files(run.root) == {"config.yaml"}
