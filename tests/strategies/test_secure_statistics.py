"""Class statistics under secure aggregation: the total is exact, and no client's sums are seen."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from flwr.common import bytes_to_ndarray, ndarray_to_bytes
from flwr.common.secure_aggregation.quantization import dequantize, quantize

from clients.local import open_local_client
from clients.training import LocalTraining
from fedpdm import wire
from fedpdm.config import AggregationConfig, RunConfig
from fedpdm.engines.inprocess import run_in_process
from fedpdm.privacy.estimation import class_means
from fedpdm.privacy.mechanism import ReleasedStatistics, restore_release
from fedpdm.privacy.turning import total_of
from fedpdm.storage.files import read_tensors
from fedpdm.storage.run_directory import RunDirectory
from fedpdm.wire.summands import SumError
from fedpdm.wire.totals import sum_terms, total_from, total_summands
from strategies.roster import ClientFailure
from tests.support.deployments import policy_text
from tests.support.federations import small_config
from tests.support.leaks import Search, windows
from tests.support.release_toys import image_set
from tests.support.secure_federations import MOST, SecureFederation, secure_federation
from tests.support.statistics_toys import MECHANISM, public, rounds, seeded, source_of

PARTS = ("means", "pooled", "classes")
NOTHING: dict[str, list[ReleasedStatistics]] = {part: [] for part in PARTS}
SECTION = AggregationConfig(secure=True, max_examples=MOST)


def config_of(num_clients: int = 3, **aggregation: Any) -> RunConfig:
    return small_config(
        run={"rounds": 4},
        partition={"num_clients": num_clients},
        coarse={"training": "server"},
        privacy={"release": "statistics", "clip_norm": 6.0},
        fine={"steps_per_round": 1},
        evaluation={"image_metrics": False},
        aggregation=aggregation,
    )


def kept(out: Path) -> dict[str, list[ReleasedStatistics]]:
    """What a server has kept of each round."""
    run = RunDirectory(out)
    found = {part: [restore_release(*u) for u in run.load_uploads(part=part)] for part in PARTS}
    return found  # type: ignore[return-value]


def check_totals(secure: Path, plain: Path, *, num_clients: int) -> None:
    """One total a round, and it is the sum of what the plain run's clients sent."""
    for part, (total, *others) in kept(secure).items():
        assert others == []
        single = kept(plain)[part]
        assert len(single) == num_clients
        assert torch.equal(total.sums[0], torch.stack([s.sums[0] for s in single]).sum(dim=0))
        assert torch.equal(total.counts[0], torch.stack([s.counts[0] for s in single]).sum(dim=0))
        assert torch.equal(total.noisy[0], torch.stack([s.noisy[0] for s in single]).sum(dim=0))
    first, second = (read_tensors(out / "coarse.safetensors")[0] for out in (secure, plain))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(tensor, second[name], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_the_total_is_the_sum_of_plain_sums_to_the_last_digit(tmp_path: Path) -> None:
    run_in_process(config_of(secure=True, max_examples=MOST), tmp_path / "secure")
    run_in_process(config_of(), tmp_path / "plain")
    check_totals(tmp_path / "secure", tmp_path / "plain", num_clients=3)
    first, second = (
        RunDirectory(tmp_path / n).read_json("metrics.json") for n in ("secure", "plain")
    )
    for one, other in zip(first["rounds"], second["rounds"], strict=True):
        assert [c["num_released"] for c in one["clients"]] == [
            c["num_released"] for c in other["clients"]
        ]
    assert first["rounds"][3]["bytes_up"] == second["rounds"][3]["bytes_up"] == 0
    assert first["rounds"][2]["edge"] == pytest.approx(second["rounds"][2]["edge"])


@pytest.mark.slow
def test_the_others_go_on_without_a_client_that_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    obtain = LocalTraining.statistics

    def leave(self: LocalTraining, stage: int, public: Any) -> Any:
        if stage == 1 and self.local.client_id == 2:
            raise OSError("no space left")
        return obtain(self, stage, public)

    monkeypatch.setattr(LocalTraining, "statistics", leave)
    options: dict[str, Any] = {"on_failure": "skip", "max_examples": MOST}
    run_in_process(config_of(4, secure=True, **options), tmp_path / "secure")
    (pooled,) = kept(tmp_path / "secure")["pooled"]
    (means,) = kept(tmp_path / "secure")["means"]
    assert (int(pooled.noisy.max()), int(means.noisy.max())) == (3, 4)
    assert int(pooled.counts.sum()) < int(means.counts.sum())
    told = RunDirectory(tmp_path / "secure").read_json("metrics.json")["rounds"]
    assert [r["failed"] for r in told] == [[], ["client 2: no space left"], [], []]
    with pytest.raises(ClientFailure, match="round 2 fit: client 2: no space left"):
        run_in_process(config_of(4, secure=True, max_examples=MOST), tmp_path / "strict")


@pytest.mark.slow
def test_a_client_with_more_images_than_it_may_have_leaves_the_sum(tmp_path: Path) -> None:
    with pytest.raises(ClientFailure, match=r"images must be in \[1, aggregation.max_examples = 5"):
        run_in_process(config_of(secure=True, max_examples=5), tmp_path / "run")
    assert kept(tmp_path / "run") == NOTHING


# --- The arithmetic ------------------------------------------------------------------------


def sent(client: int, stage: int, *, times: int = 1, directions: Any = None) -> ReleasedStatistics:
    """A client's sums of so many times, the first of them made with other directions."""
    given = public()
    parts = []
    for time in range(times):
        own = dataclasses.replace(source_of(image_set(9 + client + time)), public=dict(given))
        if directions is not None and time == 0:
            own.public["directions"] = directions  # type: ignore[index]
        noise = seeded(100 * client + time)
        parts.append([a.copy() for a in MECHANISM.make(own, rounds()[stage], noise)])
    stacked = {
        name: torch.from_numpy(np.stack([part[at] for part in parts]))
        for at, name in enumerate(MECHANISM.names)
    }
    return MECHANISM.restore(
        stacked, parameters=rounds()[stage], event=MECHANISM.event(rounds()[stage]),
        noise_source="", seeded=True, check_values=True,
    )  # fmt: skip


def added(totals: list[ReleasedStatistics], *, num_clients: int) -> ReleasedStatistics:
    """By Flower's own rounding and arithmetic modulo 2^32, without masks."""
    terms = sum_terms(num_clients)
    whole = [
        quantize(
            total_summands(t, SECTION, num_clients=num_clients, who="it"),
            terms.clipping_range,
            terms.target_range,
        )
        for t in totals
    ]
    summed = [
        sum(part.astype(np.int64) for part in parts) % 2**32 for parts in zip(*whole, strict=True)
    ]
    count = len(totals)
    back = dequantize(summed, terms.clipping_range, terms.target_range)
    means = [(array - (count - 1) * terms.clipping_range) / count for array in back]
    return total_from(
        means, totals[0].parameters, totals[0].directions[0], SECTION,
        num_clients=num_clients, num_sent=count, seeded=True,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("num_clients", [3, 100, 1000])
@pytest.mark.parametrize("stage", range(3))
def test_nothing_is_rounded(num_clients: int, stage: int) -> None:
    """With a thousand clients a number has two digits."""
    totals = [total_of(sent(c, stage, times=1 + c % 2), public()["directions"]) for c in range(5)]
    got = added(totals, num_clients=num_clients)
    for name in ("sums", "counts", "noisy"):
        wanted = torch.stack([getattr(t, name) for t in totals]).sum(dim=0)
        assert torch.equal(getattr(got, name), wanted), name
    assert int(got.noisy.max()) == 7  # two of five sent sums of two times
    if stage == 0:
        by_one, by_all = class_means([got]), class_means(totals)
        np.testing.assert_allclose(by_one.means, by_all.means)


def test_sums_of_an_earlier_run_are_turned_before_they_are_added() -> None:
    """By the client, as the server turns them in a plain run."""
    rotation = np.linalg.qr(np.random.default_rng(1).normal(size=(5, 5)))[0]
    asked = public()["directions"]
    other = torch.from_numpy(rotation @ asked.double().numpy()).float()
    straight, askew = (total_of(sent(0, 2, times=2, directions=d), asked) for d in (None, other))
    assert not torch.equal(sent(0, 2, times=2, directions=other).sums, sent(0, 2, times=2).sums)
    assert torch.equal(askew.counts, straight.counts)
    assert torch.equal(askew.directions[0], asked)
    exact = [
        total_of(
            MECHANISM.restore(
                {**made.tensors(), "sums": without_noise(made)}, parameters=made.parameters,
                event=made.event, noise_source="", seeded=True, check_values=True,
            ), asked,
        ).sums.double()
        for made in (sent(0, 2, times=2), sent(0, 2, times=2, directions=other))
    ]  # fmt: skip
    gap = (exact[0] - exact[1]).abs().max() / exact[0].abs().max()
    assert gap < 0.1  # images are rounded in other coordinates


def without_noise(made: ReleasedStatistics) -> torch.Tensor:
    """The sums of the same images before noise."""
    sums = []
    for time, directions in enumerate(made.directions.numpy()):
        own = source_of(image_set(9 + time))
        sums.append(MECHANISM.exact_sums(own, made.parameters, directions))
    return torch.from_numpy(np.stack(sums))


def test_what_cannot_be_added_up_is_one_line() -> None:
    total = total_of(sent(0, 0), None)
    few = dataclasses.replace(SECTION, max_examples=3)
    with pytest.raises(SumError, match=r"9 images must be in \[1, .*= 3\] \(client 4\)"):
        total_summands(total, few, num_clients=3, who="client 4")
    often = dataclasses.replace(total, totalled=total.noisy + 64)
    with pytest.raises(SumError, match="65 sums must be at most 64"):
        total_summands(often, SECTION, num_clients=3, who="client 4")
    arrays = total_summands(total, SECTION, num_clients=3, who="client 4")
    options: dict[str, Any] = {"num_clients": 3, "num_sent": 1, "seeded": True}

    def refused(changed: list[np.ndarray]) -> str:
        with pytest.raises(SumError) as caught:
            total_from(changed, total.parameters, total.directions[0], SECTION, **options)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "expected arrays of shapes" in refused(arrays[:2])
    assert "not finite" in refused([arrays[0] * np.nan, *arrays[1:]])
    assert "do not cancel" in refused([*arrays[:2], arrays[2] + 1])
    assert "images in all" in refused([arrays[0] + 1e5, *arrays[1:]])
    assert "must be within" in refused([arrays[0], arrays[1] + 1e6, arrays[2]])


# --- What is sent, and who lies ------------------------------------------------------------


def federation_of(root: Path, **sections: Any) -> SecureFederation:
    made = secure_federation(
        root,
        run={"rounds": 4},
        coarse={"training": "server"},
        privacy={"release": "statistics", "clip_norm": 6.0},
        **sections,
    )
    policy = root / "policy.yaml"
    policy.write_text(policy_text("{mechanisms: [statistics], allow_raw_metrics: true}"))
    for node in made.nodes.values():
        node["policy-file"] = str(policy)
    return made


def pieces(federation: SecureFederation, client: int) -> set[bytes]:
    """Of a client's noised sums, in the forms in which they go to the masks."""
    local = open_local_client(dict(federation.nodes[client]), federation.run_config, 0)
    found: set[bytes] = set()
    for record in local.releases.ledger().releases():
        sums = read_tensors(local.releases.root / "releases" / record.file)[0]["sums"].numpy()
        for form in (sums, sums.astype(np.float64), sums.astype(np.int32)):
            found |= set(windows(form.tobytes(), stride=512))
    return found


@pytest.mark.slow
def test_no_message_holds_a_clients_sums(tmp_path: Path) -> None:
    federation = federation_of(tmp_path / "secure")
    federation.run()
    search = Search({str(client): pieces(federation, client) for client in range(3)})
    assert len(federation.replies()) == 3 * (3 * 4 + 1)  # four messages a sum, one for fine steps
    for sent_one in federation.sent:
        assert search.found(sent_one.data + bytes(8) + sent_one.objects) == set(), sent_one.kind
    for part, totals in kept(tmp_path / "secure" / "server").items():
        assert [int(t.noisy.max()) for t in totals] == [3], part
        assert not totals[0].seeded
    plain = federation_of(tmp_path / "plain", aggregation={"secure": False})
    plain.run()
    for sent_one in [s for s in plain.replies() if s.payload]:
        own = Search({"it": pieces(plain, sent_one.client)})
        assert own.found(sent_one.data + sent_one.objects) == {"it"}


def masked(reply: Message) -> Any:
    record = reply.content.config_records.get("secaggplus_configs") if reply.has_content() else None
    return record if record is not None and "masked_params" in record else None


def drawn(arrays: list[np.ndarray]) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 2**32, array.shape) for array in arrays]


LIES: dict[str, tuple[Callable[[list[np.ndarray]], list[np.ndarray]], str]] = {
    "noise": (drawn, "do not cancel"),
    "fewer arrays": (lambda a: a[:-1], "client 1: sent 3 masked arrays, expected 4"),
    "shape": (lambda a: [x[..., 1:] for x in a], "client 1: sent a masked array of int64"),
    "absurd sums": (lambda a: [*a[:2], (a[2] + 2**28) % 2**32, a[3]], "must be within"),
    "absurd counts": (lambda a: [a[0], (a[1] + 2**20) % 2**32, *a[2:]], "images in all; must be"),
}


@pytest.mark.slow
@pytest.mark.parametrize("lie", LIES)
def test_a_lie_in_a_total_is_found(tmp_path: Path, lie: str) -> None:
    spoil, words = LIES[lie]
    federation = federation_of(tmp_path)

    def tamper(asked: Message, reply: Message) -> Message:
        record = masked(reply)
        if reply.metadata.src_node_id == 2 and record is not None:
            arrays = spoil([bytes_to_ndarray(part) for part in record["masked_params"]])
            record["masked_params"] = [ndarray_to_bytes(array) for array in arrays]
        return reply

    federation.tamper = tamper
    with pytest.raises((ClientFailure, wire.WireError), match=words) as caught:
        federation.run(1)
    assert "\n" not in str(caught.value)
    assert kept(tmp_path / "server") == NOTHING


@pytest.mark.slow
def test_a_plain_request_shows_no_sums(tmp_path: Path) -> None:
    """Not as a round of sums, nor as one of fine training that stands for a round of sums that
    was answered: a stored answer is refused as well."""
    federation = federation_of(tmp_path)
    asked = federation.ask(0, "train", {"round": 1, "phase": "release"})
    assert "the server asks for a plain update (client 0 refuses)" in str(asked.reply.error.reason)
    federation.run(2)
    second = [s for s in federation.sent if s.client == 0 and masked(s.reply) is not None][1]
    given = second.request.content.array_records["fitins.parameters"]
    again = federation.ask(
        0, "train", {"round": 2, "phase": "fine"}, weights=[a.numpy() for a in given.values()]
    )
    assert "asks for plain sums (client 0)" in str(again.reply.error.reason)
    assert search_of(federation).found(again.data + again.objects) == set()


def search_of(federation: SecureFederation) -> Search:
    return Search({str(client): pieces(federation, client) for client in range(3)})
