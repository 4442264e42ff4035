"""The tables of plain text that `fedpdm privacy` prints in place of JSON."""

from __future__ import annotations

from collections.abc import Mapping
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN
from typing import Any

from fedpdm.privacy.calibration import rounded

__all__ = ["answer_lines"]

TITLES = {"exact": "exact", "paper": "paper bound"}
LABEL, COLUMN = 38, 14


def answer_lines(answer: Mapping[str, Any]) -> list[str]:
    """The whole answer, line by line."""
    parts = []
    if "public_sample" in answer:
        parts.append(_sample_lines(answer["public_sample"]))
    if "exact" in answer:
        parts.append(_calibration_lines(answer))
    if "network" in answer:
        parts += _network_lines(answer["network"])
    if "picture" in answer:
        picture = answer["picture"]
        parts.append([f"picture of {picture['source']} written to {picture['path']}"])
    return [line for part in parts for line in ("", *part)][1:]


def _calibration_lines(answer: Mapping[str, Any]) -> list[str]:
    """The calibrations side by side, then the tables that belong to them."""
    exact, schedule = answer["exact"], answer["schedule"]
    columns = [answer[name] for name in TITLES if "error" not in answer[name]]
    count = exact["releases"]
    many = f"{count} releases" if count > 1 else "1 release"
    each = f", each released {count} times" if count > 1 else ""
    lines = [
        f"local differential privacy of each image, {many} of it, {schedule['kind']} schedule",
        "each column is the setting that this accounting asks for, and its cost by it",
        "",
        _line("", *(TITLES[column["accounting"]] for column in columns)),
    ]
    for key, label in (
        ("epsilon", f"epsilon at delta {exact['delta']:g}"),
        ("exact_epsilon", "  its exact value"),
        ("t0", f"t0 of {schedule['num_steps']}"),
        ("clip_norm", "clip norm C"),
        ("sigma", "noise sigma, clean image's scale"),
        ("signal_to_noise", "C / sigma, of one release"),
        ("linkage_auc", "worst-case linkage AUC"),
        ("linkage_tpr", "  and TPR at 1% FPR"),
    ):
        rounding = ROUND_FLOOR if key in ("clip_norm", "sigma") else ROUND_CEILING
        lines.append(_line(label, *(_number(column[key], rounding) for column in columns)))
    lines += [
        f"{TITLES[name]}: {answer[name]['error']}" for name in TITLES if "error" in answer[name]
    ]
    tables = [
        (f"epsilon for a person with k images in one client, replaced together{each}",
         [(f"  k = {k}", [column["group_epsilon"][k] for column in columns])
          for k in exact["group_epsilon"]]),
        ("epsilon of K releases of the same image, at this t0 and clip norm",
         [(f"  K = {k}", [column["release_epsilon"][k] for column in columns])
          for k in exact["release_epsilon"]]),
    ]  # fmt: skip
    if "curve" in exact:
        tables += [
            ("epsilon at other deltas", _curve(columns, "epsilon", at="delta")),
            ("delta at other epsilons", _curve(columns, "delta", at="epsilon")),
        ]
    for title, rows in tables:
        lines += ["", title, *(_line(label, *map(_number, values)) for label, values in rows)]
    return lines


def _curve(
    columns: list[Mapping[str, Any]], value: str, *, at: str
) -> list[tuple[str, list[float]]]:
    """Rows of the curve: the columns have the same places, in the same order."""
    curves = [column["curve"][f"{value}_at_{at}"] for column in columns]
    return [
        (f"  {at} {points[0][at]:g}", [point[value] for point in points])
        for points in zip(*curves, strict=True)
    ]


def _network_lines(network: Mapping[str, Any]) -> list[list[str]]:
    """The noise by rate, rounds and share, then the same over the clipped signal, if known."""
    shares = list(dict.fromkeys(row["share"] for row in network["rows"]))
    heads = [f"{100 * share:g}%" for share in shares]
    clients, images, size = (network[key] for key in ("clients", "images", "parameters"))
    tables = {"noise_multiplier": "noise multiplier sigma / C"}
    if size is not None:
        tables["noise_per_step"] = (
            f"noise over C in a step's mean gradient: {clients} clients of {images:,} images, each "
            f"its own noise, {size:,} parameters"
        )
    parts = [
        [
            "a network that is trained in rounds over Poisson samples (DP-SGD), beside statistics",
            f"epsilon {network['epsilon']:g} at delta {network['delta']:g}, one image replaced by "
            "another of its label; privacy loss distributions,",
            "an upper bound (the paper has none for it)",
        ]
    ]
    for key, title in tables.items():
        lines = [title, _line("  by the statistics' share of mu^2", *heads)]
        for rate, count in dict.fromkeys((r["sample_rate"], r["rounds"]) for r in network["rows"]):
            values = [
                _number(row[key])
                for row in network["rows"]
                if (row["sample_rate"], row["rounds"]) == (rate, count)
            ]
            label = f"  q {rate:g}, {count:,} rounds: {rate * count:.4g} passes"
            lines.append(_line(label, *values))
        parts.append(lines)
    return parts


def _sample_lines(sample: Mapping[str, Any]) -> list[str]:
    """Quantiles of the norms of public images."""
    lines = [
        f"L2 norms of {sample['images']:,} public images of {sample['source']}, in [-1, 1] minus "
        f"the shift {sample['shift']:g}",
        *(
            _line(f"  {100 * float(quantile):g}%", _number(norm, ROUND_HALF_EVEN))
            for quantile, norm in sample["norm_quantiles"].items()
        ),
    ]
    if "clip_norm" in sample:
        quantile = f"{100 * sample['clip_quantile']:g}%"
        lines.append(
            _line(
                f"clip norm C, the {quantile} quantile", _number(sample["clip_norm"], ROUND_FLOOR)
            )
        )
    return lines


def _number(value: float, rounding: str = ROUND_CEILING) -> str:
    """Five digits: what is spent is rounded up, and the clip norm down."""
    return str(value) if isinstance(value, int) else rounded(value, rounding, digits=5)


def _line(label: str, *values: str) -> str:
    return f"{label:<{LABEL}}" + "".join(f"{value:>{COLUMN}}" for value in values)
