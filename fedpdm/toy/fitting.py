"""From points to denoisers: release, then fit in closed form or train with the image objectives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from fedpdm.diffusion.objectives import denoising_loss, truncated_loss
from fedpdm.diffusion.training import OptimizerSettings, Trainer, class_weights
from fedpdm.privacy.mechanism import release
from fedpdm.privacy.noise import SeededNoise
from fedpdm.privacy.types import ReleasedDataset
from fedpdm.rng import Purpose, seed_sequence, torch_generator
from fedpdm.toy.denoisers import LinearDenoiser, MLPDenoiser, average_means, fit_means
from fedpdm.toy.federation import Models, Problem, draw_clients

__all__ = ["Clients", "fit_linear", "train_models"]

FAR = 50.0  # standard deviations: no point lies as far out as the mechanism's check of scale


@dataclass(frozen=True, kw_only=True, eq=False)
class Clients:
    """Raw points and releases of all clients, for `replicates` independent federations.

    `points[m]` is float32 (N_m, 1, 1, d), `labels[m]` int64 (N_m,) as in `draw_clients`,
    `releases[m]` what client m's mechanism made of them.
    """

    problem: Problem
    replicates: int
    points: list[torch.Tensor]
    labels: list[torch.Tensor]
    releases: list[ReleasedDataset]

    @property
    def num_classes(self) -> int:
        """Labels in all: replicates times K."""
        return self.replicates * self.problem.mixture.num_classes

    @classmethod
    def draw(cls, problem: Problem, *, replicates: int, seed: int) -> Clients:
        """Draw every client's points, and release each point once."""
        drawn = draw_clients(problem, replicates=replicates, seed=seed)
        spread = float(problem.mixture.variances.max().sqrt())
        largest = float(problem.mixture.means.abs().max()) + FAR * spread
        releases = [
            release(
                points,
                labels,
                schedule=problem.schedule,
                t0=problem.t0,
                clip_norm=problem.clip_norm,
                shift=0.0,
                noise=SeededNoise(seed_sequence(seed, Purpose.RELEASE_NOISE, client=client)),
                largest=largest,
            )
            for client, (points, labels) in enumerate(drawn)
        ]
        return cls(
            problem=problem,
            replicates=replicates,
            points=[points for points, _ in drawn],
            labels=[labels for _, labels in drawn],
            releases=releases,
        )


def _coarse_variances(problem: Problem) -> torch.Tensor:
    """(K, d) variances of the data of the coarse model's chain."""
    if problem.chain == "truncated":
        return problem.mixture.variances
    return problem.mixture.noised(problem.schedule.alpha_bar(problem.t0)).variances


def fit_linear(clients: Clients, *, client: int = 0) -> Models:
    """The minimisers of the objectives over `LinearDenoiser`, for one client.

    The coarse means are a federated average of the clients' own, of their releases alone.
    """
    problem, num_classes = clients.problem, clients.num_classes

    def denoiser(means: torch.Tensor, variances: torch.Tensor) -> LinearDenoiser:
        return LinearDenoiser(means, variances.repeat(clients.replicates, 1), problem.schedule)

    def means(points: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return fit_means(points.flatten(1), labels, num_classes=num_classes)

    counts = problem.counts.repeat(1, clients.replicates)
    released = average_means([means(r.x_tilde, r.labels) for r in clients.releases], counts)
    if problem.chain == "truncated":
        released = released / problem.schedule.alpha_bar(problem.t0) ** 0.5
    own = [means(x, y) for x, y in zip(clients.points, clients.labels, strict=True)]
    raw = problem.mixture.variances
    return Models(
        coarse=denoiser(released, _coarse_variances(problem)),
        fine=denoiser(own[client], raw),
        central=denoiser(average_means(own, counts), raw),
    )


Progress = Callable[[str], None]


def train_models(
    clients: Clients,
    *,
    kind: str,
    num_steps: int,
    seed: int,
    client: int = 0,
    batch_size: int = 128,
    lr: float = 0.005,
    say: Progress = lambda _: None,
) -> Models:
    """Gradient descent on the objectives, with `kind` `linear` or `mlp`, for one replicate.

    The coarse model is trained at the server, on everybody's releases; classes equally often, for
    all models alike. `ValueError` for more than one replicate or another kind.
    """
    problem = clients.problem
    if clients.replicates != 1:
        raise ValueError(f"train_models takes one replicate, got {clients.replicates}")
    schedule, truncated = problem.schedule, problem.chain == "truncated"
    settings = OptimizerSettings(
        lr=lr,
        batch_size=batch_size,
        total_steps=num_steps,
        warmup_steps=max(1, num_steps // 20),
        grad_clip=100.0,
        ema_decay=0.99,
        precision="float32",
    )

    def train(
        role: str, purpose: Purpose, points: torch.Tensor, labels: torch.Tensor
    ) -> LinearDenoiser | MLPDenoiser:
        say(f"{kind} {role}")
        variances = _coarse_variances(problem) if role == "coarse" else problem.mixture.variances
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed_sequence(seed, purpose).generate_state(1)[0])
            model: LinearDenoiser | MLPDenoiser
            if kind == "linear":
                model = LinearDenoiser(torch.zeros_like(problem.mixture.means), variances, schedule)
            elif kind == "mlp":
                model = MLPDenoiser(
                    dim=problem.mixture.dim,
                    num_classes=problem.mixture.num_classes,
                    schedule=schedule,
                )
            else:
                raise ValueError(f"kind must be linear or mlp, got {kind!r}")

        def loss(index: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
            x, y = points[index], labels[index]
            if role == "coarse" and truncated:
                return truncated_loss(
                    model, schedule, x, labels=y, t0=problem.t0, generator=generator
                )
            return denoising_loss(
                model,
                schedule,
                x,
                labels=y,
                t_max=schedule.num_steps,
                weighting="v",
                generator=generator,
            )

        trainer = Trainer(model, settings, device=torch.device("cpu"))
        trainer.train(
            loss,
            sample_weights=class_weights(labels, balance=1.0),
            num_steps=num_steps,
            generator=torch_generator(seed, purpose, client=client),
            what=f"{kind} {role} model",
        )
        trainer.load_weights(trainer.ema(), what="average")
        model.eval()
        return model

    pooled_x = torch.cat([r.x_tilde for r in clients.releases])
    pooled_y = torch.cat([r.labels for r in clients.releases])
    coarse = train("coarse", Purpose.SERVER_TRAINING, pooled_x, pooled_y)
    fine = train("fine", Purpose.FINE_TRAINING, clients.points[client], clients.labels[client])
    raw = torch.cat(clients.points), torch.cat(clients.labels)
    central = train("central", Purpose.COARSE_TRAINING, *raw)
    return Models(coarse=coarse, fine=fine, central=central)
