"""Images by the config: public ones that no client holds, and the split written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedpdm.config import ConfigError, RunConfig
from fedpdm.data import ImageSet
from fedpdm.data.loading import build_partitions, load_public, load_split, record_partitions
from fedpdm.engines.preflight import check_run
from fedpdm.reporting.run_files import draw_split
from fedpdm.storage.run_directory import RunDirectory
from tests.support.federations import small_config


def config_of(**data: Any) -> RunConfig:
    balanced = data.pop("balanced", False)
    return small_config(data=data, partition={"kind": "iid", "balanced": balanced})


def keys(images: ImageSet) -> list[bytes]:
    return [bytes(digest) for digest in images.image_digests()]


@pytest.mark.parametrize(
    "data",
    [
        {"max_images": 240},
        {"max_images": 241, "balanced": True},
        {"max_images": None, "balanced": True},
        {"max_images": 100, "classes": [3, 1, 8]},
        {"max_images": 700, "coloring": "independent", "class_label": "color"},
    ],
)
def test_public_images_are_exactly_those_that_no_client_holds(data: dict[str, Any]) -> None:
    config = config_of(**data)
    images = load_split(config, "train")
    parts = build_partitions(config, images)
    held = [key for part in parts for key in keys(images.subset(part.indices))]
    public = load_public(config, count=10**6)
    whole = load_split(config_of(**{**data, "max_images": None}), "train")
    assert public.class_names == images.class_names
    assert sorted([*held, *keys(public)]) == sorted(keys(whole))


def test_public_images_keep_the_shares_of_classes_and_are_nested() -> None:
    config = config_of(max_images=240)
    few, more = load_public(config, count=50), load_public(config, count=400)
    assert (len(few), len(more)) == (50, 400)
    assert np.bincount(few.labels).tolist() == [5] * 10
    assert set(keys(few)) <= set(keys(more))
    assert load_public(config, count=50).digest() == few.digest()


@pytest.mark.parametrize("max_images", [None, 1442, 5000])
def test_no_public_image_is_left(max_images: int | None) -> None:
    words = (
        "^data.max_images: every training image is held by a client; set it below 1442 to leave "
        f"public ones, got {max_images or 'none'}$"
    )
    with pytest.raises(ConfigError, match=words):
        load_public(config_of(max_images=max_images), count=10)
    with pytest.raises(ConfigError, match="count must be at least 1, got 0"):
        load_public(config_of(max_images=10), count=0)


#: Digest of the whole of `small_config` with a kind of split: pinned, so that another machine or
#: version of numpy that shares out images differently does not go unnoticed.
PINNED = {
    "iid": ({}, "a4bbd22c54d7a19f"),
    "dirichlet": ({"alpha": 0.5}, "7b6d5a57f0aef113"),
    "majority_minority": ({}, "17781ea990c16017"),
    "majority_minority, balanced": ({"balanced": True}, "8a381baa6a83dbe2"),
    "majority_minority, ratio 50": ({"majority_ratio": 50.0}, "2e1a10acbdfb142c"),
}


@pytest.mark.parametrize("name", PINNED)
def test_the_split_is_the_same_everywhere(name: str) -> None:
    keys, digest = PINNED[name]
    config = small_config(data={"max_images": None}, partition={"kind": name.split(",")[0], **keys})
    images = load_split(config, "train")
    record = record_partitions(config, images, build_partitions(config, images))
    assert record["sha256"][:16] == digest
    other = small_config(
        data={"max_images": None}, partition={"kind": name.split(",")[0], **keys}, run={"seed": 4}
    )
    again = record_partitions(other, images, build_partitions(other, images))
    assert again["sha256"] != record["sha256"]


def test_the_split_is_written_into_the_run(tmp_path: Path) -> None:
    config = small_config(partition={"balanced": True}, data={"max_images": None})
    images = load_split(config, "train")
    parts = build_partitions(config, images)
    draw_split(RunDirectory(tmp_path), config, parts, images)
    record = json.loads((tmp_path / "partition.json").read_text())
    settings = {"kind": "majority_minority", "seed": 3, "num_clients": 3, "balanced": True}
    assert record.items() >= settings.items()
    assert (record["majority_classes"], record["majority_ratio"]) == (5, 5.0)
    assert "alpha" not in record
    assert record["images_sha256"] == images.digest()
    counts = np.array([client["per_class"] for client in record["clients"]])
    rarest = np.bincount(images.labels).min()
    assert counts.sum(axis=0).tolist() == [rarest] * 10
    assert record["left_out"] == (np.bincount(images.labels) - rarest).tolist()
    assert "Left out, so that classes are equal" in (tmp_path / "partition.txt").read_text()


def test_the_check_before_a_run_tells_of_both(tmp_path: Path) -> None:
    config = small_config(data={"max_images": None, "resolution": 20}, partition={"balanced": True})
    lines = check_run(config, tmp_path / "out", resume=False)
    images = load_split(config, "train")
    surplus = len(images) - 10 * np.bincount(images.labels).min()
    assert lines[0].endswith(f", {surplus} left out to balance the classes")
    notes = [line for line in lines if line.startswith("note: ")]
    assert notes == [
        f"note: {role}.preset nano is meant for images of 4 to 16 pixels, these have 20"
        for role in ("coarse", "fine")
    ]
    suitable = check_run(small_config(), tmp_path / "out", resume=False)
    assert not any("note" in line or "left out" in line for line in suitable)
