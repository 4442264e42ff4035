"""The attacks on models: membership, memorisation, collusion. `upload_attacks` has the rest.

`settings` of a job begin with its name, under the key of the files that hold results.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from fedpdm.attacks.collusion import pooled_scores
from fedpdm.attacks.jobs.models import ModelTarget
from fedpdm.attacks.jobs.running import AttackJob, Count
from fedpdm.attacks.jobs.subjects import Subjects
from fedpdm.attacks.membership import ATTACKS, membership_scores, run_membership
from fedpdm.attacks.memorisation import find_memorised, judge_by_control
from fedpdm.attacks.roc import auc_difference
from fedpdm.reporting.pictures import draw_memorised_pairs

__all__ = [
    "collusion_job",
    "membership_job",
    "memorisation_job",
    "scores_of_curve",
    "seed_of",
]


def seed_of(seed: int, name: str) -> np.random.SeedSequence:
    """The stream of a job: of the seed and of its name, whatever else is run beside it."""
    word = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    return np.random.SeedSequence(seed, spawn_key=(word,))


def _line(scores: Mapping[str, Any]) -> str:
    auc, tpr = scores["auc"], scores["tpr_at_1pct"]
    return (
        f"AUC {auc['value']:.3f} ({auc['low']:.3f} to {auc['high']:.3f}), "
        f"TPR at 1% FPR {100 * tpr['value']:.1f}%"
    )


def membership_job(
    model: ModelTarget,
    subjects: Subjects,
    *,
    attack: str,
    label: str,
    settings: Mapping[str, Any],
    seed: int,
    batch_size: int = 256,
) -> AttackJob:
    """One membership attack on one target, called `label`."""
    name = f"{attack} on {label}"

    def attack_once(count: Count) -> dict[str, Any]:
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
            "curve": scores_of_curve(found.member_scores, found.non_member_scores),
        }

    chosen = {"work": name, "subjects": subjects.digest(), "seed": seed, **settings}
    chosen["parameters"] = dict(ATTACKS[attack].parameters)
    return AttackJob(
        name=name, group="membership", target=label, settings=chosen, attack=attack_once
    )


def scores_of_curve(members: np.ndarray, others: np.ndarray) -> dict[str, list[float]]:
    """What a ROC curve is drawn from, as JSON."""
    return {"members": members.tolist(), "non_members": others.tolist()}


def memorisation_job(
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
) -> AttackJob:
    """Copies of `training` images among samples, `sample(num, seed)` uint8; held-out ones beside.

    `extractor` gives features (N, d) beside pixels, None: pixels only.
    """
    name = f"memorisation by {label}"
    neighbors = min(50, len(training))

    def attack_once(count: Count) -> dict[str, Any]:
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
                beside = find_memorised(control, known, progress=count, **options)
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
    return AttackJob(
        name=name, group="memorisation", target=label, settings=chosen, attack=attack_once
    )


def collusion_job(
    colluders: Mapping[str, ModelTarget],
    subjects: Subjects,
    *,
    attack: str,
    label: str,
    settings: Mapping[str, Any],
    seed: int,
) -> AttackJob:
    """Pool the scores of all other clients' published models and the coarse model against a client.

    `colluders` begins with the coarse model: its own score is what the others add to.
    """
    name = f"collusion, {attack} against {label}"

    def attack_once(count: Count) -> dict[str, Any]:
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
            "curve": scores_of_curve(*pooled["sum"]),
        }

    chosen = {"work": name, "subjects": subjects.digest(), "seed": seed, **settings}
    chosen |= {"colluders": list(colluders), "parameters": dict(ATTACKS[attack].parameters)}
    return AttackJob(
        name=name, group="collusion", target=label, settings=chosen, attack=attack_once
    )
