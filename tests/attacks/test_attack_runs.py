"""`fedpdm attack RUN` on tiny finished runs: who is a member, what is written, what is refused."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpdm.attacks.jobs.models import run_targets
from fedpdm.attacks.jobs.plan import chosen_attacks, plan_run
from fedpdm.attacks.jobs.running import run_attack_jobs
from fedpdm.attacks.jobs.subjects import matched_pairs, open_subjects, read_records
from fedpdm.attacks.jobs.uploads import stored_release
from fedpdm.cli import main
from fedpdm.config import ConfigError, RunConfig
from fedpdm.data.loading import build_partitions, load_public, load_split
from fedpdm.data.members import save_members
from fedpdm.diffusion.combined import HandOver, ImagesFromReleases
from fedpdm.diffusion.schedule import make_schedule
from fedpdm.engines.inprocess import run_in_process
from fedpdm.evaluation.synthesis import open_synthesizer
from fedpdm.storage.client_store import ClientStore
from fedpdm.storage.files import StoreError, read_tensors
from fedpdm.storage.run_directory import RunDirectory
from tests.support.baselines import baseline, local_of
from tests.support.command_line import without_advice

KINDS = ("pfdm", "centralised", "fedavg")


def config_of(kind: str) -> RunConfig:
    return baseline(kind, data={"holdout_fraction": 0.5})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("attacked")
    for kind in KINDS:
        run_in_process(config_of(kind), root / kind)
    run_in_process(baseline("pfdm", data={"holdout_fraction": 0.0}), root / "nothing_held_out")
    return {name: root / name for name in (*KINDS, "nothing_held_out")}


@pytest.fixture
def copied(finished: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished["pfdm"], tmp_path / "run"))


def record(run: Path, client: int = 0) -> dict[str, Any]:
    return dict(json.loads((run / "clients" / str(client) / "members.json").read_text()))


# --- What a run records ---------------------------------------------------------------------


@pytest.mark.slow
def test_clients_record_what_they_train_on(finished: dict[str, Path]) -> None:
    config = config_of("pfdm")
    images = load_split(config, "train")
    for client in range(2):
        kept = record(finished["pfdm"], client)
        local = local_of(config, finished["pfdm"], client)
        assert kept["trained"] == {"coarse": "released", "fine": "raw"}
        assert (kept["client_id"], kept["split"]) == (client, "train")
        for name, rows in (("train", local.held.train), ("heldout", local.held.heldout)):
            assert len(kept[name]["indices"]) == len(rows) == 30
            assert np.array_equal(
                images.images[kept[name]["indices"]], local.held.images.images[rows]
            )
            digests = images.image_digests()[kept[name]["indices"]]
            assert kept[name]["sha256"] == [bytes(row).hex() for row in digests]
        held = {*kept["train"]["indices"], *kept["heldout"]["indices"]}
        assert held == set(build_partitions(config, images)[client].indices.tolist())


@pytest.mark.slow
def test_clients_count_the_classes_they_train_on(finished: dict[str, Path]) -> None:
    """What an export mixes its models by; held-out images do not count."""
    labels = load_split(config_of("pfdm"), "train").labels
    for client in range(2):
        counts = ClientStore(finished["pfdm"] / "clients" / str(client)).load_class_counts()
        trained = Counter(labels[record(finished["pfdm"], client)["train"]["indices"]].tolist())
        assert counts is not None
        assert {k: n for k, n in enumerate(counts.tolist()) if n} == dict(trained)


@pytest.mark.slow
def test_the_record_is_of_what_training_was_given(
    finished: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: training on other images than the config implies shows in the record."""
    import fedpdm.data.client_images

    real = fedpdm.data.client_images.split_heldout

    def swapped(count: int, **given: Any) -> tuple[np.ndarray, np.ndarray]:
        train, heldout = real(count, **given)
        return heldout, train

    monkeypatch.setattr(fedpdm.data.client_images, "split_heldout", swapped)
    from clients import local

    local._kept_client.cache_clear()
    run_in_process(config_of("fedavg"), tmp_path / "swapped")
    local._kept_client.cache_clear()
    a, b = record(finished["fedavg"]), record(tmp_path / "swapped")
    assert a["trained"] == {"coarse": "raw"}
    assert (a["train"], a["heldout"]) == (b["heldout"], b["train"])


@pytest.mark.slow
def test_a_server_that_trains_on_raw_images_records_all_clients(finished: dict[str, Path]) -> None:
    run = RunDirectory(finished["centralised"])
    images = load_split(run.config(), "train")
    records = read_records(run, images, role="coarse")
    assert [each.client_id for each in records] == [0, 1]
    assert sum(len(each.train) for each in records) == 60
    assert all(dict(each.trained) == {"coarse": "raw"} for each in records)
    assert not (run.root / "clients" / "0" / "members.json").exists()


@pytest.mark.slow
def test_a_resumed_round_on_other_images_is_refused(copied: Path) -> None:
    config = config_of("pfdm")
    store = ClientStore(copied / "clients" / "0")
    other = local_of(config, copied, 1).held.members
    own = local_of(config, copied, 0).held.members
    assert own is not None
    assert other is not None
    save_members(store.root / "members.json", own.with_model("fine", "raw"))
    assert record(copied)["trained"] == {"coarse": "released", "fine": "raw"}
    with pytest.raises(StoreError, match=r"earlier rounds were trained on other images"):
        save_members(store.root / "members.json", other.with_model("fine", "raw"))


# --- Whom attacks are judged by -------------------------------------------------------------


def test_pairs_are_matched_in_every_cell() -> None:
    rng = np.random.default_rng(0)
    members, others = rng.integers(0, 5, 300), rng.integers(2, 9, 200)
    a, b = matched_pairs(members, others, most=1000, rng=rng)
    assert np.array_equal(members[a], others[b])
    assert len(set(a.tolist())) == len(a) == len(set(b.tolist()))
    wanted = sum(min((members == k).sum(), (others == k).sum()) for k in range(9))
    assert len(a) == wanted
    a, b = matched_pairs(members, others, most=17, rng=rng)
    assert len(a) == 17
    assert np.array_equal(members[a], others[b])
    assert len(matched_pairs(members, others + 50, most=9, rng=rng)[0]) == 0


def subjects(run: Path, clients: list[int]) -> Any:
    directory = RunDirectory(run)
    images = load_split(directory.config(), "train")
    records = read_records(directory, images, role="coarse")
    rng = np.random.default_rng(1)
    return open_subjects(directory, images, records, clients, most=500, rng=rng)


@pytest.mark.slow
def test_non_members_are_held_out_and_matched(finished: dict[str, Path]) -> None:
    found = subjects(finished["pfdm"], [0, 1])
    images = load_split(config_of("pfdm"), "train").images
    kept = [record(finished["pfdm"], client) for client in range(2)]
    trained = {images[i].tobytes() for each in kept for i in each["train"]["indices"]}
    held_out = {images[i].tobytes() for each in kept for i in each["heldout"]["indices"]}
    assert len(found) > 20
    assert {image.tobytes() for image in found.members} <= trained
    assert {image.tobytes() for image in found.non_members} <= held_out - trained
    assert np.array_equal(found.member_labels, found.non_member_labels)
    assert found.source.startswith("held-out")


@pytest.mark.slow
def test_without_held_out_images_others_take_their_place(finished: dict[str, Path]) -> None:
    found = subjects(finished["nothing_held_out"], [0])
    config = RunDirectory(finished["nothing_held_out"]).config()
    free = {image.tobytes() for image in load_public(config, count=20_000).images}
    assert {image.tobytes() for image in found.non_members} <= free
    assert np.array_equal(found.member_labels, found.non_member_labels)
    assert "no client holds" in found.source


@pytest.mark.slow
def test_changed_data_are_refused(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copied / "clients" / "1" / "members.json"
    kept = json.loads(path.read_text())
    del kept["file_sha256"]
    kept["train"]["indices"][3] += 1
    path.write_text(json.dumps(kept))
    assert refused(
        ["attack", str(copied), "--out", str(copied / "x")], "the data have changed", capsys
    )


@pytest.mark.slow
def test_an_image_on_both_sides_is_refused(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = copied / "clients" / "1" / "members.json"
    kept = json.loads(path.read_text())
    del kept["file_sha256"]
    for key in ("indices", "sha256"):
        kept["heldout"][key][0] = kept["train"][key][0]
    path.write_text(json.dumps(kept))
    line = "recorded as trained on and as held out"
    assert refused(["attack", str(copied), "--out", str(copied / "x")], line, capsys)


# --- Targets --------------------------------------------------------------------------------


@pytest.mark.slow
def test_targets_of_runs(finished: dict[str, Path]) -> None:
    found = run_targets(open_synthesizer(RunDirectory(finished["pfdm"]), 1))
    t0 = json.loads((finished["pfdm"] / "privacy.json").read_text())["t0"]
    ranges = {name: model.target.t_range for name, model in found.items()}
    assert ranges == {"coarse": (t0 + 1, 1000), "fine": (1, 1000), "combined": (1, 1000)}
    shared = run_targets(open_synthesizer(RunDirectory(finished["centralised"]), 0))
    assert {name: model.target.t_range for name, model in shared.items()} == {"shared": (1, 1000)}
    combined, x = found["combined"].target.denoiser, torch.randn(4, 3, 8, 8)
    levels, labels = torch.tensor([t0, t0 + 1, 5, 900]), torch.tensor([1, 2, 3, 4])
    answer = combined(x, levels, labels=labels)
    for row, role in enumerate(("fine", "coarse", "fine", "coarse")):
        one = slice(row, row + 1)
        alone = found[role].target.denoiser(x[one], levels[one], labels=labels[one])
        assert torch.allclose(answer[one], alone, atol=1e-5)


def test_two_chains_become_one_where_the_answer_is_known() -> None:
    """x_0 ~ N(0, s^2): both posteriors are linear, and their conversion must be exact."""
    schedule, t0, s2 = make_schedule("linear"), 400, 2.0
    abar_t0 = schedule.alpha_bar(t0)
    spread = abar_t0 * s2 + 1.0 - abar_t0  # variance of x_tilde

    def coarse(x: torch.Tensor, t: torch.Tensor, **_: Any) -> torch.Tensor:
        abar = schedule.gather(t, x)
        return (abar.sqrt() * spread / (abar * spread + 1.0 - abar) * x).float()

    def never(*_: Any, **__: Any) -> torch.Tensor:
        raise AssertionError("the fine model was asked above t0")

    both = HandOver(ImagesFromReleases(coarse, schedule, t0), never, t0)
    x, t = torch.randn(5, 1, 4, 4), torch.tensor([700, 800, 850, 900, 1000])
    abar = schedule.gather(t, x)
    exact = abar.sqrt() * s2 / (abar * s2 + 1.0 - abar) * x
    got = both(x, t, labels=torch.zeros(5, dtype=torch.int64))
    assert torch.allclose(got.double(), exact, atol=0.02)  # the levels are whole numbers


@pytest.mark.slow
def test_stored_releases_are_read_not_made(finished: dict[str, Path], copied: Path) -> None:
    one = open_synthesizer(RunDirectory(finished["pfdm"]), 0)
    released = stored_release(RunDirectory(finished["pfdm"]), one)
    path = finished["pfdm"] / "clients" / "0" / "releases" / "000001.safetensors"
    assert torch.equal(released.x_tilde, read_tensors(path)[0]["x_tilde"])
    shutil.rmtree(copied / "clients" / "0" / "releases")
    (copied / "clients" / "0" / "ledger.jsonl").unlink()
    with pytest.raises(ValueError, match="60 images of client 0 have no release there"):
        stored_release(RunDirectory(copied), one)
    assert not (copied / "clients" / "0" / "releases").exists()


# --- The command ----------------------------------------------------------------------------


def refused(arguments: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> bool:
    """Whether the command ends with code 2 and one line that holds `line`."""
    assert main(arguments) == 2
    said = without_advice(capsys.readouterr().err).strip().splitlines()
    assert len([each for each in said if each.startswith("fedpdm: ")]) == 1
    return line in said[-1]


@pytest.mark.slow
def test_everything_is_written_and_kept(
    finished: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    names = "loss,gsa,memorisation,reconstruction,collusion,linkage"
    command = ["attack", str(finished["pfdm"]), "--attacks", names, "--out", str(tmp_path)]
    command += ["--samples", "30", "--uploads", "10", "--seed", "4"]
    command += ["--public", "digits", "--public-steps", "2"]
    assert main(command) == 0
    shown = capsys.readouterr()
    first = shown.err
    facts = json.loads((tmp_path / "attacks.json").read_text())
    groups = [each["group"] for each in facts["attacks"]]
    assert {name: groups.count(name) for name in set(groups)} == {
        "membership": 6, "memorisation": 2, "linkage": 1, "reconstruction": 1, "collusion": 2,
        "publishing": 1,
    }  # fmt: skip
    assert facts["seed"] == 4
    assert set(facts["versions"]) == {"python", "fedpdm", "torch", "diffusers", "numpy"}
    for each in facts["attacks"]:
        if each["group"] in ("membership", "collusion") and "scores" in each:
            auc = each["scores"]["auc"]
            assert auc["low"] <= auc["value"] <= auc["high"]
    (rebuilt,) = (each for each in facts["attacks"] if each["group"] == "reconstruction")
    attackers = {row["attacker"] for row in rebuilt["rows"]}
    assert attackers == {"none", "blind", "global", "client 1", "pretrained"}
    text = (tmp_path / "summary.md").read_text()
    for words in ("locally differentially private", "50.01", "chance", "Linkage", "publisher"):
        assert words in text
    assert text.index("## Verdict") < text.index("What the numbers mean")
    assert "linkage on client 0: " in shown.out
    assert "the upload alone, rescaled" in text
    for name in text.splitlines()[-1][7:-1].split(", "):
        assert (tmp_path / name).stat().st_size > 100, name
    assert "s left" in first

    before = (tmp_path / "attacks.json").read_bytes()
    assert main(command) == 0
    assert capsys.readouterr().err.count("kept from before") == len(groups)
    assert (tmp_path / "attacks.json").read_bytes() == before


OTHERS: dict[str, tuple[str, dict[str, dict[str, Any]], set[str], set[str]]] = {
    "noise_to_noise": (
        "pfdm",
        {"coarse": {"objective": "noise_to_noise", "training": "server"}},
        {"membership", "memorisation", "linkage", "reconstruction", "collusion", "publishing"},
        {"coarse", "fine, client 0", "combined, client 0"},
    ),
    "dp_sgd": ("dp_sgd", {}, {"membership", "memorisation"}, {"shared"}),
    "alone": ("alone", {}, {"membership", "memorisation"}, {"fine, client 0"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_every_kind_of_run_can_be_attacked(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, changes, groups, targets = OTHERS[kind]
    run_in_process(baseline(base, data={"holdout_fraction": 0.5}, **changes), tmp_path / "run")
    command = ["attack", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--attacks"]
    command += ["loss,memorisation,linkage,reconstruction,collusion"]
    command += ["--samples", "30", "--uploads", "10"]
    assert main(command) == 0
    said = capsys.readouterr().err
    assert ("left out: this baseline releases no images" in said) == (len(groups) == 2)
    facts = json.loads((tmp_path / "out" / "attacks.json").read_text())
    assert {each["group"] for each in facts["attacks"]} == groups
    membership = [each for each in facts["attacks"] if each["group"] == "membership"]
    assert {each["target"] for each in membership} == targets
    memorised = [each for each in facts["attacks"] if each["group"] == "memorisation"]
    assert len(memorised) == 1  # of a noise-to-noise coarse model alone nothing is sampled


@pytest.mark.slow
def test_releases_kept_elsewhere_are_found(
    copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Moved out of the run they are missed; with --releases the uploads are the same ones."""
    kept = tmp_path / "elsewhere"
    command = ["attack", str(copied), "--attacks", "linkage", "--out"]
    assert main([*command, str(tmp_path / "before")]) == 0
    for client in ("0", "1"):
        (kept / client).mkdir(parents=True)
        for name in ("releases", "ledger.jsonl"):
            shutil.move(copied / "clients" / client / name, kept / client / name)
    assert refused([*command, str(tmp_path / "missed")], "have no release there", capsys)
    assert main([*command, str(tmp_path / "after"), "--releases", str(kept)]) == 0
    before, after = (
        json.loads((tmp_path / name / "attacks.json").read_text())["attacks"][0]["linkage"]
        for name in ("before", "after")
    )
    assert before == after


@pytest.mark.slow
def test_an_interrupted_attack_goes_on(finished: dict[str, Path], tmp_path: Path) -> None:
    def jobs() -> Any:
        return plan_run(
            RunDirectory(finished["centralised"]), clients=[0, 1],
            attacks=chosen_attacks("loss,pia,secmi"), out=tmp_path, seed=0, say=lambda _: None,
        )  # fmt: skip

    planned, heard = jobs(), []
    assert [job.target for job in planned] == ["shared"] * 3

    def stop(line: str) -> None:
        heard.append(line)
        if len(heard) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_attack_jobs(planned, tmp_path, say=stop)
    (tmp_path / "results" / "loss-on-shared.json").write_text("{half")
    done = run_attack_jobs(jobs(), tmp_path, say=heard.append)
    assert [each.reused for each in done] == [False, True, False]
    again = run_attack_jobs(jobs(), tmp_path / "anew", say=heard.append)
    assert [a.result for a in done] == [b.result for b in again]
    other = plan_run(
        RunDirectory(finished["centralised"]), clients=[0, 1],
        attacks=chosen_attacks("loss"), out=tmp_path, seed=1, say=lambda _: None,
    )  # fmt: skip
    assert not run_attack_jobs(other, tmp_path, say=heard.append)[0].reused


def test_names_of_attacks() -> None:
    assert chosen_attacks("membership") == (chosen_attacks(None)[0], ())
    assert chosen_attacks("linkage,pia") == (("pia",), ("linkage",))
    for bad in ("pie", "", "pia,memorization"):
        with pytest.raises(ConfigError, match="--attacks: must be of loss, pia"):
            chosen_attacks(bad)


@pytest.mark.slow
def test_bad_input_is_one_line(
    finished: dict[str, Path], copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = ["--out", str(copied / "out")]
    good = str(finished["pfdm"])
    assert refused(["attack", good, "--attacks", "pie", *out], "got 'pie'", capsys)
    assert refused(["attack", good, "--clients", "7", *out], "--clients: must be in [0, 1]", capsys)
    assert refused(["attack", good, "--clients", "a", *out], "--clients: must be whole", capsys)
    assert refused(
        ["attack", good, "--subjects", "0", *out], "--subjects: must be at least 1", capsys
    )
    assert refused(["attack", good, "--members", "x", *out], "a run has recorded its own", capsys)
    assert refused(["attack", *out], "give a run directory, or --unet", capsys)
    baseline_run = str(finished["centralised"])
    line = "none of these can be made"
    assert refused(["attack", baseline_run, "--attacks", "linkage", *out], line, capsys)
    (copied / "clients" / "0" / "members.json").unlink()
    assert refused(["attack", str(copied), *out], "members.json: is missing", capsys)
    (copied / "coarse.safetensors").unlink()
    assert refused(["attack", str(copied), *out], "has not finished", capsys)
