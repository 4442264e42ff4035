"""The README.md of an export: a model card for the Hugging Face Hub, with the privacy statement.

Its front matter says what the Hub needs to know (library, task, tags); its numbers come from the
client's own ledger and from the run's statement (`fedpdm.privacy.statement`), never from the
config. Names and words of files are shown as they are, whatever Markdown they hold. It does not
say how many images the client holds, but whether the export does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedpdm.publishing.class_gaussians import GaussianClasses
from fedpdm.publishing.pipeline import PFDMPipeline
from fedpdm.text import markdown

__all__ = ["model_card"]

CARD = """\
---
library_name: diffusers
pipeline_tag: unconditional-image-generation
inference: false
tags:
- arxiv:2504.00952
- class-conditional
- differential-privacy
- diffusers:PFDMPipeline
- federated-learning
- image-to-image
---

# {name}: personalised diffusion model of client {client_id}

{parts}

## Use

In this directory, with diffusers and torch. `pipeline.py` and `pfdm_sampling.py` will be executed:
read them first.

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained(
    ".", custom_pipeline="./pipeline.py", trust_remote_code=True
)
images = pipe([0, 0, {last_label}], num_inference_steps=25).images
images[0].save("image.png")
```

From the Hub, give the repository's name in both places. Labels: {labels}; -1 for no label.
`method="coarse"` samples with the shared model only{alone}.

Any diffusers scheduler that is defined on betas can take the place of the exported one, and given
images are refined: noised to `strength` (default t0 / T = {strength:g}{most}) and taken down from
there.

```python
from diffusers import UniPCMultistepScheduler

pipe.scheduler = UniPCMultistepScheduler.from_config(pipe.scheduler.config)
coarse = pipe([0, {last_label}], method="coarse").images
refined = pipe([0, {last_label}], image=coarse, strength={strength:g}).images
```

## Privacy

{guarantee}

By the ledger of client {client_id}, all its releases together (head `{ledger_head}`):

| images of one person | {group_sizes} |
|---|{rule}
| epsilon at delta {ledger_delta:g} | {group_epsilons} |

The noise of the release was {noise_source}.{simulation}

**`fine_unet` is not covered.** It was trained on client {client_id}'s raw images, with no noise.
Publishing it, or images sampled with it, exposes that client's own images: that is for the client
alone to decide. {shared} may be shared without it.{counts} Not covered either:

{uncovered}

## Publishing

This directory is laid out as a model repository (safetensors only). It names no licence: add
`license` to the front matter first.

```
hf upload NAME/REPOSITORY .
```
"""

NETWORKS = """\
Two U-Nets for {resolution}x{resolution} images of {num_classes} classes, from personalised
federated diffusion (arXiv 2504.00952). `coarse_unet` is shared by all clients and takes pure noise
down to noising step t0; `fine_unet` is client {client_id}'s and goes on to a clean image."""

NETWORKS_GUARANTEE = """\
What clients sent in training, and so `coarse_unet`, is locally differentially private per image
(one image replaced by any other, {releases}):

| epsilon | delta | t0 | clip norm C |
|---|---|---|---|
| {epsilon:.4g} | {delta:g} | {t0} of {num_steps} | {clip_norm:g} around {shift:g} |"""

# With class statistics as the release.
GAUSSIANS = """\
A U-Net for {resolution}x{resolution} images of {num_classes} classes and {many} for each class,
from personalised federated diffusion (arXiv 2504.00952) with class statistics. `gaussians` is
shared by all clients: it is computed from noised sums over their images. An image begins with a
draw of its class's {one}, noised to t0 = {t0} of {num_steps}. `fine_unet`, client {client_id}'s,
takes it from there to a clean image, {told} the class.{best} t0, the labels and the number of
candidates are the run's settings or what the client chose on its own held-out images."""

BEST = " Of {drawn} candidates the one is kept whose class the Gaussians find most likely."
ALONE = (
    " Classes {own}, of which the client has many images, are drawn by `fine_unet` alone; so this "
    "list says of which classes it has many."
)

GAUSSIANS_GUARANTEE = """\
What clients sent in training, and so `gaussians`, is locally differentially private per image (one
image replaced by any other of its class; each image is in {count} sums at most, and the epsilon is
that of all of them):

| epsilon | delta | clip norm C |
|---|---|---|
| {epsilon:.4g} | {delta:g} | {clip_norm:g} around {shift:g} |

{released} `gaussians` also holds how many images of each class all clients have together: these
numbers are public in this kind of release."""

# With a network above the hand-over, beside the Gaussians.
ABOVE = """\
Two U-Nets for {resolution}x{resolution} images of {num_classes} classes, and {many} for each class,
from federated training with a private network above the hand-over. `coarse_unet` and `gaussians`
are shared by all clients. `gaussians` is computed from noised sums over their images. `coarse_unet`
began with draws of these Gaussians and went on with {network_rounds} rounds of noised sums of
gradients. An image begins with a draw of its class's {one}, noised to t = {coarse_levels[1]} of
{num_steps}, which `coarse_unet` takes down to t0 = {t0}. `fine_unet`, client {client_id}'s, goes on
to a clean image, {told} the class.{best} Without `fine_unet`, `coarse_unet` goes on to
t = {coarse_levels[0]}, and `gaussians` answers below it."""

ABOVE_GUARANTEE = """\
What clients sent in training, and so `gaussians` and `coarse_unet`, is locally differentially
private per image (one image replaced by any other of its class). The epsilon is that of all rounds
together, and every image has it, whether it was drawn for a round of gradients or not:

| epsilon | delta | clip norm C of images | of gradients | their noise, times that norm |
|---|---|---|---|---|
| {epsilon:.4g} | {delta:g} | {clip_norm:g} around {shift:g} | {gradient_clip_norm:g} | \
{gradient_noise_multiplier:.4g} |

{released} `gaussians` also holds how many images of each class all clients have together: these
numbers are public in this kind of release."""

SIMULATION = (
    "\nThis is a **simulation**: whoever knows the seed can remove the noise, and nothing here"
    "\nprotects anybody."
)


# What `coarse_share` says of the client's images, with exact and with noised counts.
EXACT = """

**This export holds how many images of each class client {client_id} has**: `coarse_share` in
`model_index.json` follows from these numbers, and they from it, exactly. `fedpdm export
--counts-epsilon` adds noise to them first.
"""
NOISED = """

`coarse_share` in `model_index.json` follows from how many images of each class client {client_id}
has, with discrete Laplace noise: epsilon {counts_epsilon:g} per image for all classes together (one
image replaced by any other), in addition to the above.
"""


def model_card(
    pipeline: PFDMPipeline,
    *,
    name: str,
    run: Mapping[str, Any],
    client: Mapping[str, Any],
    counts_epsilon: float | None = None,
) -> str:
    """The text of the card.

    Args:
        pipeline: what is exported.
        name: the run's.
        run: its privacy statement (`run_statement`).
        client: that of the client, from its ledger (`client_statement`).
        counts_epsilon: of the noise on the counts that `coarse_share` follows from; None for none.
    """
    settings, num_steps = pipeline.config, len(pipeline.betas)
    drawn, alone = settings["candidates"], settings["own_classes"] or ()
    if pipeline.gaussians is None:
        parts, guarantee, shared = NETWORKS, NETWORKS_GUARANTEE, "`coarse_unet`"
    elif pipeline.coarse_unet is None:
        parts, guarantee, shared = GAUSSIANS, GAUSSIANS_GUARANTEE, "`gaussians`"
    else:
        parts, guarantee, shared = ABOVE, ABOVE_GUARANTEE, "`coarse_unet` and `gaussians`"
    names, last = settings["id2label"] or {}, settings["num_classes"] - 1
    has_alone = settings["fine_t_max"] == num_steps
    groups = client["group_epsilon"]
    count = run["releases_per_image"]
    counts = "" if settings["coarse_share"] is None else EXACT if counts_epsilon is None else NOISED
    several = pipeline.gaussians is not None and _has_mixtures(pipeline.gaussians)
    own = {"client_id": client["client_id"], "counts_epsilon": counts_epsilon}
    words = {
        "name": markdown(name),
        "shared": shared,
        "most": "" if pipeline.coarse_unet is not None else ", which is also the most",
        "many": "a mixture of Gaussians" if several else "a Gaussian",
        "one": "mixture" if several else "Gaussian",
        "told": "told" if settings["fine_labels"] else "without being told",
        "best": (BEST.format(drawn=drawn) if drawn > 1 else "")
        + (ALONE.format(own=", ".join(map(str, alone))) if alone else ""),
        "count": count,
        "released": markdown(run.get("released", ""), limit=4000),
        "noise_source": markdown(run["noise_source"]),
        **own,
        "counts": f"{counts.format_map(own)}\n" if counts else "",
        "num_steps": num_steps,
        "strength": settings["t0"] / num_steps,
        "last_label": last,
        "labels": ", ".join(f"{k} {markdown(v)}" for k, v in names.items() if k != v)
        or f"0 to {last}",
        "alone": ', `method="alone"` with the fine model only' if has_alone else "",
        "releases": "one release per image" if count == 1 else f"up to {count} releases per image",
        "ledger_head": markdown(client["ledger_head"]),
        "ledger_delta": client["delta"],
        "group_sizes": " | ".join(map(markdown, groups)),
        "rule": "---|" * len(groups),
        "group_epsilons": " | ".join(f"{value:.4g}" for value in groups.values()),
        "simulation": SIMULATION if run["simulation"] else "",
        "uncovered": "\n".join(f"- {markdown(what)}" for what in run["does_not_protect"]),
    }
    known = {**settings, **run, **words}
    known |= {"parts": parts.format_map(known), "guarantee": guarantee.format_map(known)}
    return CARD.format_map(known)


def _has_mixtures(gaussians: GaussianClasses) -> bool:
    """Whether a class has several Gaussians."""
    classes = gaussians.config["classes"]
    return len(set(classes)) < len(classes)
