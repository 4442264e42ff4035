"""The attacks on uploads: reconstruction, and linkage to the image that was uploaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpdm.attacks.denoising import Reconstructor
from fedpdm.attacks.jobs.model_attacks import scores_of_curve, seed_of
from fedpdm.attacks.jobs.running import AttackJob, Count
from fedpdm.attacks.linkage import linkage_attack
from fedpdm.attacks.membership import membership_scores
from fedpdm.attacks.reconstruction import attack_uploads, unclip_factor
from fedpdm.data import ImageSet, denormalize
from fedpdm.privacy.mechanism import select
from fedpdm.privacy.types import ReleasedDataset
from fedpdm.reporting.attack_words import ATTACKERS
from fedpdm.reporting.pictures import draw_reconstructions

__all__ = ["linkage_job", "reconstruction_job"]


def reconstruction_job(
    released: ReleasedDataset,
    originals: np.ndarray,
    public: np.ndarray,
    attackers: Sequence[Reconstructor],
    *,
    name: str,
    group: str,
    target: str,
    picture: Path,
    settings: Mapping[str, Any],
    seed: int,
    note: str = "",
    late: Callable[[], Reconstructor] | None = None,
) -> AttackJob:
    """Reconstruct `originals` uint8 from their uploads. `public` gives the length of images.

    `note` says in the report what the uploads are. `late` adds an attacker when the attack runs:
    one that must be trained first.
    """

    def attack_once(count: Count) -> dict[str, Any]:
        stream = seed_of(seed, name)
        shift = released.parameters.shift
        unclip = unclip_factor(public, clip_norm=released.parameters.clip_norm, shift=shift)
        found = attack_uploads(
            released,
            originals,
            reconstructors=[*attackers, *([late()] if late else [])],
            generator=torch.Generator().manual_seed(int(stream.generate_state(1)[0])),
            rng=np.random.default_rng(stream),
            unclip=unclip,
            progress=count,
        )
        shown = {"original": originals[:10]}
        for (attacker, method), images in found.images.items():
            if attacker != "blind":
                row = ATTACKERS.get(attacker, f"{attacker}, {method}")
                shown[row] = denormalize(images[:10], shift=shift).numpy()
        title = f"{name[0].upper()}{name[1:]}"
        draw_reconstructions(picture, shown, title=title, note=f"t0 = {found.t0}")
        best = min(
            (row for row in found.rows if row.attacker not in ("none", "blind")),
            key=lambda row: row.distance,
        )
        named = best.identification_in_class
        return {
            "headline": f"best {best.attacker} ({best.method}): recovery {best.recovery:.3f}, "
            f"against the blind guess {best.recovery_blind:.3f}",
            "rows": [dataclasses.asdict(row) for row in found.rows],
            "upload": dataclasses.asdict(found.upload),
            "upload_in_class": dataclasses.asdict(found.upload_in_class),
            "best": {"attacker": best.attacker, "method": best.method},
            "best_identification": dataclasses.asdict(named),
            "unclip": unclip,
            "t0": found.t0,
            "picture": picture.name,
            **({"note": note} if note else {}),
        }

    chosen = {"work": name, "seed": seed, "images": len(originals), **settings}
    chosen["attackers"] = [each.name for each in attackers]
    return AttackJob(name=name, group=group, target=target, settings=chosen, attack=attack_once)


def linkage_job(
    images: ImageSet, released: ReleasedDataset, *, label: str, settings: Mapping[str, Any],
    seed: int,
) -> AttackJob:  # fmt: skip
    """The server's guess from which of two of a client's images each of its uploads was made."""
    name = f"linkage of uploads of {label}"

    def attack_once(count: Count) -> dict[str, Any]:
        place = {bytes(row): at for at, row in enumerate(images.image_digests())}

        def obtain(chosen: ImageSet) -> ReleasedDataset:
            rows = torch.tensor([place[bytes(row)] for row in chosen.image_digests()])
            count(len(rows), len(rows))
            return select(released, rows)

        stream = np.random.default_rng(seed_of(seed, name))
        found = linkage_attack(images, obtain, rng=stream, confidence=0.95)
        figures = dataclasses.asdict(found.summary)
        scores = membership_scores(found.positive, found.negative, rng=stream)
        return {
            "headline": f"AUC {figures['auc']:.3f} ({figures['auc_low']:.3f} to "
            f"{figures['auc_high']:.3f}), theory {figures['auc_analytic']:.3f}, worst case "
            f"{figures['worst_auc']:.3f}",
            "linkage": figures,
            "scores": dataclasses.asdict(scores),
            "curve": scores_of_curve(found.positive, found.negative),
        }

    chosen = {"work": name, "seed": seed, **settings}
    return AttackJob(name=name, group="linkage", target=label, settings=chosen, attack=attack_once)
