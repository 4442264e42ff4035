"""Which of a node's own classes each class of a federation is.

Class k of a federation is the k-th of its names. At a node they may be called otherwise: its
operator says how, and that is kept with the acceptance. In a federation that names no classes each
node numbers them in the order of its own names; then nothing is compared.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedpdm.config import ConfigError, RunConfig, config_digest
from fedpdm.data import ImageSet
from fedpdm.data.loading import load_split
from fedpdm.deployment.acceptance import ACCEPTED
from fedpdm.deployment.invitation import Invitation
from fedpdm.privacy.ledger import Ledger, Record
from fedpdm.privacy.mechanism import IMAGES

__all__ = [
    "ClassMap",
    "Pairs",
    "accepted_classes",
    "agree",
    "check_kept_labels",
    "federation_classes",
    "load_classes",
    "own_class_names",
    "parse_classes",
    "settle_classes",
]

LONGEST_NAME = 200
#: The federation's name and the node's own, of each class; "" where one of them has no such class.
Pairs = tuple[tuple[str, str], ...]


@dataclass(frozen=True, kw_only=True)
class ClassMap:
    """`names` are the federation's classes in their order, `own` what each is called at the node,
    "" where it has none; images of the own classes in `left_out` are not used."""

    names: tuple[str, ...]
    own: tuple[str, ...]
    left_out: tuple[str, ...] = ()

    @classmethod
    def of(cls, pairs: Pairs) -> ClassMap:
        """What `pairs` gives, back again."""
        named = [pair for pair in pairs if pair[0]]
        return cls(
            names=tuple(name for name, _ in named),
            own=tuple(own for _, own in named),
            left_out=tuple(own for name, own in pairs if not name),
        )

    @property
    def pairs(self) -> Pairs:
        """All of it, as an acceptance keeps it."""
        named = zip(self.names, self.own, strict=True)
        return (*named, *(("", own) for own in self.left_out))

    @property
    def labels(self) -> dict[str, int]:
        """Own class -> its number in the federation."""
        return {own: k for k, own in enumerate(self.own) if own}

    def describe(self) -> str:
        """`benign, malignant = boesartig`, and what is missing or left out."""
        words = ", ".join(
            name if name == own else f"{name} = {own or 'none here'}"
            for name, own in zip(self.names, self.own, strict=True)
        )
        left = f"; NOT used: {', '.join(self.left_out)}" if self.left_out else ""
        return f"{words}{left}"


def parse_classes(texts: Sequence[str]) -> Pairs:
    """`benign=gutartig,malignant=boesartig` of `--classes`; `benign=` says that the node has none,
    `=unclear` that images of its own class are left out. `ConfigError` for anything else."""
    pairs = []
    for part in (part.strip() for text in texts for part in text.split(",")):
        name, sign, own = (word.strip() for word in part.partition("="))
        if not sign or not (name or own):
            raise ConfigError(f"--classes: must be NAME=OWN, NAME= or =OWN, got {part!r}")
        pairs.append((name, own))
    return tuple(pairs)


def federation_classes(invitation: Invitation) -> tuple[str, ...] | None:
    """The federation's class names in their order; None where neither invitation nor config names
    any. `ConfigError` for such as are no distinct names, or not those of the config."""
    wanted = invitation.config.data.classes or ()
    named = tuple(each for each in wanted if isinstance(each, str))
    of_config = named if named and len(named) == len(wanted) else None
    stated = (invitation.images or {}).get("class_names")
    if stated is None:
        stated = None if of_config is None else list(of_config)
    if stated is None:
        return None
    if not isinstance(stated, list) or not all(map(_is_name, stated)):
        raise ConfigError(
            f"invitation: images.class_names must be printable names of 1 to {LONGEST_NAME} "
            f"characters, got {stated!r}"
        )
    names = tuple(stated)
    if not names or len(set(names)) < len(names):
        raise ConfigError(f"invitation: images.class_names must be distinct, got {_shown(names)}")
    if of_config not in (None, names):
        raise ConfigError(
            f"invitation: images.class_names are {_shown(names)}, data.classes in its config "
            f"{_shown(of_config or ())}"
        )
    return names


def _is_name(value: object) -> bool:
    """Whether it may stand in the statement that an operator accepts: no forged line there."""
    return isinstance(value, str) and 1 <= len(value) <= LONGEST_NAME and value.isprintable()


def own_class_names(config: RunConfig, root: Path) -> tuple[str, ...]:
    """All classes of the images at `root`, also those that the config does not keep.

    `ValueError` or `OSError` if they cannot be read."""
    data = dataclasses.replace(config.data, classes=None, max_images=1)
    return load_split(dataclasses.replace(config, data=data), "train", root=root).class_names


def agree(
    names: Sequence[str], here: Sequence[str], given: Pairs = (), *, selects: bool = False
) -> ClassMap:
    """Which own class each of the federation's is: one of the same name, or what is `given`.

    Args:
        names: the federation's classes.
        here: the node's own.
        given: what its operator said (`parse_classes`).
        selects: whether the config leaves other classes out by itself (`data.classes`).

    Raises:
        ConfigError: for a class of the federation that is not here, an own one that is none of the
            federation's, and what is given twice or names no class.
    """
    said: dict[str, str] = {}
    left_out = []
    for name, own in given:
        if name and name not in names:
            raise ConfigError(
                f"classes: {name!r} is no class of the federation ({_shown(names)})"
                f"{_guess(name, names)}"
            )
        if own and own not in here:
            raise ConfigError(
                f"classes: {own!r} is no class here ({_shown(here)}){_guess(own, here)}"
            )
        if name in said:
            raise ConfigError(f"classes: {name!r} is given twice")
        if name:
            said[name] = own
        else:
            left_out.append(own)
    if missing := [name for name in names if name not in said and name not in here]:
        words = ",".join(f"{name}=OWN" for name in missing)
        raise ConfigError(
            f"classes: of the federation's ({_shown(names)}), {_shown(missing)} cannot be found "
            f"here ({_shown(here)}); say which is which with --classes {words}, or {missing[0]}= "
            "where there is none"
        )
    own_names = tuple(said.get(name, name) for name in names)
    taken = [*filter(None, own_names), *left_out]
    if twice := sorted({own for own in taken if taken.count(own) > 1}):
        raise ConfigError(f"classes: {_shown(twice)} here would be two classes of the federation")
    rest = [own for own in here if own not in taken]
    if rest and not selects:
        words = ",".join(f"={own}" for own in rest)
        raise ConfigError(
            f"classes: {_shown(rest)} here is none of the federation's ({_shown(names)}); say "
            f"which it is with --classes NAME=OWN, or leave its images out with --classes {words}"
        )
    return ClassMap(names=tuple(names), own=own_names, left_out=(*left_out, *rest))


def load_classes(
    config: RunConfig,
    split: str,
    *,
    root: Path,
    classes: ClassMap | None,
    whole: bool = False,
) -> ImageSet:
    """A node's images with the federation's labels and names; as the config reads them where no
    classes were compared (None). `whole` as of `load_split`."""
    if classes is None:
        return load_split(config, split, root=root, whole=whole)
    data = dataclasses.replace(config.data, classes=tuple(classes.labels))
    images = load_split(dataclasses.replace(config, data=data), split, root=root, whole=whole)
    numbers = np.array([*classes.labels.values()], dtype=np.int64)
    return dataclasses.replace(images, labels=numbers[images.labels], class_names=classes.names)


def accepted_classes(record: Record | None) -> ClassMap | None:
    """The classes that an acceptance holds; None of one that was made before they were compared."""
    pairs = None if record is None else record.fields.get("classes")
    return None if pairs is None else ClassMap.of(tuple((str(a), str(b)) for a, b in pairs))


def settle_classes(invitation: Invitation, record: Record, *, given: Pairs, root: Path) -> None:
    """`ConfigError` unless the accepted classes are those of the invitation and those `given`.

    An acceptance from before classes were compared holds if the node's own names give the labels
    that the federation's names ask for.
    """
    names, accepted = federation_classes(invitation), accepted_classes(record)
    again = "read and accept it with fedpdm node check --accept"
    if accepted is not None:
        if names not in (None, accepted.names):
            raise ConfigError(
                f"classes: {_shown(accepted.names)} were accepted, the invitation says "
                f"{_shown(names or ())}; {again}"
            )
        if not set(given) <= set(accepted.pairs):
            raise ConfigError(f"--classes: accepted was {accepted.describe()}; {again}")
        return
    if given:
        raise ConfigError(f"--classes: none were accepted; {again}")
    if names is not None:
        config = invitation.config
        here = own_class_names(config, root)
        found = agree(names, here, selects=config.data.classes is not None)
        if found.own != _uncompared(config, here):
            raise ConfigError(
                f"classes: accepted before they were compared, in the order "
                f"{_shown(_uncompared(config, here))}, the invitation says {_shown(names)}; {again}"
            )


def check_kept_labels(
    store: Path, ledger: Ledger, config: RunConfig, found: ClassMap, here: Sequence[str]
) -> None:
    """`ConfigError` if what the store keeps was made with other numbers of the same classes: rounds
    and models of this config, or sums that were released."""
    sums = any(record.parameters.mechanism != IMAGES for record in ledger.releases())
    for record in ledger.records:
        digest = str(record.fields.get("config"))
        same = digest == config_digest(config)
        worked = record.kind == ACCEPTED and (store / "runs" / digest[:16]).exists()
        if not worked or not (same or sums):
            continue
        old = accepted_classes(record)
        order = _uncompared(config, here) if same else tuple(here)
        before = old.labels if old else {own: k for k, own in enumerate(order)}
        for own in before.keys() & found.labels.keys():
            if before[own] != found.labels[own]:
                raise ConfigError(
                    f"classes: {own!r} was class {before[own]} when this store took part "
                    f"({record.at}), would be {found.labels[own]}: its models and sums cannot be "
                    "numbered anew; a run of another config, and of class statistics another "
                    "store and other images, are needed"
                )


def _uncompared(config: RunConfig, here: Sequence[str]) -> tuple[str, ...]:
    """The node's own classes by number where no names are compared."""
    wanted = config.data.classes
    if wanted is None:
        return tuple(here)
    return tuple(here[k] if isinstance(k, int) else k for k in wanted)


def _shown(names: Sequence[str]) -> str:
    return ", ".join(names)


def _guess(given: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(given, known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
