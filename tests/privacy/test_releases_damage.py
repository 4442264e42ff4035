"""Release files and ledgers that were edited, swapped, cut or lost are refused, not repaired."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fedpdm.privacy.ledger import append, read_ledger, release_fields
from fedpdm.privacy.mechanism import ImageMechanism, SystemNoise
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.storage.files import StoreError, read_tensors
from fedpdm.storage.tensorfile import write_file
from tests.support.refusals import tree
from tests.support.release_toys import DELTA, edit, image_set, request

IMAGES = image_set(12)
FIRST = "releases/000001.safetensors"


@pytest.fixture
def store(tmp_path: Path) -> ReleaseStore:
    return ReleaseStore(tmp_path / "client")


def cut(root: Path) -> None:
    edit(root / FIRST, lambda data: data[:-1])


def change_a_bit(root: Path) -> None:
    edit(root / FIRST, lambda data: data[:-100] + bytes([data[-100] ^ 1]) + data[-99:])


def change_a_digest(root: Path) -> None:
    edit(root / FIRST, lambda data: data.replace(bytes(IMAGES.image_digests()[2]), bytes(32)))


def empty(root: Path) -> None:
    edit(root / FIRST, lambda _: b"")


def swap(root: Path) -> None:
    shutil.copy(root / FIRST, root / "other")
    os.replace(root / "releases" / "000002.safetensors", root / FIRST)
    os.replace(root / "other", root / "releases" / "000002.safetensors")


def lose(root: Path) -> None:
    (root / FIRST).unlink()


def lose_all(root: Path) -> None:
    shutil.rmtree(root / "releases")


def a_directory(root: Path) -> None:
    lose(root)
    (root / FIRST).mkdir()


def one_more(root: Path) -> None:
    shutil.copy(root / FIRST, root / "releases" / "000003.safetensors")


def lose_the_ledger(root: Path) -> None:
    (root / "ledger.jsonl").unlink()


def lose_the_last_record(root: Path) -> None:
    """And work out a right ending: the ledger of an older backup."""
    ledger = read_ledger(root / "ledger.jsonl")
    (root / "ledger.jsonl").unlink()
    older = append(read_ledger(ledger.path), "opened", {"client_id": 3})
    append(older, "release", ledger.records[1].fields)


def another_release_s_record(root: Path) -> None:
    """A ledger that skips the first release."""
    ledger = read_ledger(root / "ledger.jsonl")
    (root / "ledger.jsonl").unlink()
    opened = append(read_ledger(ledger.path), "opened", {"client_id": 3})
    append(opened, "release", ledger.records[2].fields)


def leftover_ready(root: Path) -> None:
    shutil.copy(root / FIRST, root / "releases" / "000007.ready")


def ready_again(root: Path) -> None:
    shutil.copy(root / "releases" / "000002.safetensors", root / "releases" / "000001.ready")


def damaged_ready(root: Path) -> None:
    (root / "releases" / "000003.ready").write_bytes(b"half")


def ready_without_a_ledger(root: Path) -> None:
    lose_the_ledger(root)
    os.replace(root / FIRST, root / "releases" / "000001.ready")
    (root / "releases" / "000002.safetensors").unlink()


def forge(root: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """A ledger whose first release was changed, all checksums right."""
    ledger = read_ledger(root / "ledger.jsonl")
    (root / "ledger.jsonl").unlink()
    forged = append(read_ledger(ledger.path), "opened", {"client_id": 3})
    for release in ledger.releases():
        fields = release_fields(release)
        if release.release == 1:
            change(fields)
        forged = append(forged, "release", fields)


def fewer_images(root: Path) -> None:
    forge(root, lambda fields: fields.update(images=1))


def other_source(root: Path) -> None:
    forge(root, lambda fields: fields.update(seeded=False, noise_source=SystemNoise.description))


def less_spent(root: Path) -> None:
    """The second release's settings, which are cheaper, for the first one."""
    cheaper = release_fields(read_ledger(root / "ledger.jsonl").releases()[1])
    names = ("parameters", "noise_multiplier", "epsilon")
    forge(root, lambda fields: fields.update({name: cheaper[name] for name in names}))


def rewrite(root: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Other values in the first file, and a ledger that knows its checksum."""
    tensors, metadata = read_tensors(root / FIRST)
    tensors = {name: value.clone() for name, value in tensors.items()}
    change(tensors)
    write_file(root / FIRST, tensors, metadata)
    digest = hashlib.sha256((root / FIRST).read_bytes()).hexdigest()
    forge(root, lambda fields: fields.update(sha256=digest))


def smaller_images(root: Path) -> None:
    rewrite(root, lambda tensors: tensors.update(x_tilde=tensors["x_tilde"][..., :-1].clone()))


def one_image_twice(root: Path) -> None:
    rewrite(root, lambda tensors: tensors["digests"][1].copy_(tensors["digests"][0]))


DAMAGES: dict[Callable[[Path], None], str] = {
    cut: r"000001\.safetensors: is not the file that the ledger records; restore it",
    change_a_bit: r"000001\.safetensors: is not the file that the ledger records; restore it",
    change_a_digest: r"000001\.safetensors: is not the file that the ledger records; restore it",
    empty: r"000001\.safetensors: is not the file that the ledger records; restore it",
    swap: r"000001\.safetensors: is not the file that the ledger records; restore it",
    lose: r"000001\.safetensors: is gone; its 12 images were released, and noising them again",
    lose_all: r"000001\.safetensors: is gone; its 12 images were released",
    a_directory: r"000001\.safetensors: cannot be read: Is a directory",
    one_more: r"000003\.safetensors: is not in the ledger, which was cut or replaced",
    lose_the_ledger: r"000001\.safetensors: is not in the ledger, which was cut or replaced",
    lose_the_last_record: r"000002\.safetensors: is not in the ledger, which was cut or replaced",
    another_release_s_record: r"ledger\.jsonl: its releases are not numbered 1, 2",
    leftover_ready: r"000007\.ready: does not follow the ledger's releases",
    ready_again: r"000001\.ready: does not follow the ledger's releases",
    damaged_ready: r"000003\.ready: cannot be read: not a tensor file",
    ready_without_a_ledger: r"000001\.ready: does not follow the ledger's releases",
    fewer_images: r"000001\.safetensors: the ledger says something else of it",
    other_source: r"000001\.safetensors: the ledger says something else of it",
    smaller_images: r"000001\.safetensors: the ledger says something else of it",
    one_image_twice: r"000001\.safetensors: the ledger says something else of it",
    less_spent: r"000001\.safetensors: the ledger says something else of it",
}


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_files_that_were_changed_are_refused(
    store: ReleaseStore, damage: Callable[[Path], None]
) -> None:
    store.obtain(IMAGES, request())
    store.obtain(IMAGES, request(allow=True, t0=700))
    store.spent(delta=DELTA)  # has read and checked it all
    damage(store.root)
    before = tree(store.root)
    more = image_set(20)
    for images, options in ((IMAGES, {}), (more, {}), (IMAGES, {"allow": True, "t0": 720})):
        with pytest.raises(StoreError, match=DAMAGES[damage]) as caught:
            store.obtain(images, request(**options))
        assert "\n" not in str(caught.value)
    assert tree(store.root) == before
    if "ready" in damage.__name__:
        return  # readers wait for a writer to see to it
    for read in (
        lambda: store.spent(delta=DELTA),
        lambda: store.preview(IMAGES, request()),
    ):
        with pytest.raises(StoreError, match=DAMAGES[damage]):
            read()


def test_a_file_that_does_not_say_what_it_cost_is_not_recorded(store: ReleaseStore) -> None:
    """Complete, and left by a crash before the ledger knew it."""
    store.obtain(IMAGES, request())
    tensors, metadata = read_tensors(store.root / FIRST)
    for lost in ("delta", "noise_multiplier"):
        known = {name: value for name, value in metadata.items() if name != lost}
        write_file(store.root / "releases" / "000002.ready", tensors, known)
        before = tree(store.root)
        with pytest.raises(StoreError, match=rf"000002\.ready: .*{lost}") as caught:
            store.obtain(image_set(20), request())
        assert "\n" not in str(caught.value)
        assert tree(store.root) == before


def test_what_cannot_be_put_together_is_one_line(
    store: ReleaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    store.obtain(IMAGES, request())

    def gather(*_: Any) -> Any:
        raise ValueError("rows of two kinds")

    monkeypatch.setattr(ImageMechanism, "gather", gather)
    with pytest.raises(StoreError, match="releases: rows of two kinds"):
        store.obtain(IMAGES, request())


def test_a_reader_beside_a_writer_takes_no_release_for_a_stranger(
    store: ReleaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer records and names a release after the reader has read the ledger."""
    store.obtain(IMAGES, request())
    writer = ReleaseStore(store.root)
    read = read_ledger

    def read_then_write(path: Path) -> Any:
        monkeypatch.undo()
        ledger = read(path)
        writer.obtain(image_set(20), request())
        return ledger

    monkeypatch.setattr("fedpdm.privacy.releases.archive.read_ledger", read_then_write)
    assert len(store.ledger().releases()) == 1
    assert len(store.ledger().releases()) == 2
