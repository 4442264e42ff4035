"""A run's rounds in figures: who answered, what failed, bytes and seconds, and lines about them.

Nothing here knows weights or Flower's interface: a `CoarseStrategy` says what happens, and finds
what `metrics.json` will hold in `history`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedpdm.reporting.shared_words import EXPLANATION
from fedpdm.reporting.trackers import RunTrackers
from strategies.answers import ClientAnswer, mean_metrics, round_line
from strategies.roster import ClientFailure, ServerSettings

__all__ = ["CurrentRound", "RoundBook"]


class CurrentRound:
    """One round of training, from its requests on.

    `seen` are Flower's names of the nodes that answered, `answers` the good ones, `problems` lines
    about the others; `sent` and `received` are bytes.
    """

    def __init__(self, *, seconds: float = 0.0) -> None:
        """`seconds` were spent on it by an earlier process."""
        self.seen: set[str] = set()
        self.answers: list[ClientAnswer] = []
        self.problems: list[str] = []
        self.sent = self.received = 0
        self._started = time.perf_counter() - seconds

    @property
    def seconds(self) -> float:
        """Since the round was begun."""
        return time.perf_counter() - self._started


class RoundBook:
    """The rounds of a run, those of earlier processes included.

    `history` is what `metrics.json` holds: a record for each round, and the final evaluation.
    """

    def __init__(self, settings: ServerSettings, announce: Callable[[str], None]) -> None:
        self.history: dict[str, Any] = {"rounds": []}
        self.rounds_done = 0
        self.now = CurrentRound()
        self.trackers: RunTrackers | None = None
        self._settings = settings
        self.say = announce
        self.first_round = 1  # of this process
        self._rounds_before = 0  # trained by earlier processes
        self._explained = False
        self._started = time.perf_counter()

    def go_on(self, rounds_done: int, history: dict[str, Any]) -> None:
        """Take over what an earlier process did.

        A checkpoint is of the time before its round's evaluation: if there is one, it comes first.
        That of a run which had finished is of the time after: what it had come to is kept.
        """
        self.rounds_done, self.history = rounds_done, history
        final = history.pop("final", None)
        if final is not None:
            history["earlier"] = [*history.get("earlier", ()), {"round": rounds_done, **final}]
        if rounds_done:
            self.say(f"resumed after round {rounds_done} of {self._settings.rounds}")
            self._rounds_before = rounds_done
            evaluated = final is not None or not self.evaluates(rounds_done)
            self.first_round = rounds_done + evaluated

    def evaluates(self, round: int) -> bool:
        """Whether a round's model is evaluated."""
        return round == self._settings.rounds or round % self._settings.evaluate_every == 0

    def rounds_left(self) -> int:
        """Flower rounds still to run; at least one, for the final evaluation."""
        return self._settings.rounds - self.first_round + 1

    def number(self, server_round: int) -> int:
        """Flower counts rounds of this process; the run's rounds go on from the checkpoint."""
        return self.first_round - 1 + server_round

    def begin(self, round: int) -> None:
        """A round begins; of one that is done the evaluation is missing."""
        done = round <= self.rounds_done
        seconds = self.history["rounds"][-1]["seconds"] if done else 0.0
        self.now = CurrentRound(seconds=seconds)

    def report(self, round: int, what: str, problems: Sequence[str], *, num_good: int) -> None:
        """Say what failed; `ClientFailure` if the run is to stop, or nobody is left."""
        for problem in problems:
            self.say(f"round {round} {what} failed: {problem}")
        if problems and (self._settings.on_failure == "raise" or num_good == 0):
            raise ClientFailure(f"round {round} {what}: {'; '.join(problems)}")

    def close(
        self,
        round: int,
        answers: Sequence[ClientAnswer],
        problems: Sequence[str],
        metrics: Mapping[str, float],
    ) -> None:
        """The round has given new weights."""
        now = self.now
        self.rounds_done = round
        self.history["rounds"].append(
            {
                "round": round,
                **mean_metrics(answers, seconds=now.seconds),
                **metrics,
                "seconds": now.seconds,
                "bytes_down": now.sent,
                "bytes_up": now.received,
                "clients": [_lasting(answer.metrics) for answer in answers],
                "failed": list(problems),
            }
        )

    def sent_to_evaluate(self, size: int) -> None:
        """So many bytes went to clients to be evaluated."""
        if self.history["rounds"]:
            self.history["rounds"][-1]["bytes_down"] += size

    def evaluated(self, measured: Mapping[str, float]) -> None:
        """The last round's evaluation, which counts to its seconds."""
        record = self.history["rounds"][-1]
        record |= measured
        record["seconds"] = self.now.seconds
        self.tell()

    def tell(self) -> None:
        """Show the last round, with the time that the rest will take at the pace so far."""
        record = self.history["rounds"][-1]
        rounds_here = self.rounds_done - self._rounds_before
        spent = time.perf_counter() - self._started if rounds_here else self.now.seconds
        pace = spent / max(1, rounds_here)
        left = pace * (self._settings.rounds - self.rounds_done)
        self.say(round_line(record, rounds=self._settings.rounds, seconds_left=left))
        if not self._explained and "coarse_known" in record:
            self.say(EXPLANATION)
            self._explained = True
        if self.trackers is not None:
            self.trackers.round(record)


def _lasting(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Without what only says that a run was interrupted: its records are those of one that was
    not."""
    return {name: value for name, value in metrics.items() if name != "replayed"}
