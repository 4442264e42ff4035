"""A client's own choice of how to sample, with fine models whose faults are known."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
import torch

from fedpdm.config import config_from_mapping
from fedpdm.data import normalize
from fedpdm.data.client_images import ClientImages
from fedpdm.data.spec import ImageSpec
from fedpdm.diffusion.gaussian import GaussianDenoiser
from fedpdm.evaluation import trials
from fedpdm.evaluation.choosing import choose_sampling, most_calls
from fedpdm.evaluation.trials import Likeness, Trials
from fedpdm.jobs import progress
from fedpdm.setup.choice import SamplingChoice, fallback
from fedpdm.setup.run_setup import RunSetup, set_up_for
from tests.support.gaussian_toys import PIXELS, SIDE, client_with, gaussians_of

GAUSSIANS = gaussians_of(3)
RARE = 2


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three clusters need no long training of the classifier."""
    monkeypatch.setattr(trials, "CLASSIFIER_STEPS", 60)


def setup_of(**sections: Any) -> RunSetup:
    given: dict[str, Any] = {
        "run": {"rounds": 3, "seed": 5},
        "privacy": {"release": "statistics", "clip_norm": 2.0},
        "coarse": {"training": "server"},
        "sampling": {"own_classes": "never"},
    }
    for name, section in sections.items():
        given[name] = {**given.get(name, {}), **section}
    spec = ImageSpec(channels=1, resolution=SIDE, num_classes=3, shift=0.0)
    return set_up_for(config_from_mapping(given), spec)


def pixels_of(x: torch.Tensor) -> np.ndarray:
    shaped = ((x.view(-1, 1, SIDE, SIDE) + 1.0) * 127.5).round().clamp(0, 255)
    return shaped.to(torch.uint8).numpy()


def client(*, majority: int = 100, rare: int = 10, heldout: int = 20) -> ClientImages:
    """Images that the Gaussians draw: `majority` of classes 0 and 1, of which `heldout` each are
    held out, and `rare` of class 2."""
    labels = torch.tensor([0, 1]).repeat_interleave(majority)
    labels = torch.cat([labels, torch.full((rare,), RARE)])
    drawn = GAUSSIANS.draw(labels, generator=torch.Generator().manual_seed(11))
    held = np.concatenate([np.arange(heldout), majority + np.arange(heldout)])
    return client_with(pixels_of(drawn), labels.numpy(), held, majority=(0, 1))


def nearest(answer: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    return images[torch.cdist(answer.flatten(1), images).argmin(dim=1)].view_as(answer)


class Fine:
    """The right answer for class Gaussians, and a fault: `fault` names it.

    "copies": told the rare class, it answers with the nearest training image of that class.
    "above": taken from above 0.2 T, it answers with a chessboard.
    "alone": taken from above 0.3 T, it does so, and "by heart": it answers with the nearest
    training image.
    """

    def __init__(self, setup: RunSetup, held: ClientImages, fault: str = "") -> None:
        self.exact = GaussianDenoiser(GAUSSIANS, setup.schedule)
        self.fault, self.calls = fault, 0
        self.start = self.last = 0
        self.too_high = False
        self.every = normalize(held.images.images[held.train], shift=0.0).flatten(1)
        self.own = self.every[torch.from_numpy(held.train_labels == RARE)]

    def __call__(
        self, x_t: torch.Tensor, t: torch.Tensor, *, labels: torch.Tensor, clipped: Any = None
    ) -> torch.Tensor:
        self.calls += len(x_t)
        level = int(t[0])
        self.start = max(self.start, level)
        answer = self.exact(x_t, t, labels=labels)
        if self.fault == "copies" and bool((labels == RARE).any()):
            copied = nearest(answer, self.own)
            answer = torch.where((labels == RARE)[:, None, None, None], copied, answer)
        if level > self.last:  # a chain begins
            self.too_high = level > (200 if self.fault == "above" else 300)
        self.last = level
        if self.fault == "by heart" and self.too_high:
            answer = nearest(answer, self.every)
        if self.fault in ("above", "alone") and self.too_high:
            answer = (torch.arange(PIXELS) % 2 * 2.0 - 1.0).view(1, 1, SIDE, SIDE).expand_as(answer)
        return answer


def choice_of(
    fault: str = "", *, held: ClientImages | None = None, **sections: Any
) -> tuple[SamplingChoice, Fine]:
    setup, held = setup_of(**sections), held or client()
    fine = Fine(setup, held, fault)
    coarse = GaussianDenoiser(GAUSSIANS, setup.schedule)
    return choose_sampling(
        setup, held, coarse, fine, device=torch.device("cpu"), where="a test"
    ), fine


@pytest.mark.slow
def test_a_fine_model_that_copies_when_told_is_not_told() -> None:
    """On the classes with held-out images labels do no harm: copies of the rare class decide."""
    honest, _ = choice_of(sampling={"handover": 300, "candidates": 1})
    copying, _ = choice_of("copies", sampling={"handover": 300, "candidates": 1})
    assert honest.fine_labels  # else this class drifts to others
    assert not copying.fine_labels
    assert copying.scores["near_copies"] <= 0.08 + copying.scores["near_copies_without_copying"]
    forced, _ = choice_of(
        "copies", sampling={"handover": 300, "candidates": 1, "fine_labels": True}
    )
    assert forced.fine_labels  # the config stands
    assert forced.scores["near_copies"] > 0.9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fidelities", "candidates"),
    [((0.70, 0.97), 4), ((0.97, 0.70), 1), ((0.95, 0.97), 1), ((1.0, 1.0), 1), ((0.9, 1.0), 4)],
)
def test_what_is_not_recognised_is_not_chosen_for_its_distance(
    fidelities: tuple[float, float], candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One candidate has the smaller distance; it is taken if as many images are recognised, but for
    what 96 images may show by chance (a standard error of 2.7% at 0.97)."""
    likeness = [Likeness(fidelities[0], 0.1), Likeness(fidelities[1], 0.2)]
    monkeypatch.setattr(Trials, "likeness", lambda *_: likeness)
    choice, _ = choice_of(sampling={"handover": 150, "fine_labels": False})
    assert choice.candidates == candidates
    at = (1, 4).index(candidates)
    assert choice.scores["fidelity"] == fidelities[at]
    assert choice.scores["distance"] == likeness[at].distance


@pytest.mark.slow
def test_no_distance_is_computed_of_what_is_not_accepted() -> None:
    """Told the rare class the model copies: the other half of these images is never drawn."""
    sampling = {"candidates": 1, "handover": 300}
    _, honest = choice_of(sampling=sampling)
    choice, copying = choice_of("copies", sampling=sampling)
    alone, _ = choice_of("copies", sampling={**sampling, "fine_labels": False})
    assert honest.calls == 2 * (96 + 48) * 8
    assert copying.calls == (96 + 2 * 48) * 8
    assert choice.scores == alone.scores
    assert "chosen among 2" in choice.why


@pytest.mark.slow
def test_how_far_a_choice_is_is_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    choice_of(sampling={"candidates": 2, "handover": 100})
    lines = capsys.readouterr().err.splitlines()
    assert re.fullmatch(r"a test choice, classifier: step 20/60, loss .*, \d+ s left", lines[0])
    for what, count in (("near-copies", 48), ("likeness", 96)):
        own = [each for each in lines if f"choice, {what}: step " in each]
        total = 2 * 2 * count * 8  # labels or none, candidates, images, steps
        assert own[0].startswith(f"a test choice, {what}: step {2 * count}/{total}, ")
        assert len(own) == 2 * 8 - 1  # the last step ends it


@pytest.mark.slow
def test_a_hand_over_where_the_fine_model_fails_is_not_chosen() -> None:
    bad, _ = choice_of("above", sampling={"fine_labels": True, "candidates": 1})
    assert bad.handover <= 200
    told, _ = choice_of(sampling={"fine_labels": True, "candidates": 1, "handover": 300})
    worse, _ = choice_of("above", sampling={"fine_labels": True, "candidates": 1, "handover": 300})
    assert worse.scores["distance"] > told.scores["distance"] + 0.05
    assert bad.scores["distance"] < worse.scores["distance"]


@pytest.mark.slow
def test_candidates_help_where_classes_drift() -> None:
    """Not told the class, at a high hand-over: draws go over to the other class."""
    sampling, held = {"handover": 300, "fine_labels": False}, client(majority=400)
    best, _ = choice_of(held=held, sampling=sampling)
    assert best.candidates == 4
    one, _ = choice_of(held=held, sampling={**sampling, "candidates": 1})
    assert best.scores["distance"] < one.scores["distance"]


@pytest.mark.slow
def test_the_cost_is_bounded_and_equal_seeds_choose_alike() -> None:
    choice, fine = choice_of(sampling={"own_classes": "auto"})
    assert most_calls() == 46_080 + 12_000
    assert 0 < fine.calls <= most_calls()
    assert fine.calls == 46_080 + (choice.candidates + 1) * 96 * 25
    assert fine.start == 1000  # the own model alone
    assert choice.handover in (100, 150, 200, 250, 300)
    assert choice.candidates in (1, 4)
    assert "chosen among 20 on 40 held-out images of 2 classes" in choice.words
    fixed = {"sampling": {"fine_labels": False, "candidates": 1}, "schedule": {"num_steps": 500}}
    half, fine = choice_of(**fixed)
    assert half.handover in (50, 75, 100, 125, 150)
    assert fine.calls == 5 * (96 + 48) * 8
    assert choice_of(**fixed)[0] == half
    other, _ = choice_of(run={"seed": 6}, **fixed)
    assert other.scores != half.scores


@pytest.mark.slow
def test_classes_with_many_images_are_the_own_models_where_it_is_better() -> None:
    """Not told the class at a high hand-over, draws go over to the other class; told it from pure
    noise they do not. A model that fails there, or knows its images by heart, is not left alone."""
    sampling = {"own_classes": "auto", "handover": 300, "fine_labels": False, "candidates": 1}
    better, fine = choice_of(sampling=sampling)
    assert better.own_classes == (0, 1)
    assert better.words.count("; classes 0, 1 by its own model alone (chosen") == 1
    assert fine.start == 1000
    assert better.scores["own_distance"] < better.scores["distance"]
    failing, _ = choice_of("alone", sampling=sampling)
    assert failing.own_classes == ()
    assert failing.scores["own_distance"] > failing.scores["distance"]
    copying, _ = choice_of("by heart", sampling=sampling)
    assert copying.own_classes == ()
    assert copying.scores["own_near_copies"] > 0.9
    never, fine = choice_of(sampling={**sampling, "own_classes": "never"})
    assert never == dataclasses.replace(better, own_classes=(), scores=never.scores)
    assert fine.start == 300
    assert "by its own" not in never.words


@pytest.mark.slow
def test_a_fine_model_is_not_asked_where_it_was_not_trained() -> None:
    choice, fine = choice_of(fine={"t_range": "below_t0"}, sampling={"own_classes": "auto"})
    assert fine.start == 150
    assert choice.handover in (100, 150)
    assert fine.calls == 2 * 2 * 4 * (96 + 48) * 8


@pytest.mark.parametrize(
    ("held", "words"),
    [
        (client(heldout=4), "too few held-out images to choose on: 0 of 0 classes"),
        (client(heldout=9), "too few held-out images to choose on: 18 of 2 classes, needed 20"),
        (client(heldout=0), "0 of 0 classes, needed 20 of 2, 5 of each"),
        (
            dataclasses.replace(client(), majority=(0,)),
            "too few held-out images to choose on: 20 of 1 classes",
        ),
    ],
)
def test_with_too_few_images_stands_the_fallback(held: ClientImages, words: str) -> None:
    choice, fine = choice_of(held=held)
    assert (choice.handover, choice.fine_labels, choice.candidates) == (150, False, 4)
    assert words in choice.why
    assert fine.calls == 0
    some, _ = choice_of(held=held, sampling={"handover": 200, "candidates": 2})
    assert (some.handover, some.fine_labels, some.candidates) == (200, False, 2)


def test_what_cannot_be_compared_has_the_fallback() -> None:
    setup = setup_of(sampling={"coarse_worth": 10.0})
    coarse = GaussianDenoiser(GAUSSIANS, setup.schedule)
    held = client()
    choice = choose_sampling(
        setup, held, coarse, Fine(setup, held), device=torch.device("cpu"), where="a test"
    )
    assert choice == fallback(setup, "sampling.coarse_worth mixes both models")
    spec = ImageSpec(channels=1, resolution=160, num_classes=3, shift=0.0)
    large = set_up_for(setup_of().config, spec)
    choice = choose_sampling(
        large, held, coarse, Fine(setup, held), device=torch.device("cpu"), where="a test"
    )
    assert choice.why == "nothing is chosen on images of this size"


@pytest.mark.slow
def test_held_out_images_decide_and_not_one_of_training() -> None:
    """Other held-out images, another distance; they are in no near-copy and in no classifier."""
    held = client()
    images = held.images.images.copy()
    images[held.heldout] = 255 - images[held.heldout]
    other = dataclasses.replace(held, images=dataclasses.replace(held.images, images=images))
    sampling = {"handover": 150, "fine_labels": True, "candidates": 1}
    choice, _ = choice_of(held=held, sampling=sampling)
    turned, _ = choice_of(held=other, sampling=sampling)
    assert turned.scores["distance"] > choice.scores["distance"] + 0.5
    assert turned.scores["near_copies"] == choice.scores["near_copies"]
