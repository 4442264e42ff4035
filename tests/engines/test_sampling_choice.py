"""How each client of class statistics samples: chosen once, kept, shown, used by every reader."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fedpdm
from clients import samples
from fedpdm import wire
from fedpdm.config import ConfigError, RunConfig
from fedpdm.diffusion.gaussian import GaussianDenoiser
from fedpdm.engines.flowercli import _shown
from fedpdm.engines.inprocess import run_in_process
from fedpdm.engines.run_checks import check_models
from fedpdm.evaluation import choosing, trials
from fedpdm.evaluation.synthesis import open_synthesizer
from fedpdm.evaluation.trajectory import record_states
from fedpdm.jobs import progress
from fedpdm.privacy.mechanism import door
from fedpdm.publishing.export import export_pipeline, load_pipeline
from fedpdm.reporting.page.html import render_report
from fedpdm.reporting.page.reading import read_run
from fedpdm.rng import Purpose, torch_generator
from fedpdm.setup.build import sampler_settings
from fedpdm.setup.choice import (
    SamplingChoice,
    fallback,
    is_open,
    kept_choices,
    load_choice,
    save_choice,
)
from fedpdm.setup.pair import shared_pair
from fedpdm.setup.run_setup import set_up
from fedpdm.storage.client_store import ClientStore, store_label
from fedpdm.storage.files import StoreError, read_tensors
from fedpdm.storage.run_directory import RunDirectory
from strategies.roster import ClientFailure
from tests.support.federations import client_of, small_config


def config_of(**sampling: Any) -> RunConfig:
    """Digits with about six held-out images of each majority class at a client."""
    return small_config(
        run={"rounds": 3},
        data={"holdout_fraction": 0.3},
        partition={"num_clients": 2},
        coarse={"training": "server"},
        privacy={"release": "statistics", "clip_norm": 6.0},
        sampling=sampling,
    )


@pytest.fixture(scope="module", autouse=True)
def quick() -> Iterator[None]:
    """Two hand-overs to try, and a classifier of few steps."""
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(choosing, "LEVELS", (0.1, 0.3))
        changed.setattr(trials, "CLASSIFIER_STEPS", 20)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("choice") / "run"
    run_in_process(config_of(), out)
    return out


def store_of(out: Path, client: int = 0, config: RunConfig | None = None) -> ClientStore:
    return ClientStore(out / "clients" / str(client), store_label(config or config_of(), client))


def choice_of(out: Path, client: int = 0) -> SamplingChoice:
    choice = load_choice(store_of(out, client))
    assert choice is not None
    return choice


@pytest.mark.slow
def test_each_client_chooses_and_every_reader_samples_by_it(finished: Path, tmp_path: Path) -> None:
    for client in range(2):
        choice = choice_of(finished, client)
        assert "chosen among 8 on" in choice.why
        assert choice.handover in (100, 300)
        one = open_synthesizer(RunDirectory(finished), client)
        found = one.settings
        assert (found.t0, found.fine_labels, found.candidates) == (
            choice.handover, choice.fine_labels, choice.candidates,
        )  # fmt: skip
        pipeline = load_pipeline(
            export_pipeline(RunDirectory(finished), client_id=client, out=tmp_path / str(client))
        )
        assert pipeline.config["t0"] == choice.handover
        assert pipeline.config["candidates"] == choice.candidates
        assert pipeline.config["fine_labels"] == choice.fine_labels
    assert kept_choices(RunDirectory(finished), config_of()).keys() == {0, 1}


def test_the_log_and_the_page_say_what_was_chosen(finished: Path) -> None:
    log = (finished / "log.txt").read_text()
    page = render_report([read_run(finished)], films=False, say=lambda _: None)
    for client in range(2):
        choice = choice_of(finished, client)
        assert f"client {client} samples with {choice.words}" in log
        assert choice.why in page
    assert "How each client samples" in page
    words = "\n".join(check_models(set_up(config_of())).lines())
    assert "models: class Gaussians above a t that each client chooses" in words


def test_nothing_of_the_choice_leaves_a_client(finished: Path) -> None:
    sent = json.dumps(json.loads((finished / "metrics.json").read_text()))
    for word in ("handover", "fine_labels", "candidates", "near_copies"):
        assert word not in sent
        with pytest.raises(wire.WireError):
            wire.check_metrics({"client_id": 0, word: 1}, allow_raw=True, who="client 0")


@pytest.mark.slow
def test_a_choice_is_made_once(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that is asked again samples as it chose, and chooses nothing."""
    kept = (finished / "clients" / "0" / "sampling.json").read_bytes()

    def fail(*_: Any, **__: Any) -> Any:
        raise AssertionError("chosen again")

    monkeypatch.setattr(samples, "choose_sampling", fail)
    client = client_of(config_of(), finished, 0)
    shared = read_tensors(finished / "coarse.safetensors")[0]
    _, _, metrics = client.evaluate(wire.encode_model(shared), {"final": True, "round": 3})
    assert "error" not in metrics
    assert (finished / "clients" / "0" / "sampling.json").read_bytes() == kept
    assert load_choice(store_of(finished), round=3) == choice_of(finished)
    assert load_choice(store_of(finished), round=2) is None  # of another fine model


@pytest.mark.slow
def test_a_run_shows_how_far_choice_and_samples_are(
    finished: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """By lines that both engines let through."""
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(trials, "CLASSIFIER_STEPS", 40)  # told of every 20
    monkeypatch.setattr(samples, "load_choice", lambda *_, **__: None)
    monkeypatch.setattr(samples, "save_choice", lambda *_, **__: None)
    out = shutil.copytree(finished, tmp_path / "run")  # its pictures are drawn anew
    shared = read_tensors(out / "coarse.safetensors")[0]
    client = client_of(config_of(), out, 0)
    _, _, metrics = client.evaluate(wire.encode_model(shared), {"final": True, "round": 3})
    assert "error" not in metrics
    lines = capsys.readouterr().err.splitlines()
    for what in (
        "choice, classifier", "choice, near-copies", "choice, likeness", "samples, pfdm",
        "samples, alone", "samples of majority, pfdm", "samples of minority, alone",
    ):  # fmt: skip
        own = [each for each in lines if each.startswith(f"client 0 round 3 {what}: step ")]
        assert own, what
        assert all(re.search(r" s left$", each) for each in own)
        shown = list(_shown(f"\x1b[36m(ClientAppActor pid=1)\x1b[0m {own[0]}"))
        assert shown == [own[0]]


def test_a_deployed_clients_owner_is_told(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On its own terminal, once; in a simulation the run's log says it."""
    one, local = (
        open_synthesizer(RunDirectory(finished), 0),
        client_of(config_of(), finished, 0).local,
    )
    run = dataclasses.replace(config_of().run, simulation=False)
    setup = dataclasses.replace(local.setup, config=dataclasses.replace(config_of(), run=run))
    chosen = SamplingChoice(handover=100, fine_labels=False, candidates=4, why="a test")
    monkeypatch.setattr(samples, "choose_sampling", lambda *_, **__: chosen)
    monkeypatch.setattr(samples, "load_choice", lambda *_, **__: None)
    monkeypatch.setattr(samples, "save_choice", lambda *_, **__: None)
    for config, lines in ((setup, [f"client 0: samples with {chosen.words}"]), (local.setup, [])):
        made = samples._choice(
            dataclasses.replace(local, setup=config), one.coarse, one.fine, device=one.device
        )
        assert made == chosen
        assert capsys.readouterr().out.splitlines() == lines


@pytest.mark.slow
def test_a_resumed_run_keeps_the_choice(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails after the choice, before the pictures: the second try draws by the kept one."""
    with monkeypatch.context() as broken:

        def fail(*_: Any, **__: Any) -> None:
            raise OSError("no space left on the device")

        broken.setattr(samples, "_store_pictures", fail)
        with pytest.raises(ClientFailure, match="no space left"):
            run_in_process(config_of(), tmp_path / "run")
    kept = (tmp_path / "run" / "clients" / "0" / "sampling.json").read_bytes()
    assert choice_of(tmp_path / "run") == choice_of(finished)  # as in any run of this seed
    run_in_process(config_of(), tmp_path / "run", resume=True)
    assert (tmp_path / "run" / "clients" / "0" / "sampling.json").read_bytes() == kept
    first, second = (store_of(out).load_samples() for out in (finished, tmp_path / "run"))
    assert first is not None
    assert second is not None
    np.testing.assert_array_equal(first["pfdm"], second["pfdm"])


@pytest.mark.slow
def test_what_the_config_says_is_not_chosen(tmp_path: Path) -> None:
    config = config_of(handover=180, fine_labels=True, candidates=2)
    assert not is_open(set_up(config))
    assert not is_open(set_up(small_config()))
    run_in_process(config, tmp_path / "run")
    assert not (tmp_path / "run" / "clients" / "0" / "sampling.json").exists()
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "samples with" not in log
    assert "class Gaussians above t = 180" in "\n".join(check_models(set_up(config)).lines())
    found = open_synthesizer(RunDirectory(tmp_path / "run"), 0).settings
    assert (found.t0, found.fine_labels, found.candidates) == (180, True, 2)
    page = render_report([read_run(tmp_path / "run")], films=False, say=lambda _: None)
    assert "How each client samples" not in page


def test_the_config_stands_before_the_choice() -> None:
    chosen = SamplingChoice(handover=300, fine_labels=True, candidates=1, why="")
    settings = sampler_settings(set_up(config_of(handover=120)), choice=chosen)
    assert (settings.t0, settings.fine_labels, settings.candidates) == (120, True, 1)
    settings = sampler_settings(set_up(config_of(fine_labels=False, candidates=3)), choice=chosen)
    assert (settings.t0, settings.fine_labels, settings.candidates) == (300, False, 3)
    chosen = dataclasses.replace(chosen, own_classes=(0, 4))
    assert sampler_settings(set_up(config_of()), choice=chosen).own_classes == (0, 4)
    never = set_up(config_of(own_classes="never"))
    assert sampler_settings(never, choice=chosen).own_classes == ()


def test_files_of_a_choice_are_checked(finished: Path, tmp_path: Path) -> None:
    store = store_of(tmp_path)
    choice = dataclasses.replace(fallback(set_up(config_of())), own_classes=(3, 1))
    with store.lock():
        save_choice(store, choice, round=3)
    assert load_choice(store, round=3) == choice
    path = store.root / "sampling.json"
    with pytest.raises(StoreError, match=r"sampling\.json"):
        load_choice(ClientStore(store.root, store_label(config_of(), 1)))  # another client's
    good = path.read_text()
    path.write_text(good.replace('"handover": 150', '"handover": 151'))
    with pytest.raises(StoreError, match=r"sampling\.json"):
        load_choice(store)
    with pytest.raises(StoreError, match=r"sampling\.json"):
        store.check()  # what a resume reads
    old = {k: v for k, v in dataclasses.asdict(choice).items() if k != "own_classes"}
    store.save_record("sampling", {**old, "round": 3})  # as earlier versions wrote it
    assert load_choice(store, round=3) == dataclasses.replace(choice, own_classes=())
    for name, value in (
        ("handover", 0), ("candidates", True), ("fine_labels", "no"), ("own_classes", [True]),
        ("own_classes", "3"), ("own_classes", [-1]),
    ):  # fmt: skip
        bad = {**dataclasses.asdict(choice), name: value, "round": 3}
        store.save_record("sampling", bad)
        with pytest.raises(StoreError, match=r"sampling\.json: is no choice"):
            load_choice(store)
    store.save_record("sampling", {"round": 3})
    with pytest.raises(StoreError, match=r"is no choice"):
        load_choice(store)


def test_a_run_without_a_choice_has_the_fallback(finished: Path, tmp_path: Path) -> None:
    """As runs of the time before clients chose, and while a run goes on."""
    weights = read_tensors(finished / "coarse.safetensors")[0]
    pair = shared_pair(config_of(), weights)
    assert (pair.settings.t0, pair.settings.candidates) == (150, 4)
    one = open_synthesizer(RunDirectory(finished), 0)
    path = finished / "clients" / "0" / "sampling.json"
    path.rename(tmp_path / "aside")
    try:
        found = open_synthesizer(RunDirectory(finished), 0).settings
    finally:
        (tmp_path / "aside").rename(path)
    assert (found.t0, found.fine_labels, found.candidates) == (150, False, 4)
    assert isinstance(one.coarse, GaussianDenoiser)


def test_the_way_from_the_draw_to_the_image_is_that_of_the_sampler(finished: Path) -> None:
    """The film begins with the Gaussians' draw at the hand-over and ends with the images."""
    one = open_synthesizer(RunDirectory(finished), 0)
    settings = dataclasses.replace(one.settings, candidates=1)
    one = dataclasses.replace(one, settings=settings)
    labels = np.array([1, 4, -1])
    states = record_states(one, labels, seed=9)
    assert [state.stage for state in states] == ["coarse", *["fine"] * 3, "image"]
    assert [state.t for state in states][:2] == [settings.t0] * 2
    np.testing.assert_array_equal(states[-1].noisy, one.sample(labels, seed=9))
    shared = dataclasses.replace(one, fine=None)
    states = record_states(shared, labels, seed=9)
    assert [state.stage for state in states] == ["coarse", "image"]
    np.testing.assert_array_equal(states[-1].noisy, shared.sample(labels, seed=9))


def test_candidates_of_a_custom_mechanism_are_refused_unless_it_sends_statistics(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(door, "_registered", dict(door._registered))  # forgotten afterwards
    config = small_config(
        privacy={"release": "tests.support.own_mechanisms:Half", "clip_norm": 6.0},
        sampling={"candidates": 3},
    )
    with pytest.raises(ConfigError, match=r"^sampling\.candidates: must be 1 without .* got 3"):
        check_models(set_up(config))


# --- The library's front door ------------------------------------------------------------------


def test_the_gaussians_of_a_run_are_a_classifier(finished: Path) -> None:
    made = fedpdm.gaussian_classifier(finished)
    test = fedpdm.load_images(config_of(), "test")
    found = made.log_probabilities(test.images)
    g = open_synthesizer(RunDirectory(finished), 0).gaussian_classifier()
    np.testing.assert_array_equal(found, g.log_probabilities(test.images))
    assert np.mean(made.labels(test.images) == test.labels) > 0.5  # of ten classes
    with pytest.raises(ValueError, match=r"has not finished|is not a run directory"):
        fedpdm.gaussian_classifier(finished.parent)


def test_another_run_has_no_gaussians(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "images")
    run.open(small_config(), resume=False)
    with pytest.raises(ValueError, match=r"is no class Gaussians; privacy\.release .* got images"):
        fedpdm.gaussian_classifier(run)


def test_the_api_samples_gaussians_as_the_config_says(finished: Path) -> None:
    config = config_of(handover=200, fine_labels=True, candidates=2)
    one = open_synthesizer(RunDirectory(finished), 0)
    coarse = fedpdm.gaussian_classifier(finished).denoiser
    images = fedpdm.sample(config, coarse, one.fine, [1, 2, -1], seed=4)
    pair = dataclasses.replace(one, settings=sampler_settings(set_up(config)))
    generator = torch_generator(4, Purpose.SAMPLING)
    expected = pair.draw_pixels(np.array([1, 2, -1]), generator=generator)
    np.testing.assert_array_equal(images, expected)
    alone = fedpdm.sample(config, coarse, None, [1, 2, -1], seed=4)
    assert alone.shape == images.shape
    with pytest.raises(ValueError, match=r"labels must be whole numbers in \[-1, 9\]"):
        fedpdm.sample(config, coarse, None, [10])
    with pytest.raises(ValueError, match=r"do not belong to this config: privacy\.release images"):
        fedpdm.sample(small_config(), coarse, None, [1])
