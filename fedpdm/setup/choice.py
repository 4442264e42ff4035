"""How a client of class statistics samples: hand-over, labels under it, candidates.

The config says it, or leaves it to each client (`fedpdm.evaluation.choosing`), which keeps its
choice in its store. Before there is one, and where there are too few images to choose on, stands
the fallback: 0.15 T, no labels under the hand-over, the best of 4 candidates.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fedpdm.config import RunConfig
from fedpdm.setup.run_setup import RunSetup
from fedpdm.storage.client_store import ClientStore, store_label
from fedpdm.storage.files import StoreError
from fedpdm.storage.run_directory import RunDirectory

__all__ = [
    "CANDIDATES",
    "SamplingChoice",
    "fallback",
    "is_open",
    "kept_choices",
    "load_choice",
    "save_choice",
]

CANDIDATES = 4
FILE = "sampling"


@dataclass(frozen=True, kw_only=True)
class SamplingChoice:
    """What `sampler_settings` takes where the config leaves it open.

    `own_classes` are labels that the client's own model draws alone.
    `why` says in words how it came about, `scores` what was measured for it, by name.
    """

    handover: int
    fine_labels: bool
    candidates: int
    why: str
    own_classes: tuple[int, ...] = ()
    scores: Mapping[str, float] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """The choice in a line."""
        labels = "with" if self.fine_labels else "without"
        best = f"the best of {self.candidates}" if self.candidates > 1 else "one candidate"
        own = ", ".join(map(str, self.own_classes))
        alone = f"; classes {own} by its own model alone" if own else ""
        return (
            f"hand-over at t = {self.handover}, {labels} labels under it, {best}{alone} "
            f"({self.why})"
        )


def is_open(setup: RunSetup) -> bool:
    """Whether the config leaves anything to the client."""
    section = setup.config.sampling
    given = (section.handover, section.fine_labels, section.candidates)
    return setup.has_gaussians and not setup.has_network and None in given


def fallback(setup: RunSetup, why: str = "nothing was chosen yet") -> SamplingChoice:
    """What the config says, and where it says nothing what the module says."""
    section = setup.config.sampling
    return SamplingChoice(
        handover=setup.handover,
        fine_labels=bool(section.fine_labels),
        candidates=section.candidates or CANDIDATES,
        why=why,
    )


def save_choice(store: ClientStore, choice: SamplingChoice, *, round: int) -> None:
    """Keep the choice, made with the fine model of `round`. Use under the store's lock."""
    store.save_record(FILE, {"round": round, **asdict(choice)})


def load_choice(store: ClientStore, *, round: int | None = None) -> SamplingChoice | None:
    """The kept choice; None where there is none, or not of this `round`.

    `StoreError` if it is damaged or another's.
    """
    record = store.load_record(FILE)
    if record is None or round not in (None, record.get("round")):
        return None
    try:
        return _read(record)
    except (KeyError, TypeError, ValueError) as error:
        raise StoreError(f"{store.root / FILE}.json: is no choice: {error}") from None


def kept_choices(run: RunDirectory, config: RunConfig) -> dict[int, SamplingChoice]:
    """By client, those whose stores are here: in a run directory of a simulation, or at a node.

    Errors as of `load_choice`.
    """
    found = {}
    for client in run.clients():
        store = ClientStore(run.client_path(client), store_label(config, client))
        if (choice := load_choice(store)) is not None:
            found[client] = choice
    return found


def _read(record: Mapping[str, Any]) -> SamplingChoice:
    handover, labels, candidates = (
        record[name] for name in ("handover", "fine_labels", "candidates")
    )
    whole = type(handover) is int and type(candidates) is int and type(labels) is bool
    if not (whole and handover >= 1 and candidates >= 1):
        raise ValueError(
            "handover and candidates must be whole numbers of at least 1, fine_labels true or "
            f"false, got {handover!r}, {candidates!r} and {labels!r}"
        )
    own = record.get("own_classes", [])  # records of earlier versions have none
    if not (isinstance(own, list) and all(type(k) is int and k >= 0 for k in own)):
        raise ValueError(f"own_classes must be a list of labels, got {own!r}")
    scores = {str(name): float(value) for name, value in dict(record["scores"]).items()}
    return SamplingChoice(
        handover=handover,
        fine_labels=labels,
        candidates=candidates,
        why=str(record["why"]),
        own_classes=tuple(own),
        scores=scores,
    )
