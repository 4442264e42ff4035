"""What a secure round refuses by itself: too few clients, malformed answers, a missing sum."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.common import ndarrays_to_parameters
from flwr.common.secure_aggregation.secaggplus_constants import Key, Stage
from flwr.server import SimpleClientManager

from clients.failures import Refusal
from clients.masking import _empty, check_request
from fedpdm import wire
from fedpdm.storage.run_directory import RunDirectory
from strategies.answers import ClientAnswer
from strategies.roster import ClientFailure
from strategies.secure_aggregation import SecureFedAvg, SecureRounds, SecureServer, WatchedGrid
from strategies.server_app import build_strategy
from tests.strategies.test_secure_statistics import config_of as statistics_config
from tests.support.federations import small_config
from tests.support.secure_federations import MOST, ONE_ROUND

SECURE = {"secure": True, "max_examples": MOST}


def strategy_of(out: Path) -> SecureFedAvg:
    config = small_config(**ONE_ROUND, partition={"num_clients": 3}, aggregation=SECURE)
    made = build_strategy(config, RunDirectory(out), resume=False)
    assert isinstance(made, SecureFedAvg)
    return made


def answer(count: int) -> ClientAnswer:
    return ClientAnswer(client_id=1, metrics={}, num_examples=count)


def test_a_sum_of_two_shows_each_of_them_what_the_other_sent(tmp_path: Path) -> None:
    strategy = strategy_of(tmp_path / "run")
    with pytest.raises(ClientFailure, match="needs at least 3 clients, 2 take part"):
        strategy.begin(1, {0, 1})
    strategy.begin(1, {0, 1, 2})
    gaussians = build_strategy(
        statistics_config(**SECURE), RunDirectory(tmp_path / "sums"), resume=False
    )
    gaussians.begin(4, {0, 1})  # fine steps alone: there is nothing to add up
    with pytest.raises(ClientFailure, match="at least 3"):
        gaussians.begin(3, {0, 1})


def test_an_answer_of_no_images_and_a_round_without_a_sum(tmp_path: Path) -> None:
    strategy = strategy_of(tmp_path / "run")
    strategy.begin(1, {0, 1, 2})
    with pytest.raises(wire.WireError, match="num_examples must be at least 1, got 0"):
        strategy.accept(1, answer(0), [np.ones(2)])
    assert strategy.counts == []
    with pytest.raises(wire.WireError, match="round 1: no update to average"):
        strategy.merge(1)
    gaussians = build_strategy(
        statistics_config(**SECURE), RunDirectory(tmp_path / "sums"), resume=False
    )
    gaussians.begin(1, {0, 1, 2})
    with pytest.raises(wire.WireError, match="no sums to add up"):
        gaussians.merge(1)


def test_what_is_refused_is_in_the_sum_already_so_the_round_stops(tmp_path: Path) -> None:
    strategy = strategy_of(tmp_path / "run")
    strategy.begin(1, {0, 1, 2})
    strategy.book.begin(1)
    strategy.book.now.problems.append("client 7: was not asked")  # of before, and no reason

    def refuse(server_round: int, proxy: Any, result: Any) -> None:
        strategy.book.now.problems.append("client 1: too many images")

    strategy.receive_fit = refuse  # type: ignore[method-assign]
    grid: Any = SimpleNamespace(received=0, sent=0, problems=[])
    with pytest.raises(ClientFailure, match="round 1 fit: client 1: too many images"):
        strategy.conclude_secure(1, [(None, None)], grid)  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("stage", "record", "words"),
    [
        (Stage.SETUP, {Key.PUBLIC_KEY_1: b"k", Key.PUBLIC_KEY_2: "k"}, "no bytes as pk2"),
        (Stage.SETUP, {Key.PUBLIC_KEY_1: b"k"}, "no bytes as pk2"),
        (Stage.SHARE_KEYS, {Key.DESTINATION_LIST: 3, Key.CIPHERTEXT_LIST: [b"c"]}, "list of int"),
        (Stage.SHARE_KEYS, {Key.DESTINATION_LIST: [], Key.CIPHERTEXT_LIST: b"c"}, "list of bytes"),
        (Stage.SHARE_KEYS, {Key.CIPHERTEXT_LIST: [b"c"]}, "list of int"),
        (Stage.UNMASK, {Key.NODE_ID_LIST: [1.5], Key.SHARE_LIST: [b"s"]}, "list of int"),
        (Stage.UNMASK, {Key.NODE_ID_LIST: [1, 2], Key.SHARE_LIST: [b"s"]}, "different lengths"),
    ],
)
def test_malformed_answers_to_a_stage(
    tmp_path: Path, stage: str, record: dict[str, Any], words: str
) -> None:
    grid = WatchedGrid(None, strategy_of(tmp_path / "run"))
    content = RecordDict({"secaggplus_configs": ConfigRecord(record)})
    reply: Any = SimpleNamespace(content=content)
    assert words in grid._fault(stage, reply)
    nothing: Any = SimpleNamespace(content=RecordDict())
    assert "sent no answer to stage" in grid._fault(stage, nothing)


def test_clients_that_are_behind_no_messages_cannot_be_added_up(tmp_path: Path) -> None:
    strategy: SecureRounds = strategy_of(tmp_path / "run")
    strategy.configure_fit = lambda *_: [(object(), None)]  # type: ignore[method-assign,assignment,list-item,return-value]
    server = SecureServer(client_manager=SimpleClientManager(), strategy=strategy)
    server.parameters = ndarrays_to_parameters([])
    with pytest.raises(ClientFailure, match="needs clients behind Flower's messages"):
        server.fit_round(1, None)


# The client's side.


def message(**records: Any) -> Message:
    return SimpleNamespace(content=RecordDict(records))  # type: ignore[return-value]


def test_an_answer_without_a_record_of_arrays_is_empty() -> None:
    nothing = message()
    assert _empty(nothing, who="client 1") is nothing
    blank = message(**{"fitres.parameters": ArrayRecord([])})
    assert _empty(blank, who="client 1") is blank
    with pytest.raises(Refusal, match="asks for plain sums"):
        _empty(message(**{"fitres.parameters": ArrayRecord([np.ones(3)])}), who="client 1")


def test_a_request_that_names_no_stage_is_a_plain_one() -> None:
    config = small_config(**ONE_ROUND, partition={"num_clients": 3}, aggregation=SECURE)
    context: Any = Context(run_id=0, node_id=0, node_config={}, state=RecordDict(), run_config={})
    for request in (message(), message(secaggplus_configs=ConfigRecord({"other": 1}))):
        with pytest.raises(Refusal, match="asks for a plain update"):
            check_request(request, context, config, who="client 1")
