"""What samples are drawn from: a client's pipeline, whether it was exported or is still at home."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fedpdm.publishing.pipeline import PFDMPipeline
from fedpdm.text import json_text, line

__all__ = ["NO_LABEL", "Source"]

NO_LABEL = -1
BATCH_SIZE = 256  # candidates that are drawn together
NAMES_SHOWN = 20
# What of a pipeline's config decides how it samples.
SAMPLES_BY = (
    "t0", "chain", "coarse_prediction", "fine_prediction", "num_classes", "resolution",
    "coarse_patch", "fine_patch", "shift", "guidance_scale", "fine_t_max", "coarse_share",
    "fine_labels", "candidates", "own_classes",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A pipeline to draw from; `what` names it, `statement` is its run's, empty where none is
    beside it."""

    pipeline: PFDMPipeline
    what: str
    statement: Mapping[str, Any] = field(default_factory=dict)

    def digest(self) -> str:
        """SHA-256 of the models' weights and of how they sample together."""
        settings = {name: self.pipeline.config[name] for name in SAMPLES_BY}
        if (levels := self.pipeline.config["coarse_levels"]) is not None:  # exports before had none
            settings |= {"coarse_levels": levels}
        settings |= {"scheduler": type(self.pipeline.scheduler).__name__}
        found = hashlib.sha256(json_text(settings, indent=None).encode())
        found.update(self.pipeline.betas.tobytes())
        for name in ("coarse_unet", "gaussians", "fine_unet"):
            module = getattr(self.pipeline, name, None)
            for key, tensor in {} if module is None else sorted(module.state_dict().items()):
                found.update(f"{name} {key} {tuple(tensor.shape)}".encode())
                found.update(tensor.cpu().contiguous().numpy().tobytes())
        return found.hexdigest()

    @property
    def num_classes(self) -> int:
        count: int = self.pipeline.config["num_classes"]
        return count

    def class_name(self, label: int) -> str:
        """As the export names it, else the number."""
        names = self.pipeline.config["id2label"] or {}
        return "no label" if label == NO_LABEL else str(names.get(str(label), label))

    def labels(self, asked: Sequence[int | str] | None) -> list[int]:
        """Labels of classes that are asked for by number or by name; all where nothing is.

        A whole number is a label, whatever classes are called. `ValueError`, one line with the
        names that there are, for what is no class here.
        """
        if asked is None:
            return list(range(self.num_classes))
        names = [self.class_name(label) for label in range(self.num_classes)]
        folded = [name.casefold() for name in names]
        found: list[int] = []
        for each in asked:
            name = str(each).strip().casefold()
            try:
                label = int(each)
            except ValueError:
                label = folded.index(name) if folded.count(name) == 1 else self.num_classes
            if not NO_LABEL <= label < self.num_classes:
                near = difflib.get_close_matches(name, folded, n=1)
                hint = f"; did you mean {line(names[folded.index(near[0])])}?" if near else ""
                raise ValueError(
                    f"label must be in [{NO_LABEL}, {self.num_classes - 1}] or the name of a class "
                    f"of {self.what}{self._known(names)}, got {line(each)}{hint}"
                )
            found.append(label)
        if not found:
            raise ValueError("label: give at least one, got none")
        return found

    def _known(self, names: Sequence[str]) -> str:
        """Names by label, in brackets; empty where they are the numbers."""
        if all(name == str(label) for label, name in enumerate(names)):
            return ""
        more = ", ..." if len(names) > NAMES_SHOWN else ""
        shown = (f"{k} {line(name)}" for k, name in enumerate(names[:NAMES_SHOWN]))
        return f" ({', '.join(shown)}{more})"

    def batch_size(self, most: int = BATCH_SIZE) -> int:
        """Images that are drawn together: at most `most` with all of their candidates."""
        return max(1, most // int(self.pipeline.config["candidates"]))

    def draw(
        self,
        labels: Sequence[int],
        *,
        generator: torch.Generator,
        title: str,
        num_steps: int,
        guidance: float | None,
        method: str,
    ) -> np.ndarray:
        """Images uint8 (N, C, H, W) for N labels; progress is shown under `title`.

        `ValueError` for an argument that is out of range.
        """
        self.pipeline.set_progress_bar_config(desc=title, leave=False, disable=None)
        drawn: Any = self.pipeline(
            list(labels),
            generator=generator,
            num_inference_steps=num_steps,
            guidance_scale=guidance,
            method=method,
            output_type="pt",
        ).images
        pixels: np.ndarray = (drawn * 255.0).round().to(torch.uint8).numpy()
        return pixels
