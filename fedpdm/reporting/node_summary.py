"""A node's own summary of a run: what was released, what it cost, what its models are for."""

from __future__ import annotations

from fedpdm.privacy.mechanism import mechanism_named
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.reporting.run_files import privacy_lines
from fedpdm.setup.choice import load_choice
from fedpdm.storage.files import StoreError
from fedpdm.storage.node_run import NodeRun

__all__ = ["summarise_node"]

FILES = (
    ("samples.png", "samples of each class, a row per method"),
    ("statement.txt", "what is promised, in plain words"),
    ("metrics.json", "losses of each round; they stay here"),
    ("coarse.safetensors", "the shared model"),
    ("report.html", "the report"),
)


def summarise_node(run: NodeRun) -> str:
    """Lines for the node's owner; a run that has not finished is said to be at its last round.

    `ConfigError` or `StoreError`, one line, for files that are missing or damaged.
    """
    config, facts, store = run.config(), run.facts(), run.store
    mechanism_named(config.privacy.release)  # the ledger may name a custom one
    counts = zip(facts["class_names"], facts["clients"][0]["per_class"], strict=True)
    history = run.read_json("metrics.json")
    done, finished = len(history["rounds"]), "final" in history
    lines = [
        "",
        f"Node of client {run.client_id}  {run.root}",
        f"Run {config.name}: {done} of {config.run.rounds} rounds"
        + ("" if finished else "; it has not finished"),
        f"Own images: {facts['num_images']:,}; "
        + ", ".join(f"{name} {count:,}" for name, count in counts),
    ]
    lines += [f"  {name:<19} {what}" for name, what in FILES if (run.root / name).exists()]
    if finished:
        lines += ["", *privacy_lines(run.statement())]
    if config.kind.releases:
        lines += ["", *_spent(ReleaseStore(run.release_path(run.client_id)), config.privacy.delta)]
    if (choice := load_choice(store, round=store.last_round())) is not None:
        lines += ["", f"Samples with {choice.words}"]
    if finished:
        lines += [
            "",
            "The fine model was trained on this node's raw images without noise: it, its samples",
            "and this folder are as private as the images.",
        ]
    return "\n".join(lines)


def _spent(store: ReleaseStore, delta: float) -> list[str]:
    """What the ledger says, of all runs together."""
    try:
        ledger, spent = store.ledger(), store.spent(delta=delta)
    except StoreError as error:
        return [f"Ledger   {error}"]
    count = len(ledger.releases())
    lines = [
        f"Ledger   {count} release{'' if count == 1 else 's'} of {spent.images:,} images, all runs "
        f"of this node together: epsilon {spent.largest:.4g} at most, at delta {delta:g}"
    ]
    lines += [f"           epsilon {cost:.4g}: {n:,} images" for cost, n in spent.distribution]
    return lines
