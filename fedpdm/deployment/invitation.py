"""What a coordinator hands to its participants: the config, and the software that it runs with.

One JSON file, `federation.json`. Its config is resolved: every key is written out, so that a node
accepts exactly what the coordinator will send.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedpdm.config import (
    ConfigError,
    RunConfig,
    config_from_mapping,
    config_to_json,
    load_config,
)
from fedpdm.config.strict import StrictError, parse_json, read_text
from fedpdm.data.spec import build_image_spec, known_class_names
from fedpdm.deployment.code_digest import code_digest
from fedpdm.text import json_text

__all__ = [
    "VALUES",
    "Invitation",
    "Software",
    "installed_software",
    "make_invitation",
    "read_invitation",
]

FORMAT = "fedpdm invitation 1"
VALUES = (0, 255)  # of pixels as they are read: what models see as -1 and as 1


@dataclass(frozen=True, kw_only=True)
class Software:
    """Versions, and the digest of the app's code (`fedpdm.deployment.code_digest`)."""

    fedpdm: str
    flwr: str
    torch: str
    python: str
    code: str


@dataclass(frozen=True, kw_only=True)
class Invitation:
    """`software`, `images` and `made_at` (aware) are None where the file is a plain experiment.

    `images` says channels, resolution, num_classes, shift, class_names (None if the coordinator
    does not know them) and values; earlier versions did not say the last two."""

    config: RunConfig
    software: Software | None = None
    images: dict[str, Any] | None = None
    made_at: datetime.datetime | None = None


def installed_software() -> Software:
    """What is installed here."""
    version = importlib.metadata.version
    return Software(
        fedpdm=version("fedpdm"),
        flwr=version("flwr"),
        torch=version("torch"),
        python=platform.python_version(),
        code=code_digest(),
    )


def make_invitation(config: RunConfig) -> str:
    """The content of `federation.json` for a config with `run.simulation: false`.

    The images' shape is the one that the coordinator will build its model for; where the config
    does not state it, the coordinator's own public images are loaded.
    """
    if config.run.simulation:
        raise ConfigError("run.simulation: must be false in a deployed federation, got true")
    now = datetime.datetime.now(datetime.UTC)
    return (
        json_text(
            {
                "format": FORMAT,
                "made_at": now.isoformat(timespec="seconds"),
                "software": dataclasses.asdict(installed_software()),
                "images": _describe_images(config),
                "config": json.loads(config_to_json(config)),
            }
        )
        + "\n"
    )


def _describe_images(config: RunConfig) -> dict[str, Any]:
    names = known_class_names(config)
    return {
        **dataclasses.asdict(build_image_spec(config)),
        "class_names": None if names is None else list(names),
        "values": list(VALUES),
    }


def read_invitation(path: Path) -> Invitation:
    """An invitation, or the config of an experiment's YAML file; `ConfigError` names the file."""
    try:
        text = read_text(path)
    except StrictError as error:
        raise ConfigError(f"{path}: {error}") from None
    if not text.lstrip().startswith("{"):
        return Invitation(config=load_config(path))
    try:
        mapping = parse_json(text)
        stated = mapping["format"]
    except StrictError as error:
        raise ConfigError(f"{path}: {error}") from None
    except KeyError:
        return Invitation(config=load_config(path))
    if stated != FORMAT:
        raise ConfigError(f"{path}: format: must be {FORMAT!r}, got {stated!r}")
    try:
        made_at = datetime.datetime.fromisoformat(mapping["made_at"])
        return Invitation(
            config=config_from_mapping(mapping["config"]),
            software=Software(**{name: str(v) for name, v in mapping["software"].items()}),
            images=dict(mapping["images"]),
            made_at=made_at if made_at.tzinfo else made_at.replace(tzinfo=datetime.UTC),
        )
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ConfigError(f"{path}: is no complete invitation: {error!r}") from None
