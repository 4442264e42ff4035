"""`fedpdm ledger`: what clients have released and what each image has paid."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedpdm.commands.terminal import show
from fedpdm.text import json_text

if TYPE_CHECKING:
    from fedpdm.privacy.ledger import Record, ReleaseRecord
    from fedpdm.privacy.releases import ReleaseStore

__all__ = ["add_ledger_parser"]

NAME = "ledger.jsonl"
DESCRIPTION = """\
Print the ledger of a client's store: what was released when, with which parameters and noise, and
the epsilon that each image has spent. Checks every record and every release file first; a ledger
that was edited or cut is refused (exit code 2). Keep the head somewhere else: it also shows a
ledger that was replaced as a whole.
"""


def add_ledger_parser(commands: Any) -> None:
    """Add the command to the subparsers of `fedpdm`."""
    parser = commands.add_parser(
        "ledger",
        help="what clients have released, and what each image has paid",
        description=DESCRIPTION,
    )
    parser.add_argument("directory", type=Path, help="a client's store, a run or a --releases DIR")
    parser.add_argument("--delta", type=float, help="default: that of each latest release")
    parser.add_argument("--head", help="fail unless the (one) ledger has been at this head")
    parser.set_defaults(action=run_ledger)


def find_ledgers(directory: Path) -> list[Path]:
    """Stores with a ledger: the directory itself, or one per client below it."""
    if not directory.is_dir():
        raise ValueError(f"{directory}: is not a directory")
    if (directory / NAME).exists():
        return [directory]
    for pattern in (f"clients/*/{NAME}", f"*/{NAME}"):
        if found := [path.parent for path in directory.glob(pattern)]:
            return sorted(found, key=lambda path: (len(path.name), path.name))
    raise ValueError(
        f"{directory}: holds no {NAME}; give a client's store, a run, or the --releases directory "
        "of a run"
    )


def run_ledger(options: argparse.Namespace) -> None:
    """The command's action. `ValueError` with one line for a ledger that does not check out."""
    from fedpdm.privacy.mechanism import mechanism_named
    from fedpdm.privacy.releases import ReleaseStore
    from fedpdm.storage.run_directory import RunDirectory

    if (options.directory / "config.yaml").exists():  # a run's may be custom
        mechanism_named(RunDirectory(options.directory).config().privacy.release)
    stores = [ReleaseStore(path) for path in find_ledgers(options.directory)]
    if options.head:
        if len(stores) != 1:
            raise ValueError(f"--head: needs one ledger, {options.directory} has {len(stores)}")
        stores[0].check_history([options.head])
    found = [_describe(store, options.delta) for store in stores]
    if options.json:
        print(json_text(found))
        return
    for store, facts in zip(stores, found, strict=True):
        show(_text(store, facts))


def _describe(store: ReleaseStore, delta: float | None) -> dict[str, Any]:
    store.check_traces()
    ledger = store.ledger()
    releases = ledger.releases()
    chosen = delta if delta is not None else (releases[-1].delta if releases else 1e-5)
    spent = store.spent(delta=chosen)
    return {
        "store": str(store.root),
        "client_id": ledger.client_id,
        "head": ledger.head,
        "delta": chosen,
        "epsilon_max": spent.largest,
        "epsilon_distribution": [
            {"epsilon": epsilon, "images": count} for epsilon, count in spent.distribution
        ],
        "images": spent.images,
        "simulation": any(release.seeded for release in releases),
        "records": [
            {
                "record": record.number,
                "kind": record.kind,
                "at": record.at,
                **record.fields,
                "chain": record.chain,
            }
            for record in ledger.records
        ],
    }


def _text(store: ReleaseStore, facts: dict[str, Any]) -> str:
    from fedpdm.privacy.accountant import delta_warning

    ledger = store.ledger()
    releases = iter(ledger.releases())
    lines = [
        f"Client {facts['client_id']}  {ledger.path}",
        f"  {len(ledger.records)} records and {len(ledger.releases())} release files check out; "
        f"head {ledger.head}",
    ]
    for record in ledger.records:
        lines += _record_lines(record, next(releases) if record.kind == "release" else None)
    lines.append(
        f"  Spent per image at delta {facts['delta']:g}: epsilon {facts['epsilon_max']:.4g} at most"
    )
    lines += [
        f"    epsilon {row['epsilon']:<8.4g} {row['images']:>9,} images"
        for row in facts["epsilon_distribution"]
    ]
    if warning := delta_warning(facts["delta"], images=facts["images"]):
        lines.append(f"  WARNING: {warning}.")
    if facts["simulation"]:
        lines.append("  SIMULATION: seeded noise; it protects from nobody who knows the seed.")
    return "\n".join(lines)


def _record_lines(record: Record, release: ReleaseRecord | None) -> list[str]:
    from fedpdm.privacy.mechanism import mechanism_of

    title = f"  {record.number:>3}  {record.at}  {record.kind}"
    if release is None:
        facts = ", ".join(f"{key} {_words(value)}" for key, value in record.fields.items())
        return [f"{title}  {facts}"]
    settings = mechanism_of(release.parameters).describe(release.parameters)
    event = ", ".join(
        f"{name.replace('_', ' ')} {value:.5g}"
        for name, value in dataclasses.asdict(release.event).items()
    )
    shape = "x".join(map(str, release.image_shape))
    steps = [f"{k} {v}" for k, v in (release.preparation or {}).items() if v is not None]
    return [
        f"{title} {release.release}: {release.images:,} images of {shape}, epsilon "
        f"{release.epsilon:.4g} at delta {release.delta:g}",
        f"{'':9}{settings}, {event}",
        *([f"{'':9}images prepared by data: {', '.join(steps)}"] if steps else []),
        f"{'':9}noise: {release.noise_source}",
        f"{'':9}file: {release.file}, SHA-256 {release.sha256[:16]}...",
    ]


def _words(value: Any) -> str:
    """A field's value; of accepted classes `benign=gutartig malignant=boesartig`."""
    pairs = value if isinstance(value, list) else ()
    return " ".join("=".join(map(str, pair)) for pair in pairs) or str(value)
