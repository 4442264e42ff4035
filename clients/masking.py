"""A client's side of secure aggregation: its update leaves only masked, or not at all.

Flower's `secaggplus_mod` speaks the protocol. Around it: what a server asks for is held against the
run's config (Flower's mod takes any number of clients and any threshold, down to one, which would
undo the masks); and between it and the client, the coarse update or the sums of class statistics,
decoded from our wire type and checked as a server would, become the arrays that are masked.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message
from flwr.client.mod import secaggplus_mod
from flwr.clientapp.typing import ClientAppCallable
from flwr.common.secure_aggregation.secaggplus_constants import (
    RECORD_KEY_CONFIGS,
    RECORD_KEY_STATE,
    Key,
    Stage,
)

from clients.failures import ClientError, Refusal, failure_line
from clients.local import is_deployed
from fedpdm import wire
from fedpdm.config import RunConfig
from fedpdm.privacy.mechanism import ReleasedStatistics
from fedpdm.privacy.turning import total_of
from fedpdm.setup.flower_config import run_config_of
from fedpdm.wire.summands import MODULUS, summands, threshold, update_terms
from fedpdm.wire.totals import sum_terms, total_summands
from fedpdm.wire.types import Phase

__all__ = ["secure_mod"]

TRAIN = "train"


def secure_mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Flower's mod in runs whose config says `aggregation.secure`; nothing else in others."""
    if message.metadata.message_type.split(".")[0] != TRAIN:
        return call_next(message, context)
    try:
        config = run_config_of(dict(context.run_config))
    except Exception:
        return call_next(message, context)  # which will say what is wrong
    if not config.aggregation.secure:
        return call_next(message, context)
    node = dict(context.node_config)
    who = f"client {node.get('partition-id', 'without a partition-id')}"
    try:
        if sends_nothing(message, config):
            return _empty(call_next(message, context), who=who)
        check_request(message, context, config, who=who)
        masked = functools.partial(_as_summands, config=config, call_next=call_next, who=who)
        return secaggplus_mod(message, context, masked)
    except ClientError:
        raise
    except Exception as error:
        line = failure_line(error, who=who, deployed=is_deployed(node))
        raise ClientError(line) from None


def sends_nothing(message: Message, config: RunConfig) -> bool:
    """Whether a plain request is for fine training alone, after the rounds of class statistics."""
    records = message.content.config_records
    if RECORD_KEY_CONFIGS in records or "fitins.config" not in records:
        return False
    return config.has_statistics and records["fitins.config"].get("phase") == Phase.FINE


def _empty(answer: Message, *, who: str) -> Message:
    """An answer without arrays; `Refusal` where there are some: a round of sums, asked again."""
    record = answer.content.array_records.get("fitres.parameters")
    if record is not None and any(array.data for array in record.values()):
        raise Refusal(f"aggregation.secure: true, but the server asks for plain sums ({who})")
    return answer


def check_request(message: Message, context: Context, config: RunConfig, *, who: str) -> None:
    """`Refusal` of a request that would show a single update, or belongs to no secure round."""
    request = message.content.config_records.get(RECORD_KEY_CONFIGS)
    if request is None or Key.STAGE not in request:
        raise Refusal(
            f"aggregation.secure: true, but the server asks for a plain update ({who} refuses)"
        )
    stage = request[Key.STAGE]
    if stage == Stage.SETUP:
        _check_setup(request, config, who=who)
    elif stage == Stage.SHARE_KEYS:
        num_keys, wanted = len(request) - 1, _state(context, "sample_num")
        if num_keys < 3 or num_keys > wanted:
            raise Refusal(
                f"secure round: keys of {num_keys} clients, must be in [3, {wanted}] ({who})"
            )
    elif stage == Stage.UNMASK:
        active = set(_ints(request, Key.ACTIVE_NODE_ID_LIST))
        dead = set(_ints(request, Key.DEAD_NODE_ID_LIST))
        if active & dead or _state(context, "nid") not in active:
            raise Refusal(f"secure round: the server asks for both keys of a client ({who})")


def _check_setup(request: Any, config: RunConfig, *, who: str) -> None:
    num_clients = request.get(Key.SAMPLE_NUMBER)
    if type(num_clients) is not int or num_clients < 3:
        raise Refusal(f"secure round: needs at least 3 clients, got {num_clients!r} ({who})")
    section = config.aggregation
    terms = sum_terms(num_clients) if config.has_statistics else update_terms(section, num_clients)
    for name, wanted in (
        (Key.SHARE_NUMBER, num_clients),
        (Key.THRESHOLD, threshold(section, num_clients)),
        (Key.CLIPPING_RANGE, terms.clipping_range),
        (Key.TARGET_RANGE, terms.target_range),
        (Key.MOD_RANGE, MODULUS),
        (Key.MAX_WEIGHT, terms.max_weight),
    ):
        if request.get(name) != wanted:
            raise Refusal(
                f"secure round: {name} must be {wanted:g} by the run's config, "
                f"got {str(request.get(name))[:40]} ({who})"
            )


def _state(context: Context, name: str) -> int:
    """A whole number of what Flower's mod remembers of this round."""
    known = context.state.config_records.get(RECORD_KEY_STATE)
    value = known.get(name) if known is not None else None
    return value if isinstance(value, int) else -1


def _ints(request: Any, name: str) -> list[int]:
    values = request.get(name, [])
    return [value for value in values if type(value) is int] if isinstance(values, list) else []


def _as_summands(
    message: Message, context: Context, *, config: RunConfig, call_next: ClientAppCallable, who: str
) -> Message:
    """The client's answer with float64 arrays to be masked instead of our message."""
    answer = call_next(message, context)
    content = answer.content
    if error := content.config_records["fitres.metrics"].get(
        "error"
    ):  # a client without an update leaves the sum
        raise ClientError(str(error))
    asked = _arrays(message.content.array_records["fitins.parameters"])
    sent = _arrays(content.array_records["fitres.parameters"])
    if config.has_statistics:
        num_clients = _state(context, "sample_num")
        arrays = _statistics(sent, asked, config, num_clients=num_clients, who=who)
        content.metric_records["fitres.num_examples"]["num_examples"] = 1  # which Flower weighs by
    else:
        received = wire.decode_model(asked)
        update = wire.decode_update(
            sent,
            like=received,
            round=int(str(message.content.config_records["fitins.config"]["round"])),
            who=who,
            encoding=config.aggregation.encoding,
            basis=config.kind.basis,
        )
        arrays = summands(update, received, config.aggregation)
    content.array_records["fitres.parameters"] = ArrayRecord(arrays)
    return answer


def _statistics(
    sent: wire.Message, asked: wire.Message, config: RunConfig, *, num_clients: int, who: str
) -> list[np.ndarray]:
    """The sums that a client answers with, all its times together, as summands."""
    released = wire.decode_release(sent, who=who, mechanism=config.privacy.release)
    if not isinstance(released, ReleasedStatistics):
        raise wire.WireError(f"release of {who}: expected class statistics")
    public = wire.decode_model(asked) if asked else {}
    total = total_of(released, public.get("directions"), public.get("centers"))
    return total_summands(total, config.aggregation, num_clients=num_clients, who=who)


def _arrays(record: ArrayRecord) -> wire.Message:
    return [array.numpy() for array in record.values() if array.data]
