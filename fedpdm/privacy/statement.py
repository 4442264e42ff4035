"""What is promised, in numbers and in words: `privacy.json` and `privacy.txt`.

A client's statement is read off its ledger; a run's is read off its configuration and, in
simulation, where one party holds all stores, off all ledgers.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fedpdm.config import RunConfig
from fedpdm.privacy.accountant import delta_warning, epsilon_spent
from fedpdm.privacy.ledger import Ledger
from fedpdm.privacy.mechanism import mechanism_of, parameter_fields
from fedpdm.privacy.noise import SAMPLER_DISTANCE
from fedpdm.privacy.planning import ReleasePlan
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.privacy.types import Parameters, PrivacyEvent
from fedpdm.storage.files import StoreError

__all__ = [
    "baseline_statement",
    "client_statement",
    "group_epsilons",
    "plain_text",
    "run_statement",
    "warning_about",
]

GROUPS = (1, 2, 5, 10)
GUARANTEE = "local differential privacy per image, replace-one"
PROTECTS = "each image, against whoever sees everything that its client sends"
NOT_PROTECTED = (
    "labels, which are public",
    "the number of images a client holds, and how many of them are equal",
    "metrics computed on raw data (sent in simulation, or where a client's own config says so)",
    "a client's own images if it publishes its fine model: that model is trained without noise",
    "more than one image of a person as strongly as one: together they have a larger epsilon",
)


def client_statement(store: ReleaseStore, *, delta: float) -> dict[str, Any]:
    """What one client has released, from its ledger; `StoreError` if that is damaged or empty."""
    ledger = store.ledger()
    spent = store.spent(delta=delta)
    if spent.event is None:
        raise StoreError(f"{ledger.path}: nothing was released")
    last = ledger.releases()[-1]
    return {
        "guarantee": GUARANTEE,
        "client_id": ledger.client_id,
        "epsilon": spent.largest,
        "delta": delta,
        "group_epsilon": group_epsilons([spent.group_event], delta=delta),
        "epsilon_distribution": [list(pair) for pair in spent.distribution],
        "images": spent.images,
        "image_shape": list(last.image_shape),
        "releases": len(ledger.releases()),
        "latest_release": parameter_fields(last.parameters),
        "released": _sentences([last.parameters]),
        "noise_sources": sorted({record.noise_source for record in ledger.releases()}),
        "simulation": any(record.seeded for record in ledger.releases()),
        "ledger_head": ledger.head,
        "protects": PROTECTS,
        "does_not_protect": list(NOT_PROTECTED),
        **warning_about(delta, images=spent.images),
    }


def run_statement(
    config: RunConfig,
    plan: ReleasePlan,
    *,
    noise_source: str,
    stores: Sequence[ReleaseStore] = (),
) -> dict[str, Any]:
    """What a run promises; from all clients' ledgers where `stores` are at hand (simulation).

    A store that cannot be read (its client was left out of the run) is named, not counted.
    """
    delta = config.privacy.delta
    counts = Counter[float]()
    groups: list[Callable[[int], PrivacyEvent | None]] = [plan.group_event]
    releases_per_image = 1
    ledgers: list[Ledger] = []
    most_images: int | None = None
    unreadable: list[str] = []
    for store in stores:
        try:
            spent = store.spent(delta=delta)
        except StoreError as error:
            unreadable.append(str(error))
            continue
        if spent.event is not None:
            ledgers.append(store.ledger())
            groups.append(spent.group_event)
            releases_per_image = max(releases_per_image, spent.releases_per_image)
            counts.update(dict(spent.distribution))
            most_images = max(most_images or 0, spent.images)
    distribution = sorted(counts.items(), reverse=True)
    return {
        "guarantee": GUARANTEE,
        "epsilon": distribution[0][0] if distribution else plan.epsilon_exact,
        "epsilon_of_this_release": plan.epsilon_exact,
        "epsilon_requested": config.privacy.epsilon,
        "epsilon_paper_bound": plan.epsilon_paper,
        "accounting": config.privacy.accounting,
        "delta": delta,
        "group_epsilon": group_epsilons(groups, delta=delta),
        "epsilon_distribution": [list(pair) for pair in distribution],
        "released": _sentences(plan.rounds),
        **_settings(plan.rounds),
        "schedule": dataclasses.asdict(config.schedule),
        "releases_per_image": releases_per_image,
        "noise_source": noise_source,
        "sampler_distance_per_pixel": SAMPLER_DISTANCE,
        "simulation": config.run.simulation,
        "ledger_heads": {str(ledger.client_id): ledger.head for ledger in ledgers},
        "unreadable_stores": unreadable,
        "protects": PROTECTS,
        "does_not_protect": list(NOT_PROTECTED),
        **warning_about(delta, images=most_images),
    }


def warning_about(delta: float, *, images: int | None) -> dict[str, str]:
    """`delta_warning` of a statement whose delta is too large for a client with so many images."""
    warning = delta_warning(delta, images=images)
    return {"delta_warning": warning} if warning else {}


def baseline_statement(config: RunConfig) -> dict[str, Any]:
    """What a baseline promises: `coarse.images` raw or dp_sgd, or `coarse.training: none`.

    `epsilon` is None where there is no bound, and 0 where nothing that depends on an image is sent
    but metrics, as in every simulation.
    """
    images = config.coarse.images
    epsilon: float | None
    uncovered = "Losses and image metrics, computed on raw images, are reported and not covered."
    if images == "raw":
        kind, epsilon = "no privacy", None
        words = "The shared model is trained on raw images without noise. Nothing is promised."
    elif images == "dp_sgd":
        kind = "differential privacy per image, add or remove one, by DP-SGD"
        epsilon = config.privacy.epsilon
        words = (
            f"Each client's weights are ({epsilon:g}, {config.privacy.delta:g})-differentially "
            "private with regard to its own images: noise is added to gradients there. That "
            "is no local differential privacy of the images: who runs the client's training sees "
            "them, and weights for one image added or removed are compared, not one replaced. "
            f"{uncovered} This is a simulation: the noise is seeded, and who knows the seed can "
            "remove it."
        )
        if warning := delta_warning(config.privacy.delta):
            words += f" WARNING: {warning}."
    else:
        kind, epsilon = "nothing is sent", 0.0
        words = f"Each client trains alone; no model and no image leaves it. {uncovered}"
    return {
        "baseline": "none" if epsilon == 0.0 else images,
        "guarantee": kind,
        "epsilon": epsilon,
        "delta": config.privacy.delta,
        "simulation": config.run.simulation,
        "words": words,
    }


def _settings(rounds: Sequence[Parameters]) -> dict[str, float]:
    """The settings of each mechanism in these rounds, of its first round."""
    found: dict[str, float] = {}
    for each in rounds:
        found = mechanism_of(each).settings(each) | found
    return found


def _sentences(rounds: Sequence[Parameters]) -> str:
    """What is sent in these rounds, in plain words; the same words once."""
    return " ".join(dict.fromkeys(mechanism_of(each).sentence(each) for each in rounds))


def group_epsilons(
    events: Sequence[Callable[[int], PrivacyEvent | None]], *, delta: float
) -> dict[str, float]:
    """Epsilon of a person with k images in one client, all replaced together: of whichever of the
    `events`, each by k, costs most."""
    found = {}
    for k in GROUPS:
        costs = [event for each in events if (event := each(k)) is not None]
        found[str(k)] = max(epsilon_spent([event], delta=delta) for event in costs)
    return found


def _paragraph(title: str, text: str | None) -> list[str]:
    """Lines of at most 88 characters and an empty one; none where there is no text."""
    return [*textwrap.wrap(f"{title} {text}", 88), ""] if text else []


def plain_text(statement: Mapping[str, Any]) -> str:
    """A statement in plain language, for people who are responsible for data."""
    if "baseline" in statement:
        return "PRIVACY STATEMENT\n\nThis run is a baseline. " + statement["words"] + "\n"
    epsilon, delta = statement["epsilon"], statement["delta"]
    lines = ["PRIVACY STATEMENT", ""]
    if statement["simulation"]:
        lines += [
            "THIS IS A SIMULATION. Its noise comes from a seed: whoever knows the seed can remove",
            "it. Nothing below protects anybody until the same settings run in a deployment.",
            "",
        ]
    lines += [
        "What is protected: every single image that a participant uses, against everybody who sees",
        "everything that the participant sends: the coordinator, the other participants, anyone",
        "who records the traffic, now or later, whatever else they know.",
        "",
        *_paragraph("What is sent:", statement.get("released")),
        f"How much: epsilon = {epsilon:.4g} at delta = {delta:g} (local differential privacy, per",
        "image). If that one image had been any other image, whatever somebody concludes from the",
        "messages would have been concluded with a probability that differs by at most a factor",
        f"e^{epsilon:.4g}, plus {delta:g}.",
    ]
    if warning := statement.get("delta_warning"):
        lines += ["", *textwrap.wrap(f"WARNING: {warning}.", 88)]
    if "group_epsilon" in statement:
        groups = ", ".join(f"{k}: {v:.4g}" for k, v in statement["group_epsilon"].items())
        lines += [
            "",
            "A person with several images at one participant is protected less, all images taken",
            f"together. Epsilon by number of images: {groups}.",
        ]
    if distribution := statement["epsilon_distribution"]:
        lines += ["", "What images have spent, by the ledger:"]
        lines += [f"  epsilon {cost:.4g}: {count:,} images" for cost, count in distribution]
    if unreadable := statement.get("unreadable_stores"):
        lines += ["", "NOT COUNTED, because the store cannot be read:"]
        lines += [f"  {line}" for line in unreadable]
    lines += ["", "What is NOT protected:"]
    lines += [f"  - {item}" for item in statement["does_not_protect"]]
    return "\n".join(lines) + "\n"
