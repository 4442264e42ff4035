"""The classes of a set: its own, colours, combinations of attributes, or a selection of these."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedpdm.config.names import ClassLabel
from fedpdm.data.coloring import COLOR_NAMES

__all__ = [
    "DEFAULT_ATTRIBUTES",
    "attribute_classes",
    "count_classes",
    "find_classes",
    "keep_classes",
    "label_by_color",
]

#: The groups of PFDM's CelebA experiments (docs/method.md, section 5).
DEFAULT_ATTRIBUTES: Final = ("Black_Hair", "Male")
_MAX_ATTRIBUTES: Final = 4
_WORDS: Final = {"Black_Hair": ("black hair", "other hair"), "Male": ("male", "female")}
_NAMES_SHOWN: Final = 12


def label_by_color(
    labels: NDArray[np.int64],
    colors: NDArray[np.int64],
    class_names: tuple[str, ...],
    *,
    class_label: ClassLabel,
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Labels (N,) and class names when colours count.

    With `both`, class k in colour c is class 10 k + c, "3 green".
    """
    if class_label == "digit":
        return labels, class_names
    if class_label == "color":
        return colors, COLOR_NAMES
    names = tuple(f"{name} {color}" for name in class_names for color in COLOR_NAMES)
    return labels * len(COLOR_NAMES) + colors, names


def attribute_classes(
    values: NDArray[np.int64], known: Sequence[str], wanted: Sequence[str]
) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """A class per combination of binary attributes, those that have the first one first.

    Args:
        values: (N, A) 0 or 1, a column per attribute.
        known: names of the A attributes.
        wanted: 1 to 4 of them.

    Returns:
        Labels (N,) int64 in [0, 2^len(wanted)) and their names, "black hair, male".

    Raises:
        ValueError: for an attribute that is not known or comes twice, or too many.
    """
    if not 1 <= len(wanted) <= _MAX_ATTRIBUTES:
        raise ValueError(
            f"data.attributes: must be 1 to {_MAX_ATTRIBUTES} attributes, got {len(wanted)}"
        )
    labels, names = np.zeros(len(values), dtype=np.int64), [""]
    for place, attribute in enumerate(wanted):
        if attribute not in known:
            raise ValueError(
                f"data.attributes: unknown attribute {attribute!r}{_guess(attribute, known)}"
            )
        if attribute in wanted[:place]:
            raise ValueError(f"data.attributes: {attribute!r} is there twice")
        labels = 2 * labels + 1 - values[:, list(known).index(attribute)]
        plain = attribute.replace("_", " ").lower()
        words = _WORDS.get(attribute, (plain, f"not {plain}"))
        names = [f"{name}, {word}" if name else word for name in names for word in words]
    return labels.astype(np.int64), tuple(names)


def find_classes(wanted: Sequence[int | str], class_names: Sequence[str]) -> tuple[int, ...]:
    """Numbers of the classes in `wanted`: a string is a name, a whole number a place in the list.

    Raises:
        ValueError: for a class that is not there or comes twice, or none at all.
    """
    if not wanted:
        raise ValueError("data.classes: must name at least 1 class, got none")
    found: list[int] = []
    for each in wanted:
        if isinstance(each, str):
            if each not in class_names:
                shown = ", ".join(class_names[:_NAMES_SHOWN])
                more = ", ..." if len(class_names) > _NAMES_SHOWN else ""
                raise ValueError(
                    f"data.classes: unknown class {each!r}{_guess(each, class_names)} "
                    f"(known: {shown}{more})"
                )
            number = list(class_names).index(each)
        elif 0 <= each < len(class_names):
            number = each
        else:
            raise ValueError(f"data.classes: must be in [0, {len(class_names) - 1}], got {each}")
        if number in found:
            raise ValueError(f"data.classes: class {class_names[number]!r} is there twice")
        found.append(number)
    return tuple(found)


def keep_classes(
    labels: NDArray[np.int64], class_names: Sequence[str], kept: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.int64], tuple[str, ...]]:
    """Some classes only, numbered anew in the order of `kept`.

    Returns:
        Positions (n,) int64, ascending, of the images that stay, their new labels (n,) int64 and
        the names.
    """
    number = np.full(len(class_names), -1, dtype=np.int64)
    number[list(kept)] = np.arange(len(kept))
    renamed = number[labels]
    positions = np.flatnonzero(renamed >= 0)
    return positions, renamed[positions], tuple(class_names[k] for k in kept)


def count_classes(
    own: int,
    *,
    class_label: ClassLabel = "digit",
    attributes: Sequence[str] | None = None,
    classes: Sequence[int | str] | None = None,
) -> int:
    """Number of classes of a set that has `own` by itself, without reading it."""
    if classes is not None:
        return len(classes)
    if attributes is not None:
        return 2 ** len(attributes)
    return {"digit": own, "color": len(COLOR_NAMES), "both": own * len(COLOR_NAMES)}[class_label]


def _guess(given: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
