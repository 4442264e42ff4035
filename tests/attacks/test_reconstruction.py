"""Reconstruction against closed forms, brute force and planted cases."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from scipy import ndimage, special, stats
from scipy.spatial.distance import cdist

from fedpdm.attacks.denoising import Reconstructor
from fedpdm.attacks.membership.targets import AttackTarget
from fedpdm.attacks.optimal import CandidateDenoiser
from fedpdm.attacks.pretraining import pretrain
from fedpdm.attacks.reconstruction import (
    ReconstructionResult,
    attack_uploads,
    rescale,
    unclip_factor,
)
from fedpdm.attacks.recovery import (
    blind_guess,
    identify,
    row_distances,
    share_interval,
    structural_similarity,
)
from fedpdm.data import ImageSet
from fedpdm.diffusion.denoisers import DenoiserSpec, DenoisingFunction
from fedpdm.diffusion.gmm import GaussianMixture, MixtureDenoiser
from fedpdm.diffusion.presets import PRESETS
from fedpdm.diffusion.schedule import make_schedule
from fedpdm.diffusion.training import OptimizerSettings
from fedpdm.privacy.mechanism import release
from fedpdm.privacy.noise import SeededNoise
from fedpdm.privacy.types import ReleasedDataset

SCHEDULE = make_schedule("linear")
T = SCHEDULE.num_steps
CPU = torch.device("cpu")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def upload(
    x: Any, labels: torch.Tensor, *, t0: int, clip_norm: float = 40.0, seed: int = 0
) -> ReleasedDataset:
    return release(
        torch.as_tensor(x),
        labels,
        schedule=SCHEDULE,
        t0=t0,
        clip_norm=clip_norm,
        shift=0.0,
        noise=SeededNoise(np.random.SeedSequence(seed)),
        largest=None if x.dtype in (np.uint8, torch.uint8) else 1e4,
    )


def knows(denoiser: DenoisingFunction, low: int = 1, high: int = T) -> AttackTarget:
    return AttackTarget(denoiser=denoiser, schedule=SCHEDULE, t_range=(low, high))


def attack(released: ReleasedDataset, originals: Any, **options: Any) -> ReconstructionResult:
    given: dict[str, Any] = {"reconstructors": [], "num_bootstrap": 50, "num_steps": 20, **options}
    return attack_uploads(
        released, originals, generator=seeded(1), rng=np.random.default_rng(2), **given
    )


def mean_square(result: ReconstructionResult, key: tuple[str, str]) -> tuple[float, float]:
    """Mean squared distance of an attacker and its standard error."""
    squares = row_distances(result.images[key], result.originals) ** 2
    return float(squares.mean()), float(squares.std() / math.sqrt(len(squares)))


def blobs(count: int, *, side: int = 8, seed: int = 0) -> np.ndarray:
    """Smooth grey images that differ, uint8 (count, 1, side, side)."""
    noise = np.random.default_rng(seed).normal(size=(count, 1, side, side))
    smooth = ndimage.gaussian_filter(noise, (0, 0, 1.0, 1.0))
    return np.clip(128 + 300 * smooth, 0, 255).astype(np.uint8)


# --- the linear-Gaussian case ---------------------------------------------------------------

DIM, VARIANCE, COUNT = 16, 2.0, 3000
GAUSS = GaussianMixture(
    means=torch.full((1, DIM), 3.0).double(), variances=torch.full((1, DIM), VARIANCE).double()
)
LABELS = torch.zeros(COUNT, dtype=torch.int64)
POINTS = GAUSS.draw(LABELS, generator=seeded(7)).view(COUNT, 1, 1, DIM)


def posterior_error(noise_variance: float) -> float:
    """E ||x - E[x | x + noise]||^2 = d v s2 / (v + s2)."""
    return DIM * VARIANCE * noise_variance / (VARIANCE + noise_variance)


@pytest.fixture(scope="module", params=[150, 400])
def gaussian(request: pytest.FixtureRequest) -> ReconstructionResult:
    t0 = request.param
    wrong = GaussianMixture(means=GAUSS.means - 0.7, variances=GAUSS.variances)
    narrow = GaussianMixture(means=GAUSS.means, variances=GAUSS.variances / 3)
    exact = MixtureDenoiser(GAUSS, SCHEDULE)
    chain = MixtureDenoiser(GAUSS.noised(SCHEDULE.alpha_bar(t0)), SCHEDULE)
    return attack(
        upload(POINTS, LABELS, t0=t0),
        POINTS,
        reconstructors=[
            Reconstructor(name="optimal", target=knows(exact)),
            Reconstructor(name="global", target=knows(exact, t0 + 1)),
            Reconstructor(name="two chains", target=knows(chain), noise_to_noise=True),
            Reconstructor(name="wrong mean", target=knows(MixtureDenoiser(wrong, SCHEDULE))),
            Reconstructor(name="too narrow", target=knows(MixtureDenoiser(narrow, SCHEDULE))),
        ],
        num_steps=10,
    )


@pytest.mark.slow
def test_errors_are_the_closed_forms(gaussian: ReconstructionResult) -> None:
    t0 = gaussian.t0
    abar = SCHEDULE.alpha_bar(t0)
    s2 = SCHEDULE.noise_to_signal(t0) ** 2
    # To the model of x_tilde the upload comes with fresh noise of level t0: abar^2 in all.
    expected = {
        ("none", "rescaled"): DIM * s2,
        ("blind", "class_mean"): DIM * VARIANCE * COUNT / (COUNT - 1),
        ("optimal", "one_shot"): posterior_error(s2),
        ("global", "one_shot"): posterior_error(SCHEDULE.noise_to_signal(t0 + 1) ** 2),
        ("two chains", "one_shot"): posterior_error((1 - abar**2) / abar**2),
    }
    for key, value in expected.items():
        mean, error = mean_square(gaussian, key)
        assert abs(mean - value) < 4.5 * error, key
    # The bound is tight enough to see another posterior: that of twice the noise.
    mean, error = mean_square(gaussian, ("optimal", "one_shot"))
    assert abs(mean - posterior_error(2 * s2)) > 10 * error


@pytest.mark.slow
def test_nobody_beats_the_optimal_attacker(gaussian: ReconstructionResult) -> None:
    optimal, _ = mean_square(gaussian, ("optimal", "one_shot"))
    squares = row_distances(gaussian.images["optimal", "one_shot"], gaussian.originals) ** 2
    for key, image in gaussian.images.items():
        gain = squares - row_distances(image, gaussian.originals) ** 2
        assert gain.mean() <= 4 * gain.std() / math.sqrt(COUNT), key
    assert mean_square(gaussian, ("wrong mean", "one_shot"))[0] > 1.02 * optimal
    assert mean_square(gaussian, ("optimal", "continued"))[0] > optimal
    assert gaussian.best("optimal").method == "one_shot"
    with pytest.raises(ValueError, match=r"^attacker must be one of none, blind, optimal, "):
        gaussian.best("nobody")


@pytest.mark.slow
def test_recovery_is_the_share_of_distances(gaussian: ReconstructionResult) -> None:
    by_key = {(row.attacker, row.method): row for row in gaussian.rows}
    none, blind = by_key["none", "rescaled"], by_key["blind", "class_mean"]
    assert (none.recovery, none.recovery_low, none.recovery_high) == (1.0, 1.0, 1.0)
    assert (blind.recovery_blind, blind.recovery_blind_high) == (1.0, 1.0)
    for row in gaussian.rows:
        assert row.recovery == pytest.approx(row.distance / none.distance)
        assert row.recovery_blind == pytest.approx(row.distance / blind.distance)
        assert row.recovery_low <= row.recovery <= row.recovery_high
        assert row.ssim is None
    # By chance alone sqrt(v s2 / (v + s2) / s2), in many dimensions.
    s2 = SCHEDULE.noise_to_signal(gaussian.t0) ** 2
    assert by_key["optimal", "one_shot"].recovery == pytest.approx(
        math.sqrt(VARIANCE / (VARIANCE + s2)), rel=0.03
    )


def test_models_are_asked_at_levels_they_know() -> None:
    asked: list[int] = []

    def recorded(x_t: torch.Tensor, t: torch.Tensor, **_: Any) -> torch.Tensor:
        asked.extend(t.unique().tolist())
        return x_t

    released = upload(POINTS[:4], LABELS[:4], t0=300)
    attack(
        released,
        POINTS[:4],
        reconstructors=[Reconstructor(name="global", target=knows(recorded, 301))],
    )
    assert len(asked) > 10
    assert set(asked) == {301}
    asked.clear()
    attack(
        released,
        POINTS[:4],
        reconstructors=[Reconstructor(name="fine", target=knows(recorded, 1, 300))],
    )
    assert max(asked) == 300
    assert min(asked) < 30
    short = Reconstructor(name="fine", target=knows(recorded, 1, 299))
    with pytest.raises(
        ValueError, match=r"^fine: t0 must be at most the largest level .* 299, got"
    ):
        attack(released, POINTS[:4], reconstructors=[short])
    double = Reconstructor(name="x", target=knows(recorded))
    with pytest.raises(ValueError, match=r"^reconstructors must have names of their own, got 'x'"):
        attack(released, POINTS[:4], reconstructors=[double, double])
    other = AttackTarget(denoiser=recorded, schedule=make_schedule("cosine"), t_range=(1, T))
    with pytest.raises(ValueError, match=r"^x: the model's schedule must be the release's$"):
        attack(released, POINTS[:4], reconstructors=[Reconstructor(name="x", target=other)])


def test_labels_and_flags_are_passed_as_said() -> None:
    seen: list[tuple[list[int], Any]] = []

    def recorded(
        x_t: torch.Tensor, t: torch.Tensor, *, labels: torch.Tensor, clipped: Any
    ) -> torch.Tensor:
        seen.append((labels.tolist(), None if clipped is None else clipped.tolist()))
        return x_t

    labels = torch.tensor([2, 5])
    for known in (True, False):
        target = AttackTarget(
            denoiser=recorded, schedule=SCHEDULE, t_range=(1, T), labels_known=known
        )
        for flag in (None, True, False):
            seen.clear()
            who = Reconstructor(name="x", target=target, clipped=flag)
            attack(upload(POINTS[:2], labels, t0=9), POINTS[:2], reconstructors=[who])
            expected = [2, 5] if known else [-1, -1]
            assert seen == [(expected, None if flag is None else [flag, flag])] * len(seen)
            assert len(seen) == 10  # once, and at each of 9 levels


# --- images ---------------------------------------------------------------------------------


def test_tiny_t0_recovers_and_large_t0_does_not() -> None:
    images = blobs(80)
    labels = torch.arange(80) % 4
    scaled = torch.from_numpy(images).float() / 127.5 - 1.0
    for t0, recovers in ((1, True), (990, False)):
        who = CandidateDenoiser(scaled[40:], labels[40:], schedule=SCHEDULE)  # not those attacked
        released = upload(images[:40], labels[:40], t0=t0, clip_norm=10.0)
        result = attack(
            released, images[:40], reconstructors=[Reconstructor(name="own", target=knows(who))]
        )
        for row in result.rows:
            found = row.identification
            assert found.chance == 1 / 40
            assert row.identification_in_class.chance == 1 / 10
            if recovers and row.attacker == "none":
                assert found.rate == 1.0
                assert row.ssim is not None
                assert row.ssim > 0.99
                assert row.recovery_blind < 0.05
            if not recovers:
                assert found.low <= 1 / 40 <= found.high
                assert row.ssim is not None
                assert row.ssim < 0.6
                assert row.recovery_blind > 0.9
        assert (result.upload.rate == 1.0) == recovers
        if not recovers:
            assert result.upload.low <= 1 / 40 <= result.upload.high
        assert all(bool((x.abs() <= 1).all()) for x in result.images.values())


def test_who_knows_the_candidates_is_not_beaten() -> None:
    images = blobs(60)
    scaled = torch.from_numpy(images).float() / 127.5 - 1.0
    labels = torch.arange(60) % 3
    clip_norm, t0 = 2.0, 450
    who = CandidateDenoiser(scaled, labels, schedule=SCHEDULE, clip_norm=clip_norm)
    gauss = GaussianMixture(
        means=scaled.flatten(1).mean(dim=0, keepdim=True).double(),
        variances=scaled.flatten(1).var(dim=0, keepdim=True).double(),
    )
    pixelwise = AttackTarget(
        denoiser=MixtureDenoiser(gauss, SCHEDULE),
        schedule=SCHEDULE,
        t_range=(1, T),
        labels_known=False,
    )
    result = attack(
        upload(images, labels, t0=t0, clip_norm=clip_norm),
        images,
        reconstructors=[
            Reconstructor(name="optimal", target=knows(who), answers_clipped=False),
            Reconstructor(name="pixelwise", target=pixelwise),
        ],
        unclip=unclip_factor(images, clip_norm=clip_norm, shift=0.0),
    )
    squares = {key: mean_square(result, key)[0] for key in result.images}
    assert min(squares, key=lambda key: squares[key]) == ("optimal", "one_shot")
    best = result.best("optimal").identification_in_class
    # The posterior mean is the likelihood's choice, or a blend; the upload itself says most.
    assert best.num_right <= result.upload_in_class.num_right
    assert 0.1 < result.upload_in_class.rate < 1.0


def test_candidate_denoiser_is_the_posterior() -> None:
    candidates = torch.randn((12, 1, 2, 3), generator=seeded(3)) * 2
    labels = torch.tensor([0, 1, 2] * 4)
    denoiser = CandidateDenoiser(candidates, labels, schedule=SCHEDULE, clip_norm=3.0)
    x_t = torch.randn((5, 1, 2, 3), generator=seeded(4))
    t = torch.tensor([100, 200, 300, 400, 500])
    given = torch.tensor([0, 1, 2, -1, -1])
    answer = denoiser(x_t, t, labels=given)
    rows = candidates.flatten(1).double().numpy()
    for i in range(5):
        abar = SCHEDULE.alpha_bar(int(t[i]))
        norms = np.linalg.norm(rows, axis=1, keepdims=True)
        means = rows * np.minimum(1.0, 3.0 / norms)
        logs = np.array(
            [
                stats.norm.logpdf(x_t[i].flatten().numpy(), abar**0.5 * m, (1 - abar) ** 0.5).sum()
                for m in means
            ]
        )
        logs[(int(given[i]) >= 0) & (labels.numpy() != int(given[i]))] = -np.inf
        expected = special.softmax(logs) @ rows
        assert np.allclose(answer[i].flatten().numpy(), expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"^candidates must hold an image of class 7, got none"):
        denoiser(x_t[:1], t[:1], labels=torch.tensor([7]))
    with pytest.raises(ValueError, match=r"^candidates must be \(M, \*\) with labels \(M,\)"):
        CandidateDenoiser(candidates, labels[:3], schedule=SCHEDULE)


def test_unclipping_gives_the_length_back() -> None:
    directions = torch.randn((30, 1, 4, 4), generator=seeded(1))
    x = 6.0 * directions / directions.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    factor = unclip_factor(x[:15], clip_norm=2.0, shift=0.0)
    assert factor == pytest.approx(3.0)
    assert unclip_factor(x, clip_norm=20.0, shift=0.0) == 1.0
    released = upload(x, torch.zeros(30, dtype=torch.int64), t0=1, clip_norm=2.0)
    assert row_distances(rescale(released), x) == pytest.approx(np.full(30, 4.0), rel=0.03)
    assert row_distances(rescale(released, unclip=factor), x).max() < 0.3


def test_projection_brings_every_image_nearer() -> None:
    images = blobs(20)
    labels = torch.zeros(20, dtype=torch.int64)
    released = upload(images, labels, t0=500)
    projected = attack(released, images)
    free = attack(released, torch.from_numpy(images).float() / 127.5 - 1.0)
    key = ("none", "rescaled")
    near, far = (row_distances(r.images[key], r.originals) for r in (projected, free))
    assert (near < far).all()
    # Identification looks at what was there before.
    assert projected.rows[0].identification == free.rows[0].identification


# --- measures -------------------------------------------------------------------------------


def test_ssim_of_equal_images_is_one_and_follows_the_formula() -> None:
    a = torch.from_numpy(blobs(6, side=12)).float() / 127.5 - 1.0
    b = (a + 0.4 * torch.randn(a.shape, generator=seeded())).clamp(-1, 1)
    bounds = (-1.0, 1.0)
    same = structural_similarity(a, a, bounds=bounds)
    assert same is not None
    assert np.allclose(same, 1.0)
    got = structural_similarity(a, b, bounds=bounds)

    def mean(x: np.ndarray) -> np.ndarray:
        return np.asarray(ndimage.gaussian_filter(x, 1.5, truncate=3.5, mode="mirror"))

    def by_hand(x: np.ndarray, y: np.ndarray) -> float:
        """Wang et al. 2004, Eq. 13."""
        mx, my, c1, c2 = mean(x), mean(y), (0.01 * 2) ** 2, (0.03 * 2) ** 2
        vx, vy, cov = mean(x * x) - mx**2, mean(y * y) - my**2, mean(x * y) - mx * my
        top = (2 * mx * my + c1) * (2 * cov + c2)
        return float((top / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())

    expected = [
        by_hand(x[0].double().numpy(), y[0].double().numpy()) for x, y in zip(a, b, strict=True)
    ]
    assert got is not None
    assert np.allclose(got, expected, atol=1e-6)
    assert max(expected) < 0.95
    assert structural_similarity(a[..., :5], a[..., :5], bounds=bounds) is None


def test_identification_is_brute_force() -> None:
    rng = np.random.default_rng(0)
    candidates = rng.normal(size=(300, 4))
    estimates = candidates + rng.normal(size=(300, 4)) * 0.5
    labels = rng.integers(0, 5, size=300)
    every = cdist(estimates, candidates)
    tensors = torch.from_numpy(estimates), torch.from_numpy(candidates)
    got = identify(*tensors, confidence=0.9)
    assert got.num_right == (every.argmin(axis=1) == np.arange(300)).sum()
    assert (got.chance, got.rate) == (pytest.approx(1 / 300), got.num_right / 300)
    interval = stats.binomtest(got.num_right, 300).proportion_ci(0.9, method="exact")
    assert (got.low, got.high) == (interval.low, interval.high)
    farther = [(every[i] > every[i, i]).sum() / 299 for i in range(300)]
    assert got.rank_auc == pytest.approx(np.mean(farther))

    inside = np.where(labels[:, None] == labels, every, np.inf)
    within = identify(*tensors, labels=torch.from_numpy(labels))
    assert within.num_right == (inside.argmin(axis=1) == np.arange(300)).sum()
    sizes = np.bincount(labels)[labels]
    assert within.chance == pytest.approx((1 / sizes).mean())
    assert within.num_right > got.num_right


def test_identification_of_nothing_is_at_chance() -> None:
    candidates = torch.randn((200, 6), generator=seeded())
    same = identify(torch.zeros(200, 6), candidates)
    assert (same.num_right, same.rank_auc) == (1, pytest.approx(0.5))
    equal = identify(torch.zeros(4, 2), torch.ones(4, 2))
    assert (equal.num_right, equal.rank_auc) == (1, 0.5)
    alone = identify(candidates[:2], candidates[:2], labels=torch.tensor([0, 1]))
    assert (alone.rate, alone.chance, alone.rank_auc) == (1.0, 1.0, 0.5)


def test_blind_guess_leaves_the_image_out() -> None:
    x = torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 7.0], [100.0, 100.0]])
    guess = blind_guess(x, torch.tensor([0, 0, 0, 1]))
    assert guess[0].tolist() == [4.0, 4.5]
    assert guess[2].tolist() == [2.0, 1.0]
    assert guess[3].tolist() == [3.0, 3.0]  # the only one of its class: all others
    with pytest.raises(ValueError, match=r"^originals must hold at least 2 images, got 1"):
        blind_guess(x[:1], torch.tensor([0]))


@pytest.mark.slow
def test_share_interval_covers_the_share() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(200):
        reference = rng.gamma(4.0, size=100)
        distances = reference * rng.uniform(0.2, 0.8, size=100)
        share, low, high = share_interval(
            distances, reference, confidence=0.9, num_bootstrap=200, rng=rng
        )
        assert share == pytest.approx(distances.sum() / reference.sum())
        hits += low <= 0.5 <= high
    assert 0.82 <= hits / 200 <= 0.96
    zero = np.zeros(5)
    assert share_interval(zero, zero, confidence=0.9, num_bootstrap=9, rng=rng) == (0.0, 0.0, 0.0)


# --- the pretrained attacker ----------------------------------------------------------------


@pytest.mark.slow
def test_pretrained_attacker_learns_from_its_public_images() -> None:
    public = ImageSet(
        images=blobs(300, seed=1),
        labels=np.zeros(300, dtype=np.int64),
        class_names=("blob",),
        background=0.0,
    )
    private = blobs(60, seed=2)
    labels = torch.zeros(60, dtype=torch.int64)
    t0, clip_norm = 400, 5.0
    released = upload(private, labels, t0=t0, clip_norm=clip_norm)
    spec = DenoiserSpec(
        preset=PRESETS["nano"], resolution=8, channels=1, num_classes=1, prediction="v",
        knows_clipping=False,
    )  # fmt: skip

    def train(steps: int, ema_decay: float = 0.95) -> AttackTarget:
        settings = OptimizerSettings(
            lr=2e-3, batch_size=32, total_steps=steps, warmup_steps=10, ema_decay=ema_decay
        )
        return pretrain(
            public, spec, released.parameters, schedule=SCHEDULE, settings=settings,
            generator=seeded(3), device=CPU,
        )[0]  # fmt: skip

    trained, fresh = train(150), train(1)
    assert trained.t_range == (1, t0)
    result = attack(
        released,
        private,
        reconstructors=[
            Reconstructor(name="pretrained", target=trained),
            Reconstructor(name="untrained", target=fresh),
        ],
        unclip=unclip_factor(public.images, clip_norm=clip_norm, shift=0.0),
    )
    assert result.best("pretrained").distance < 0.9 * result.best("untrained").distance
    assert result.best("pretrained").recovery < 0.8
    again, last = train(1).parameters, train(1, ema_decay=0.0).parameters
    assert not any(torch.equal(a, b) for a, b in zip(fresh.parameters, last, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters, again, strict=True))

    wrong = DenoiserSpec(
        preset=PRESETS["micro"], resolution=8, channels=3, num_classes=1, prediction="v",
        knows_clipping=False,
    )  # fmt: skip
    settings = OptimizerSettings(lr=1e-3, batch_size=4, total_steps=1)
    options: dict[str, Any] = {"settings": settings, "generator": seeded(), "device": CPU}
    with pytest.raises(ValueError, match=r"^images must be of shape \(3, 8, 8\), got \(1, 8, 8\)"):
        pretrain(public, wrong, released.parameters, schedule=SCHEDULE, **options)
    other = make_schedule("cosine")
    with pytest.raises(ValueError, match=r"^schedule must have alpha_bar"):
        pretrain(public, spec, released.parameters, schedule=other, **options)


def test_attack_refuses() -> None:
    released = upload(POINTS[:4], LABELS[:4], t0=50)
    with pytest.raises(
        ValueError, match=r"^released must release one row per image, \(3, 1, 1, 16"
    ):
        attack(released, POINTS[:3])
    who = Reconstructor(name="x", target=knows(MixtureDenoiser(GAUSS, SCHEDULE)))
    with pytest.raises(ValueError, match=r"^method must be one of one_shot, continued, got 'both'"):
        who.reconstruct(released.x_tilde, 50, released.labels, method="both", generator=seeded())
