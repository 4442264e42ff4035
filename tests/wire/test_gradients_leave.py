"""Every byte that clients of a private network send, in simulation and deployed: noised sums,
listed metrics, and nothing that depends on an image in another way, whatever the server sends."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedpdm import wire
from fedpdm.privacy.dpsgd import gradient_rows
from fedpdm.privacy.mechanism import NoisedGradients, ReleasedGradient, SystemNoise
from fedpdm.setup.flower_config import run_config_of
from fedpdm.storage.files import read_tensors
from tests.support.deployments import Federation, Sent, deployment, draw_pictures
from tests.support.federations import flat, initial_message, node
from tests.support.gradient_toys import network_config, noise
from tests.support.leaks import Search, private_things, windows
from tests.wire.test_statistics_leave import local_of

SECTIONS: dict[str, dict[str, Any]] = {
    "run": {"rounds": 5},
    "coarse": {"training": "server"},
    "privacy": {"release": "network", "clip_norm": 6.0},
    "network": {"rounds": 2, "sample_rate": 0.5, "draws": 2, "warmup_steps": 1},
}
BUDGET = "max_epsilon: 10\nmin_t0: none\nallow_raw_metrics: true\n"


def deployed(root: Path, **sections: dict[str, Any]) -> Federation:
    policy = root / "policy.yaml"
    policy.write_text("mechanisms: [network]\n" + BUDGET)
    options = {client: {"policy-file": str(policy)} for client in (0, 1)}
    given = {name: {**SECTIONS.get(name, {}), **sections.get(name, {})} for name in SECTIONS}
    given["run"]["simulation"] = False
    return deployment(root, options=options, **given)


class Watched:
    """What clients computed and did not send: gradients of single images, and sums of them."""

    def __init__(self, patched: pytest.MonkeyPatch) -> None:
        self.pieces: set[bytes] = set()
        rows_of, noised = gradient_rows, NoisedGradients.noised

        def watch_rows(*given: Any, **options: Any) -> Iterator[torch.Tensor]:
            for rows in rows_of(*given, **options):
                for row in rows:
                    self.keep(row.numpy())
                yield rows

        def watch_sum(mechanism: Any, exact: np.ndarray, parameters: Any, **options: Any) -> Any:
            self.keep(exact)
            self.keep(exact.astype(np.int32))
            self.keep((exact / parameters.steps).astype(np.float32))
            return noised(mechanism, exact, parameters, **options)

        patched.setattr("clients.gradients.gradient_rows", watch_rows)
        patched.setattr(NoisedGradients, "noised", watch_sum)

    def keep(self, values: np.ndarray) -> None:
        self.pieces |= set(windows(values.tobytes(), stride=1 << 14))


@pytest.fixture(scope="module", params=[False, True], ids=["deployed", "simulated"])
def recorded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Federation, bool, set[bytes]]:
    root = tmp_path_factory.mktemp("recorded")
    if request.param:
        config = network_config(**SECTIONS, data={"max_images": 100})
        federation = Federation({k: node(config, k) for k in (0, 1)}, flat(config, root / "run"))
    else:
        federation = deployed(root)
    with pytest.MonkeyPatch.context() as patched:
        watched = Watched(patched)
        federation.run()
    return federation, request.param, watched.pieces


@pytest.mark.slow
def test_nothing_private_is_in_any_byte(recorded: tuple[Federation, bool, set[bytes]]) -> None:
    federation, simulated, computed = recorded
    assert len(computed) > 500
    for client in (0, 1):
        things = private_things(federation.nodes[client], federation.run_config)
        things["gradients"] = computed
        search = Search(things)
        for sent in federation.sent:
            assert search.found(sent.data + bytes(8) + sent.objects) == set(), sent.kind
        piece = sorted(computed)[7]
        assert search.found(b"before" + piece + b"after") == {"gradients"}
    allowed = {**wire.FIT_METRICS, **(wire.RAW_METRICS if simulated else {})}
    for sent in federation.of("train") + federation.of("evaluate"):
        assert set(sent.metrics) <= {*allowed, "num_examples", "loss"}


@pytest.mark.slow
def test_payloads_are_the_noised_sums_and_only_when_asked(
    recorded: tuple[Federation, bool, set[bytes]],
) -> None:
    federation, simulated, _ = recorded
    for client in (0, 1):
        answers = federation.of("train", client)
        assert len(answers) == 5
        for number, sent in enumerate(answers[3:], 1):
            released = released_in(sent, client)
            assert int(released.round) == number
            assert released.seeded is simulated
            # A sum of so much noise: whole numbers, no two alike in all places.
            assert 3000 < float(released.total.float().std()) < 20_000
            again = wire.encode_release(released, client_id=client)
            assert [a.tobytes() for a in sent.payload] == [a.tobytes() for a in again]
        (last,) = (local_of(federation, client).releases.root / "releases").glob("*.last")
        assert torch.equal(read_tensors(last)[0]["total"], released.total)
        for sent in federation.of("evaluate", client):
            assert sent.payload == []
    first, second = (released_in(federation.of("train", k)[3], k).total for k in (0, 1))
    alike = float(torch.corrcoef(torch.stack([first, second]).float())[0, 1])
    assert abs(alike) < 0.2


def released_in(sent: Sent, client: int) -> ReleasedGradient:
    released = wire.decode_release(sent.payload, who="it", client_id=client, mechanism="network")
    assert isinstance(released, ReleasedGradient)
    return released


# --- A hostile coordinator ---------------------------------------------------------------------


class Planted:
    """Noise that two runs share and that says that nobody can draw it again."""

    description, seeded = SystemNoise.description, False

    def __init__(self, number: int) -> None:
        self.fill = noise(number).fill


class Nobody:
    """Draws no image."""

    def poisson_batch(self, count: int, *, rate: float) -> torch.Tensor:
        return torch.zeros(0, dtype=torch.int64)


class Everybody:
    """Draws each image."""

    def poisson_batch(self, count: int, *, rate: float) -> torch.Tensor:
        return torch.arange(count)


def changed(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Any]:
    return lambda weights: {name: change(w) for name, w in weights.items()}


# What a coordinator sends in a round, and whether it gets a sum.
WEIGHTS: dict[str, tuple[Callable[[Any], Any], bool]] = {
    "honest": (changed(lambda w: w), True),
    "zeros": (changed(torch.zeros_like), True),
    "large": (changed(lambda w: torch.full_like(w, 9e5)), True),
    "steep": (changed(lambda w: 1e4 * w), True),
    "not finite": (changed(lambda w: w * float("nan")), False),
    "too large": (changed(lambda w: torch.full_like(w, 1e30)), False),
    "other names": (lambda weights: {"x": torch.ones(3)}, False),
    "other shapes": (changed(lambda w: w[None]), False),
    "half of them": (lambda weights: dict(list(weights.items())[::2]), False),
    "doubles": (changed(torch.Tensor.double), False),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> list[Federation]:
    """Two federations with other pictures of the same labels."""
    found = []
    for seed in (100, 200):
        root = tmp_path_factory.mktemp("pair")
        for client in (0, 1):
            draw_pictures(root / f"hospital-{client}", seed=seed + client, count=6, test=1)
        rounds = 2 * len(WEIGHTS) + 2
        found.append(
            deployed(root, run={"rounds": rounds + 3}, network={"rounds": rounds, "draws": 1})
        )
    first, second = (local_of(each, 0).held for each in found)
    assert first.train_labels.tolist() == second.train_labels.tolist()
    assert not np.array_equal(first.images.images, second.images.images)
    return found


def asked(federation: Federation, round: int, weights: Any) -> Sent:
    return federation.ask(
        0, "train", {"round": round, "phase": "gradient"}, weights=wire.encode_model(weights)
    )


@pytest.mark.slow
@pytest.mark.parametrize("draws", [Nobody, Everybody])
def test_no_answer_depends_on_images_but_through_the_noised_sum(
    pair: list[Federation], monkeypatch: pytest.MonkeyPatch, draws: type
) -> None:
    """With nobody drawn and the same noise, answers to any weights are the same to the bit; with
    everybody drawn all but the sum is: lengths, metrics, and the text of errors."""
    monkeypatch.setattr("clients.gradients.build_samples", lambda *_, **__: draws())
    monkeypatch.setattr(
        "clients.gradients.build_gradient_noise", lambda *_, number, **__: Planted(number)
    )
    weights = wire.decode_model(initial_message(run_config_of(pair[0].run_config)))
    first = 4 if draws is Nobody else 4 + len(WEIGHTS)
    totals: dict[str, list[torch.Tensor]] = {}
    for round, (kind, (change, answered)) in enumerate(WEIGHTS.items(), first):
        one, other = (asked(federation, round, change(dict(weights))) for federation in pair)
        assert ("error" in one.metrics) is not answered, one.metrics
        assert one.metrics.get("error") == other.metrics.get("error"), kind
        assert len(one.timeless()) == len(other.timeless()), kind
        if draws is Nobody:
            assert one.timeless() == other.timeless(), kind
        if answered:
            totals[kind] = [released_in(sent, 0).total for sent in (one, other)]
    differ = {kind for kind, (a, b) in totals.items() if not torch.equal(a, b)}
    # Gradients beyond all numbers count as zero; others are in the sum, as they should be.
    assert differ == (set() if draws is Nobody else {"honest", "zeros", *(differ & {"steep"})})


@pytest.mark.slow
def test_one_round_more_than_planned_is_refused_without_a_reason(pair: list[Federation]) -> None:
    weights = wire.decode_model(initial_message(run_config_of(pair[0].run_config)))
    last = 3 + 2 * len(WEIGHTS) + 2
    for round in (last + 1, last + 2):
        for federation in pair:
            sent = asked(federation, round, dict(weights))
            assert sent.payload == []
            assert sent.metrics["error"] == "failed; client 0 shows the details to its owner alone"
