"""A custom data set, U-Net, loss weight and objective, named in a config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpdm.config import ConfigError, RunConfig
from fedpdm.data import data_set, load_image_set
from fedpdm.data.loading import load_split
from fedpdm.data.spec import ImageSpec, build_image_spec
from fedpdm.engines.inprocess import run_in_process
from fedpdm.engines.run_checks import check_named
from fedpdm.setup.chosen import find_objective, find_preset, find_weighting
from fedpdm.storage.run_directory import RunDirectory
from tests.support.federations import small_config
from tests.support.own_code import MODULE, write_module


@pytest.fixture(autouse=True)
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_module(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config_of(**sections: dict[str, Any]) -> RunConfig:
    return small_config(
        **{
            "data": {"name": f"{MODULE}:stripes", "max_images": None},
            "partition": {"kind": "iid", "num_clients": 2},
            "evaluation": {"image_metrics": False},
            **sections,
        }
    )


def test_it_is_read_like_any_other() -> None:
    images = load_image_set(f"{MODULE}:stripes", split="train", max_images=20)
    assert images.images.shape == (20, 1, 8, 8)
    assert images.class_names == ("rows", "columns")
    assert images.background == -1.0
    colored = load_image_set(f"{MODULE}:stripes", split="test", coloring="by_label", resolution=10)
    assert colored.images.shape == (40, 3, 10, 10)
    one = load_image_set(f"{MODULE}:stripes", split="test", classes=["columns"])
    assert set(one.labels) == {0}
    assert np.array_equal(load_split(config_of(), "train").labels, np.arange(160) % 2)


@pytest.mark.parametrize(
    ("data", "shape"),
    [({}, (1, 8, 8)), ({"resolution": 12, "coloring": "by_label"}, (3, 12, 12))],
)
def test_the_server_knows_its_shape_without_reading_it(
    data: dict[str, Any], shape: tuple[int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_of(data={"name": f"{MODULE}:stripes", "max_images": None, **data})
    read = build_image_spec(config, load_split(config, "train"))
    monkeypatch.setattr("fedpdm.data.spec.load_split", lambda *_: pytest.fail("was read"))
    spec = build_image_spec(config)
    assert spec == read
    assert spec == ImageSpec(channels=shape[0], resolution=shape[1], num_classes=2, shift=-1.0)


def test_photographs_have_three_channels_whatever_the_colouring_says() -> None:
    config = config_of(data={"name": "cifar10", "coloring": "none"})
    assert build_image_spec(config).channels == 3


@pytest.mark.parametrize(
    ("name", "line"),
    [
        (f"{MODULE}:slim", "must be a fedpdm.data.registry.DataSet, is a Preset"),
        (f"{MODULE}:no", f"module {MODULE} has no no"),
        ("nowhere_at_all:set", "cannot be imported"),
    ],
)
def test_what_is_no_data_set_is_one_line(name: str, line: str) -> None:
    with pytest.raises(ConfigError, match=f"^data.name: '{name}'") as caught:
        data_set(name)
    assert line in str(caught.value)


def test_a_set_that_is_not_what_it_says_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^data.name: .*:three has 3 classes, 2 were read$"):
        load_image_set(f"{MODULE}:three", split="train")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("coarse.preset", f"{MODULE}:flat"),
        ("fine.preset", f"{MODULE}:stripes"),
        ("coarse.weighting", f"{MODULE}:slim"),
        ("fine.weighting", "json:dumps"),
        ("coarse.objective", f"{MODULE}:slim"),
        ("coarse.objective", "nowhere_at_all:x"),
    ],
)
def test_code_of_another_kind_is_refused_before_a_run(key: str, value: str) -> None:
    section, name = key.split(".")
    config = config_of(**{section: {name: value}})
    with pytest.raises(ConfigError, match=f"^{key}: '{value}'"):
        check_named(config)


@pytest.mark.slow
def test_a_federation_of_all_of_them(mine: Path) -> None:
    """The clients' messages, the server and the finished run all find them."""
    model = {"preset": f"{MODULE}:slim", "weighting": f"{MODULE}:flat", "steps_per_round": 2}
    config = config_of(
        run={"rounds": 1},
        coarse={**model, "objective": f"{MODULE}:halved"},
        fine=model,
    )
    check_named(config)
    assert find_preset(config, "coarse").unet["block_out_channels"] == (16, 32)
    snr = torch.tensor([0.1, 10.0])
    assert find_weighting(config, "fine").of_snr(snr).tolist() == [1.0, 1.0]
    assert find_objective(config).chain == "noise_to_noise"
    run_in_process(config, mine / "mine")
    plain = config_of(
        run={"rounds": 1},
        coarse={**model, "objective": "noise_to_noise", "weighting": "uniform"},
        fine={**model, "weighting": "uniform"},
    )
    run_in_process(plain, mine / "plain")
    losses = [
        RunDirectory(mine / name).read_json("metrics.json")["rounds"][0]
        for name in ("mine", "plain")
    ]
    assert losses[0]["fine_loss"] == losses[1]["fine_loss"]  # the same weight by another name
    # Half the loss; Adam's steps are alike.
    assert losses[0]["coarse_loss"] == pytest.approx(losses[1]["coarse_loss"] / 2, rel=0.1)
