"""Run directories to report on, made by hand, and a reader of the page."""

from __future__ import annotations

import dataclasses
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fedpdm.config import RunConfig, config_to_yaml
from fedpdm.reporting.page import read_run, render_report
from fedpdm.storage.client_store import ClientStore
from fedpdm.storage.run_directory import RunDirectory
from tests.support.federations import small_config

VOID = {"meta", "link", "img", "input", "br", "hr"}
PRIVACY: dict[str, Any] = {
    "guarantee": "local differential privacy per image, replace-one",
    "epsilon": 7.25,
    "delta": 1e-5,
    "t0": 642,
    "clip_norm": 8.0,
    "shift": -1.0,
    "simulation": True,
    "epsilon_distribution": [[7.25, 120]],
    "ledger_heads": {"0": "ab" * 32},
    "does_not_protect": ["labels, which are public"],
}


def records(rounds: int) -> list[dict[str, Any]]:
    return [
        {
            "round": r,
            "coarse_loss": 1.0 / r,
            "fine_loss": 0.5 / r,
            "heldout_coarse_loss": 2.0 / r,
            "bytes_up": 1_000_000,
            "bytes_down": 3_000_000,
            "seconds": 2.0,
            "clients": [{"client_id": 0, "fine_loss": 0.25 / r}],
            "failed": [],
        }
        for r in range(1, rounds + 1)
    ]


FINAL = {"clients": [{"client_id": 0, "majority_pfdm_frechet": 3.5, "minority_pfdm_frechet": 7.5,
                      "majority_alone_frechet": 4.5, "majority_own_frechet": 0.5}]}  # fmt: skip


def made_run(
    folder: Path,
    *,
    name: str = "small",
    rounds: int = 3,
    finished: bool = True,
    privacy: dict[str, Any] | None = None,
    classes: list[str] | None = None,
    samples: bool = True,
    **sections: dict[str, Any],
) -> Path:
    """A run directory with all that a page shows but models."""
    given = {"run": {"rounds": 3}, "partition": {"num_clients": 2}, **sections}
    config: RunConfig = dataclasses.replace(small_config(**given), name=name)
    folder.mkdir(parents=True)
    run = RunDirectory(folder)
    run.write_text("config.yaml", config_to_yaml(config))
    names = classes or [str(k) for k in range(10)]
    run.write_json(
        "partition.json",
        {
            "class_names": names,
            "clients": [
                {"client_id": c, "num_images": 55 + c, "per_class": [10 + c] * len(names)}
                for c in range(2)
            ],
        },
    )
    metrics: dict[str, Any] = {"rounds": records(rounds)}
    if finished:
        metrics["final"] = FINAL
        run.write_json("privacy.json", PRIVACY if privacy is None else privacy)
        run.write_json("versions.json", {"fedpdm": "0.1.0", "torch": "9.8.7"})
    run.write_json("metrics.json", metrics)
    if samples:
        labels = np.repeat(np.arange(len(names)), 2)
        arrays = {m: np.full((len(labels), 3, 8, 8), 99, np.uint8) for m in ("coarse", "pfdm")}
        ClientStore(run.client_path(0)).save_samples({"labels": labels, **arrays})
    return folder


def made_attacks(folder: Path, **changes: Any) -> Path:
    """A folder with `attacks.json`, as `fedpdm attack` writes it, and a curve."""
    folder.mkdir(parents=True, exist_ok=True)
    half = {"value": 0.512, "low": 0.49, "high": 0.534}
    scores = {"auc": half, "asr": half, "asr_at_chance": 0.53, "tpr_at_1pct": half,
              "tpr_at_01pct": half, "num_members": 321}  # fmt: skip
    record = {
        "what": "Attacks on a finished run.",
        "attacks": [
            {"name": "pia on coarse", "group": "membership", "target": "coarse", "title": "PIA",
             "scores": scores},
            {"name": "copies", "group": "memorisation", "target": "combined",
             "headline": "0 of 1000 samples flagged"},
            {"name": "best guess", "group": "reconstruction", "target": "upload",
             "rows": [{"attacker": "global", "recovery": 0.875,
                       "identification_in_class": {"rate": 0.125, "chance": 0.0625}}]},
        ],
        "pictures": ["roc-coarse.png"],
        **changes,
    }  # fmt: skip
    (folder / "attacks.json").write_text(json.dumps(record))
    Image.new("RGB", (30, 20), (200, 10, 10)).save(folder / "roc-coarse.png")
    return folder


def page_of(*folders: Path, attacks: Path | None = None, **options: Any) -> Page:
    runs = [read_run(folder, attacks=attacks) for folder in folders]
    return Page(render_report(runs, say=lambda line: None, **options))


class Page(HTMLParser):
    """The page's elements, in order: (tag, attributes, text directly and below)."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self._open: list[int] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}, []))
        if tag not in VOID:
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {k: v or "" for k, v in attrs}, []))

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self._open[-1]][0] == tag, f"</{tag}> closes another element"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        for index in self._open:
            self.elements[index][2].append(data)

    def all(self, *tags: str) -> list[tuple[str, dict[str, str], str]]:
        """(tag, attributes, text) of elements with these tags."""
        return [(t, a, " ".join("".join(s).split())) for t, a, s in self.elements if t in tags]

    def table(self, caption: str) -> list[list[str]]:
        """Cells of the first table with this caption, row by row."""
        at = next(
            i for i, (t, _, s) in enumerate(self.elements)
            if t == "caption" and caption in "".join(s)
        )  # fmt: skip
        rows: list[list[str]] = []
        for tag, _, text in self.elements[at:]:
            if tag == "tr":
                rows.append([])
            elif tag in ("td", "th"):
                rows[-1].append(" ".join("".join(text).split()))
            elif tag == "caption" and rows:
                break
        return rows

    @property
    def text(self) -> str:
        return " ".join("".join(self.elements[0][2]).split())
