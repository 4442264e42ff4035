"""Class names between institutions: compared, mapped by the node's operator, kept as accepted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clients.local import open_local_client
from fedpdm.cli import main
from fedpdm.config import ConfigError, config_digest, config_to_json
from fedpdm.deployment.classes import (
    ClassMap,
    agree,
    check_kept_labels,
    federation_classes,
    load_classes,
    own_class_names,
    parse_classes,
)
from fedpdm.deployment.invitation import Invitation, make_invitation, read_invitation
from fedpdm.engines.deployed import node as engine
from fedpdm.engines.deployed.preflight import check_deployed_run
from fedpdm.privacy.ledger import append, read_ledger
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.publishing.building import _class_names as names_for_export
from fedpdm.reporting.page.reading import read_run
from fedpdm.setup.flower_config import run_config_of
from fedpdm.storage.node_run import NodeRun
from fedpdm.storage.run_directory import RunDirectory
from tests.support.deployments import deployment
from tests.support.participants import Participant, quiet

NAMES = ("benign", "malignant")
SWAPPING = ("gutartig", "boesartig")  # the other way round by the alphabet
GIVEN = "benign=gutartig,malignant=boesartig"


def rename(node: Participant, *new: str) -> None:
    """Call the node's class folders otherwise."""
    for split in ("train", "test"):
        for old, name in zip(NAMES, new, strict=True):
            (node.data / split / old).rename(node.data / split / name)


def checks(node: Participant, *more: str) -> dict[str, str]:
    """All lines of the check, which are fine."""
    _, out, _ = node.call("check", "--json", *more)
    report = json.loads(out)
    assert report["ok"], report["checks"]
    return {check["name"]: check["detail"] for check in report["checks"]}


def node_config(node: Participant) -> dict[str, Any]:
    return {
        "partition-id": 1, "num-partitions": 2, "data-dir": str(node.data),
        "store-dir": str(node.store), "require-acceptance": True,
    }  # fmt: skip


def opened(node: Participant) -> Any:
    """The client as the coordinator's message finds it."""
    config = read_invitation(node.invitation).config
    return open_local_client(node_config(node), {"resolved-config": config_to_json(config)}, 0)


def forget_names(node: Participant) -> None:
    """An invitation as earlier versions made it."""
    content = json.loads(node.invitation.read_text())
    del content["images"]["class_names"], content["images"]["values"]
    node.invitation.write_text(json.dumps(content))


# --- At the check ------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [SWAPPING, ("dogs", "aeroplanes")])
def test_other_names_are_refused(node: Participant, names: tuple[str, str]) -> None:
    rename(node, *names)
    found = node.failed("--accept")
    assert found["classes"] == (
        "classes: of the federation's (benign, malignant), benign, malignant cannot be found here "
        f"({', '.join(sorted(names))}); say which is which with --classes benign=OWN,malignant=OWN,"
        " or benign= where there is none"
    )
    assert found["data"] == "not checked, since these failed: classes"
    assert not (node.store / "ledger.jsonl").exists()


def test_what_the_operator_maps_is_accepted_and_trained_with(node: Participant) -> None:
    rename(node, *SWAPPING)
    first = np.asarray(Image.open(min((node.data / "train" / "gutartig").glob("*.png"))))
    found = checks(node, "--accept", "--classes", GIVEN)
    assert found["classes"] == "benign = gutartig, malignant = boesartig"
    assert "benign 20, malignant 20" in found["data"]
    record = ReleaseStore(node.store).ledger().records[-1]
    assert record.fields["classes"] == [["benign", "gutartig"], ["malignant", "boesartig"]]
    assert main(["ledger", str(node.store)]) == 0
    assert "classes benign=gutartig malignant=boesartig" in node.capsys.readouterr().out
    held = opened(node).held.images
    assert held.class_names == NAMES
    same = [(image.transpose(1, 2, 0) == first).all() for image in held.images]
    assert held.labels[same.index(True)] == 0  # "gutartig" would be 1 by the alphabet
    assert checks(node)["classes"] == found["classes"]  # as accepted, without the option
    engine.prepare_node(node.settings())


def test_an_own_class_of_no_class_of_the_federation_is_no_silent_loss(node: Participant) -> None:
    shutil.copytree(node.data / "train" / "benign", node.data / "train" / "unclear")
    picture = next((node.data / "train" / "unclear").glob("*.png"))
    Image.fromarray(np.full((8, 8, 3), 9, np.uint8)).save(picture)
    assert "unclear here is none of the federation's" in node.failed()["classes"]
    found = checks(node, "--classes", "=unclear")
    assert found["classes"] == "benign, malignant; NOT used: unclear"
    assert "40 distinct images of 3x8x8; benign 20, malignant 20" in found["data"]


def test_a_class_that_a_node_has_not_keeps_its_number(node: Participant) -> None:
    for split in ("train", "test"):
        shutil.rmtree(node.data / split / "benign")
    assert "benign cannot be found here" in node.failed()["classes"]
    found = checks(node, "--accept", "--classes", "benign=")
    assert found["classes"] == "benign = none here, malignant"
    assert "benign 0, malignant 20" in found["data"]
    assert set(opened(node).held.images.labels) == {1}


def test_an_invitation_of_earlier_versions_compares_nothing_and_says_so(node: Participant) -> None:
    rename(node, *SWAPPING)
    forget_names(node)
    found = checks(node, "--accept")
    assert found["classes"].startswith("NOT compared: the invitation names none")
    assert "NOT compared: the invitation states no range" in found["data"]
    assert "classes" not in ReleaseStore(node.store).ledger().records[-1].fields
    assert "names no classes" in node.failed("--classes", GIVEN)["classes"]
    engine.prepare_node(node.settings())
    assert opened(node).held.images.class_names == tuple(sorted(SWAPPING))


@pytest.mark.parametrize("names", [["a\nb", "c"], ["a", "a"], [], "ab", [1, 2], ["x" * 201, "y"]])
def test_names_that_are_none(node: Participant, names: Any) -> None:
    node.rewrite(images={"class_names": names})
    assert "images.class_names" in node.failed()["classes"]


def test_values_of_another_scale_are_refused(node: Participant) -> None:
    assert "; values " in checks(node)["data"]
    node.rewrite(images={"values": [0, 65535]})
    assert "values are [0, 255] here, [0, 65535]" in node.failed()["data"]
    node.rewrite(images={"values": [0, 255]})
    rng = np.random.default_rng(0)
    for picture in node.data.rglob("*.png"):
        Image.fromarray(rng.integers(0, 2, (8, 8, 3), dtype=np.uint8)).save(picture)
    assert "values are 0 to 1 here, 0 to 255 in the federation" in node.failed()["data"]


# --- At the start ------------------------------------------------------------------------------


def start_error(node: Participant, *more: str) -> str:
    code, _, err = node.call("start", *more)
    assert code == 2
    return err.splitlines()[0]


def test_nothing_is_started_with_other_classes_than_accepted(node: Participant) -> None:
    rename(node, *SWAPPING)
    checks(node, "--accept", "--classes", GIVEN)
    swapped = "benign=boesartig,malignant=gutartig"
    assert "accepted was benign = gutartig" in start_error(node, "--classes", swapped)
    node.rewrite(images={"class_names": ["malignant", "benign"]})
    assert "the invitation says malignant, benign" in start_error(node)


def test_an_acceptance_of_earlier_versions_holds_where_the_labels_are_the_same(
    node: Participant,
) -> None:
    named = node.invitation.read_text()
    forget_names(node)
    checks(node, "--accept")
    node.invitation.write_text(named)
    engine.prepare_node(node.settings())
    assert opened(node).held.images.class_names == NAMES
    rename(node, *SWAPPING)
    assert "cannot be found here" in start_error(node)
    assert "none were accepted" in start_error(node, "--classes", GIVEN)


def test_labels_of_a_run_that_was_begun_are_not_changed(node: Participant) -> None:
    """A store that trained with swapped classes, as earlier versions let it."""
    named = node.invitation.read_text()
    rename(node, *SWAPPING)
    forget_names(node)
    checks(node, "--accept")
    digest = config_digest(read_invitation(node.invitation).config)
    (node.store / "runs" / digest[:16]).mkdir(parents=True)
    node.invitation.write_text(named)
    assert "was class" in node.failed("--classes", GIVEN)["classes"]
    assert checks(node, "--classes", "benign=boesartig,malignant=gutartig")["classes"]


# --- The parts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("benign", "must be NAME=OWN, NAME= or =OWN, got 'benign'"),
        ("=", "must be NAME=OWN, NAME= or =OWN, got '='"),
        ("bening=a", "'bening' is no class of the federation (benign, malignant); did you mean"),
        ("benign=c", "'c' is no class here (a, b)"),
        ("benign=a,benign=b", "'benign' is given twice"),
        ("benign=a,malignant=a", "a here would be two classes of the federation"),
        ("benign=a,malignant=b,=b", "b here would be two classes of the federation"),
        ("benign=a", "malignant cannot be found here (a, b)"),
    ],
)
def test_a_mapping_that_is_none(text: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        agree(NAMES, ("a", "b"), parse_classes([text]))
    assert line in str(caught.value)


def test_a_mapping_there_and_back() -> None:
    given = parse_classes(["benign=a, malignant=", "=c"])
    found = agree(NAMES, ("a", "c"), given)
    assert found == ClassMap(names=NAMES, own=("a", ""), left_out=("c",))
    assert ClassMap.of(found.pairs) == found
    assert found.labels == {"a": 0}


def test_names_in_the_config_are_the_federations(made: Path) -> None:
    """Also with an invitation of earlier versions; the config leaves other classes out itself."""
    config = quiet(made, data={"classes": ["malignant", "benign"]})
    assert federation_classes(Invitation(config=config)) == ("malignant", "benign")
    wrong = Invitation(config=config, images={"class_names": ["benign", "malignant"]})
    with pytest.raises(ConfigError, match=r"are benign, malignant, data\.classes .* malignant, be"):
        federation_classes(wrong)
    root = made / "hospital" / "images"
    here = own_class_names(config, root)
    assert here == NAMES
    found = agree(("malignant", "benign"), here, selects=True)
    images = load_classes(config, "train", root=root, classes=found)
    assert images.class_names == ("malignant", "benign")
    assert images.labels.tolist() == [1] * 20 + [0] * 20
    assert agree(("benign",), here, selects=True).describe() == "benign; NOT used: malignant"


def test_sums_that_were_released_are_not_numbered_anew(node: Participant) -> None:
    """They are added up by class, whatever the config."""
    config = quiet(node.made)
    ledger = append(read_ledger(node.root / "ledger.jsonl"), "opened", {"client_id": 1})
    before = [["benign", "gutartig"], ["malignant", "boesartig"]]
    ledger = append(ledger, "accepted", {"config": "0" * 64, "classes": before})
    (node.root / "runs" / ("0" * 16)).mkdir(parents=True)
    here = ("boesartig", "gutartig")
    swapped = agree(NAMES, here, parse_classes(["benign=boesartig,malignant=gutartig"]))
    check_kept_labels(node.root, ledger, config, swapped, here)  # images alone were released

    class Sums:
        """A ledger that knows of a release of class statistics."""

        records = ledger.records

        def releases(self) -> list[Any]:
            return [type("Release", (), {"parameters": type("P", (), {"mechanism": "statistics"})})]

    with pytest.raises(ConfigError, match=r"(boesartig' was class 1|gutartig' was class 0)"):
        check_kept_labels(node.root, Sums(), config, swapped, here)  # type: ignore[arg-type]


# --- The coordinator ---------------------------------------------------------------------------


def test_a_coordinator_without_images_invites(made: Path, tmp_path: Path) -> None:
    stated = {"root": None, "classes": list(NAMES), "channels": 3, "resolution": 8}
    with_images = json.loads(make_invitation(quiet(made)))["images"]
    without = json.loads(make_invitation(quiet(made, data=stated)))["images"]
    assert without == with_images | {"values": [0, 255]}
    with pytest.raises(ConfigError, match=r"or set data\.classes, data\.channels and data\.resol"):
        make_invitation(quiet(made, data={**stated, "channels": None}))


def test_images_of_other_channels_are_refused(node: Participant) -> None:
    config = quiet(node.made, data={"classes": list(NAMES), "channels": 1, "resolution": 8})
    node.invitation.write_text(make_invitation(config))
    assert "data.channels: must be 3, as images have, got 1" in node.failed()["data"]


def test_the_coordinator_is_told_what_default_nodes_refuse(
    made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "experiment.yaml", tmp_path / "invitation.json"
    for asked, refused in (
        ({}, []),
        ({"evaluation": {"image_metrics": True}}, ["evaluation.image_metrics: true asks for"]),
        (
            {"privacy": {"release": "statistics"}, "coarse": {"training": "server"},
             "run": {"rounds": 3}, "evaluation": {"image_metrics": True}},
            ["privacy.release: 'statistics' is not one", "evaluation.image_metrics: true asks for"],
        ),
    ):  # fmt: skip
        path.write_text(config_to_json(quiet(made, **asked)))
        capsys.readouterr()
        assert main(["node", "invite", str(path), "--out", str(out)]) == 0
        lines = capsys.readouterr().out.splitlines()[1:]
        assert len(lines) == len(refused)
        for line, words in zip(lines, refused, strict=True):
            assert line.startswith(f"WARNING: a node without a policy of its own refuses {words}")


def test_a_federation_whose_coordinator_has_no_images_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two institutions, each with its own names; `federation run` asks for no images either."""
    monkeypatch.delenv("FEDPDM_DATA", raising=False)
    stated = {"root": None, "classes": list(NAMES), "channels": 3, "resolution": 8}
    federation = deployment(tmp_path, data=stated)
    config = run_config_of(federation.run_config)
    lines = check_deployed_run(config, tmp_path / "out", resume=False)
    assert "image_folder (3x8x8, 2 classes)" in lines[0]
    for split in ("train", "test"):
        for name, own in zip(NAMES, SWAPPING, strict=True):
            folder = tmp_path / "hospital-1" / split / name
            folder.rename(folder.with_name(own))
    pairs = [list(pair) for pair in zip(NAMES, SWAPPING, strict=True)]
    store = Path(federation.nodes[1]["store-dir"])
    fields = {"config": config_digest(config), "classes": pairs}
    ReleaseStore(store).note("accepted", fields, client_id=1)
    federation.run()
    assert (tmp_path / "server" / "coarse.safetensors").exists()
    kept = NodeRun(store / "runs" / config_digest(config)[:16])
    assert kept.store.last_round() == 2
    assert kept.facts()["class_names"] == list(NAMES)  # what exports and pages at the node take


def test_an_export_has_the_names_of_the_config(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those that folders give by the alphabet, which FEDPDM_DATA would find."""
    monkeypatch.setenv("FEDPDM_DATA", str(made / "hospital" / "images"))
    run = RunDirectory(tmp_path)
    config = quiet(made, data={"classes": ["malignant", "benign"], "root": None})
    named = names_for_export(run, config, num_classes=2)
    assert named == {"0": "malignant", "1": "benign"}
    assert names_for_export(run, config, num_classes=3) is None


def test_a_report_has_the_names_of_the_config(made: Path, tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    run.open(quiet(made, data={"classes": ["malignant", "benign"]}), resume=False)
    assert read_run(run.root).class_names() == ["malignant", "benign"]
    other = RunDirectory(tmp_path / "other")
    other.open(quiet(made), resume=False)
    assert read_run(other.root).class_names() == []
