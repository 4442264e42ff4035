"""The works: membership of any target, and what a run's uploads, samples and models give away."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fedpdm.attacking.models import ModelTarget
from fedpdm.attacking.running import Count, Work
from fedpdm.attacking.subjects import Subjects
from fedpdm.attacks.collusion import pooled_scores
from fedpdm.attacks.denoising import Reconstructor
from fedpdm.attacks.linkage import linkage_attack
from fedpdm.attacks.membership import ATTACKS, membership_scores, run_membership
from fedpdm.attacks.memorisation import find_memorised, judge_by_control
from fedpdm.attacks.reconstruction import attack_uploads, unclip_factor
from fedpdm.attacks.roc import auc_difference
from fedpdm.data import ImageSet, denormalize
from fedpdm.pictures import draw_memorised_pairs, draw_reconstructions
from fedpdm.types import ReleasedDataset

__all__ = [
    "collusion_work",
    "linkage_work",
    "membership_work",
    "memorisation_work",
    "reconstruction_work",
    "seed_of",
]


def seed_of(seed: int, name: str) -> np.random.SeedSequence:
    """The stream of a work: of the seed and of its name, whatever else is run beside it."""
    word = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    return np.random.SeedSequence(seed, spawn_key=(word,))


def _line(scores: Mapping[str, Any]) -> str:
    auc, tpr = scores["auc"], scores["tpr_at_1pct"]
    return (
        f"AUC {auc['value']:.3f} ({auc['low']:.3f} to {auc['high']:.3f}), "
        f"TPR at 1% FPR {100 * tpr['value']:.1f}%"
    )


def membership_work(
    model: ModelTarget,
    subjects: Subjects,
    *,
    attack: str,
    label: str,
    settings: Mapping[str, Any],
    seed: int,
    batch_size: int = 256,
) -> Work:
    """One membership attack on one target, called `label`."""
    name = f"{attack} on {label}"

    def work(count: Count) -> dict[str, Any]:
        member_labels, other_labels = subjects.tensors()
        found = run_membership(
            model.target,
            model.inputs(subjects.members),
            member_labels,
            model.inputs(subjects.non_members),
            other_labels,
            attack=attack,
            seed=seed_of(seed, name),
            batch_size=batch_size,
            progress=count,
        )
        scores = dataclasses.asdict(found.scores)
        return {
            "headline": _line(scores),
            "title": ATTACKS[attack].title,
            "source": ATTACKS[attack].source,
            "parameters": found.parameters,
            "scores": scores,
            "curve": _curve(found.member_scores, found.non_member_scores),
        }

    chosen = {"work": name, "subjects": subjects.digest(), "seed": seed, **settings}
    chosen["parameters"] = dict(ATTACKS[attack].parameters)
    return Work(name=name, group="membership", target=label, settings=chosen, attack=work)


def _curve(members: np.ndarray, others: np.ndarray) -> dict[str, list[float]]:
    return {"members": members.tolist(), "non_members": others.tolist()}


def memorisation_work(
    sample: Any,
    training: np.ndarray,
    held_out: np.ndarray,
    *,
    extractor: Any,
    label: str,
    num_samples: int,
    picture: Path,
    settings: Mapping[str, Any],
    seed: int,
) -> Work:
    """Copies of `training` images among samples, `sample(num, seed)` uint8; held-out ones beside.

    `extractor` gives features (N, d) beside pixels, None: pixels only.
    """
    name = f"memorisation by {label}"
    neighbors = min(50, len(training))

    def work(count: Count) -> dict[str, Any]:
        generated = sample(num_samples, seed)
        spaces: dict[str, Any] = {"pixels": (generated, training, held_out)}
        if extractor is not None:
            spaces[extractor.name] = tuple(
                extractor(images) if len(images) else images
                for images in (generated, training, held_out)
            )
        result: dict[str, Any] = {}
        for space, (ours, known, control) in spaces.items():
            options: dict[str, Any] = {"num_neighbors": neighbors, "space": space}
            found = find_memorised(ours, known, progress=count, **options)
            result[space] = dataclasses.asdict(found.summary)
            if len(control) >= 1:
                beside = find_memorised(control, known, **options)
                result[space]["held_out_flagged_fraction"] = beside.summary.flagged_fraction
                if len(control) >= 100:
                    judged = judge_by_control(found, beside)
                    result[space]["control"] = dataclasses.asdict(judged)
            if space == "pixels":
                worst = found.worst(20)
                draw_memorised_pairs(
                    picture, generated[worst], training[found.nearest[worst]], found.ratios[worst],
                    title=f"Memorisation by {label}: generated images nearest to a training image",
                )  # fmt: skip
        pixels = result["pixels"]
        control = pixels.get("held_out_flagged_fraction")
        beside_text = "" if control is None else f" (held-out real images: {100 * control:.2f}%)"
        result["headline"] = (
            f"{pixels['num_flagged']} of {num_samples} samples flagged, "
            f"{100 * pixels['flagged_fraction']:.2f}%{beside_text}"
        )
        result["picture"] = picture.name
        return result

    chosen = {"work": name, "seed": seed, "num_samples": num_samples, "neighbors": neighbors}
    chosen |= {"extractor": None if extractor is None else extractor.digest, **settings}
    return Work(name=name, group="memorisation", target=label, settings=chosen, attack=work)


def reconstruction_work(
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
    late: Callable[[], Reconstructor] | None = None,
) -> Work:
    """Reconstruct `originals` uint8 from their uploads. `public` gives the length of images.

    `late` makes one attacker more, when the work is done: one that must be trained first.
    """

    def work(count: Count) -> dict[str, Any]:
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
                row = attacker if method == "rescaled" else f"{attacker}, {method}"
                shown[row] = denormalize(images[:10], shift=shift).numpy()
        draw_reconstructions(picture, shown, note=f"t0 = {found.t0}")
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
        }

    chosen = {"work": name, "seed": seed, "images": len(originals), **settings}
    chosen["attackers"] = [each.name for each in attackers]
    return Work(name=name, group=group, target=target, settings=chosen, attack=work)


def linkage_work(
    images: ImageSet, released: ReleasedDataset, *, label: str, settings: Mapping[str, Any],
    seed: int,
) -> Work:  # fmt: skip
    """The server's guess from which of two of a client's images each of its uploads was made."""
    name = f"linkage of uploads of {label}"

    def work(count: Count) -> dict[str, Any]:
        place = {bytes(row): at for at, row in enumerate(images.image_digests())}

        def obtain(chosen: ImageSet) -> ReleasedDataset:
            rows = torch.tensor([place[bytes(row)] for row in chosen.image_digests()])
            count(len(rows), len(rows))
            from fedpdm.mechanism import select

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
            "curve": _curve(found.positive, found.negative),
        }

    chosen = {"work": name, "seed": seed, **settings}
    return Work(name=name, group="linkage", target=label, settings=chosen, attack=work)


def collusion_work(
    colluders: Mapping[str, ModelTarget],
    subjects: Subjects,
    *,
    attack: str,
    label: str,
    settings: Mapping[str, Any],
    seed: int,
) -> Work:
    """Everybody else's published models and the coarse one, their scores pooled, against a client.

    `colluders` begins with the coarse model: its own score is what the others add to.
    """
    name = f"collusion, {attack} against {label}"

    def work(count: Count) -> dict[str, Any]:
        labels = subjects.tensors()
        scores = []
        for done, model in enumerate(colluders.values(), 1):
            found = run_membership(
                model.target, model.inputs(subjects.members), labels[0],
                model.inputs(subjects.non_members), labels[1], attack=attack,
                seed=seed_of(seed, name), num_bootstrap=1,
            )  # fmt: skip
            scores.append((found.member_scores, found.non_member_scores))
            count(done * len(subjects), len(colluders) * len(subjects))
        standard = [pooled_scores([pair]) for pair in scores]
        pooled = {
            "sum": pooled_scores(scores),
            "mean": tuple(np.mean(part, axis=0) for part in zip(*scores, strict=True)),
            "max": tuple(np.max(part, axis=0) for part in zip(*standard, strict=True)),
        }
        rng = np.random.default_rng(seed_of(seed, name))
        rates = {
            rule: dataclasses.asdict(membership_scores(*pair, rng=rng))
            for rule, pair in pooled.items()
        }
        first = next(iter(colluders))
        alone = membership_scores(*scores[0], rng=rng)
        gain, low, high = auc_difference(pooled["sum"], scores[0])
        return {
            "headline": f"pooled {_line(rates['sum'])}; {first} alone {alone.auc.value:.3f}",
            "colluders": list(colluders),
            "scores": rates["sum"],
            "rules": rates,
            "alone": dataclasses.asdict(alone),
            "gain": {"value": gain, "low": low, "high": high},
            "curve": _curve(*pooled["sum"]),
        }

    chosen = {"work": name, "subjects": subjects.digest(), "seed": seed, **settings}
    chosen |= {"colluders": list(colluders), "parameters": dict(ATTACKS[attack].parameters)}
    return Work(name=name, group="collusion", target=label, settings=chosen, attack=work)
