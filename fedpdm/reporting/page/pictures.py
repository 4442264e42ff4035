"""Pictures of a run as data URIs: kept samples of clients, and the way from noise to image."""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fedpdm.diffusion.denoisers import Denoiser
from fedpdm.evaluation.synthesis import open_synthesizer
from fedpdm.evaluation.trajectory import State, record_states
from fedpdm.reporting.page.reading import RunFacts
from fedpdm.reporting.pictures.tiles import png_bytes, tile_images
from fedpdm.reporting.run_files import ROW_NAMES
from fedpdm.setup.pair import ModelPair, node_pair, shared_pair, shared_weights
from fedpdm.storage.client_store import ClientStore
from fedpdm.storage.files import StoreError
from fedpdm.storage.node_run import NodeRun

__all__ = ["ClientSamples", "Film", "Frame", "Picture", "data_uri", "draw_film", "draw_samples",
           "embed_file"]  # fmt: skip

CLIENTS_SHOWN = 4
ROWS_SHOWN = 3
FILM_IMAGES = 8
FILM_FRAMES = 24
_PNG = b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One `<img>`: its source, its text, its size in pixels."""

    source: str
    alt: str
    width: int
    height: int


@dataclass(frozen=True, kw_only=True)
class ClientSamples:
    """A client's kept samples: (method in words, picture)."""

    client: int
    pictures: Sequence[tuple[str, Picture]]


@dataclass(frozen=True, kw_only=True)
class Frame:
    """A state on the way, and the image that is expected there (not at the end)."""

    stage: str
    t: int
    words: str
    state: Picture
    estimate: Picture | None


@dataclass(frozen=True, kw_only=True)
class Film:
    """From noise to image. `handover` is the index of the first frame of the fine model, or -1;
    `level` says at which noise level that is."""

    what: str
    labels: Sequence[str]
    frames: Sequence[Frame]
    handover: int
    level: str


def data_uri(pixels: np.ndarray) -> str:
    """uint8 RGB (H, W, 3) as a PNG in a data URI."""
    return f"data:image/png;base64,{base64.b64encode(png_bytes(pixels)).decode()}"


def _picture(images: np.ndarray, *, columns: int, alt: str) -> Picture:
    pixels = tile_images(images, columns=columns)
    return Picture(source=data_uri(pixels), alt=alt, width=pixels.shape[1], height=pixels.shape[0])


def embed_file(path: Path, *, alt: str) -> Picture | None:
    """A PNG file as a picture; None if there is none, or it is no PNG."""
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if not data.startswith(_PNG) or len(data) < 24:
        return None
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    source = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return Picture(source=source, alt=alt, width=width, height=height)


def draw_samples(facts: RunFacts) -> tuple[list[ClientSamples], int]:
    """Kept samples of the first clients, a column per class, and how many clients are left out."""
    names = facts.class_names()
    found: list[ClientSamples] = []
    left_out = 0
    for client in facts.run.clients():
        kept = ClientStore(facts.run.client_path(client)).load_samples()
        if kept is None:
            continue
        if len(found) == CLIENTS_SHOWN:
            left_out += 1
            continue
        labels = np.asarray(kept["labels"])
        places, classes = _columns(labels)
        words = ", ".join(_class_name(names, k) for k in classes)
        pictures = []
        for method, title in ROW_NAMES.items():
            if method in kept:
                alt = f"Client {client}, {title}: samples, a column for each of {words}"
                picture = _picture(kept[method][places], columns=len(classes), alt=alt)
                pictures.append((title, picture))
        found.append(ClientSamples(client=client, pictures=pictures))
    return found, left_out


def _columns(labels: np.ndarray) -> tuple[np.ndarray, list[int]]:
    """Positions of samples, row by row with a column per class, and the classes."""
    classes = [int(k) for k in np.unique(labels)]
    places = [np.flatnonzero(labels == k) for k in classes]
    rows = min(ROWS_SHOWN, *(len(own) for own in places))
    return np.concatenate([[own[row] for own in places] for row in range(rows)]), classes


def _class_name(names: Sequence[str], label: int) -> str:
    return names[label] if 0 <= label < len(names) else str(label)


def draw_film(facts: RunFacts, *, client: int, seed: int, say: Callable[[str], None]) -> Film | str:
    """Sample a few images with all states through the run's own models; words if that cannot be.

    In a deployment the server has the shared model alone, and that is what samples there; a node
    has its own model too.
    """
    config = facts.config
    try:
        pair: ModelPair[Denoiser]
        if isinstance(facts.run, NodeRun):
            client = facts.run.client_id
            pair, what = node_pair(facts.run), f"client {client}"
        elif config.run.simulation:
            pair, what = open_synthesizer(facts.run, client), f"client {client}"
        else:
            pair = shared_pair(config, shared_weights(facts.run))
            what = "the shared model alone"
        labels = _film_labels(pair.spec.num_classes)
        say(f"{facts.name}: sampling {len(labels)} images of {what} with every state ...")
        states = record_states(pair, labels, seed=seed, client=client)
    except (ValueError, OSError, StoreError) as error:
        line = " ".join(str(error).split())
        return line.replace(str(facts.run.root), facts.folder)
    names = facts.class_names()
    words = [_class_name(names, int(k)) for k in labels]
    chosen = _chosen_frames(states)
    frames = [_frame(states[index], index, len(states), words) for index in chosen]
    stages = [frame.stage for frame in frames]
    later = {"fine", "both", "image"} if "both" not in stages else {"fine", "image"}
    first = next((k for k, stage in enumerate(stages) if stage in later), -1)
    has_both = pair.coarse is not None and pair.fine is not None and first > 0
    return Film(
        what=what,
        labels=words,
        frames=frames,
        handover=first if has_both else -1,
        level=f"{'t' if config.has_statistics else 't0'} = {pair.settings.t0}",
    )


def _film_labels(num_classes: int) -> np.ndarray:
    """Classes spread evenly over all, `FILM_IMAGES` in number, repeated where there are fewer."""
    if num_classes >= FILM_IMAGES:
        return np.linspace(0, num_classes - 1, FILM_IMAGES).round().astype(np.int64)
    return np.arange(FILM_IMAGES, dtype=np.int64) % num_classes


def _chosen_frames(states: Sequence[State]) -> list[int]:
    """At most about `FILM_FRAMES` indices: even steps, and both sides of each hand-over."""
    last = len(states) - 1
    even = np.linspace(0, last, min(FILM_FRAMES, len(states))).round().astype(int)
    changes = [k for k in range(1, len(states)) if states[k].stage != states[k - 1].stage]
    return sorted({*map(int, even), *changes, *(k - 1 for k in changes)})


STAGES: Mapping[str, str] = {
    "coarse": "the coarse model works",
    "fine": "the fine model works",
    "both": "coarse and fine model work together",
    "image": "finished",
}


def _frame(state: State, index: int, count: int, labels: Sequence[str]) -> Frame:
    words = f"step {index} of {count - 1}, t = {state.t}: {STAGES[state.stage]}"
    of = f"{len(labels)} images of {', '.join(labels)}"
    what = "Finished" if state.stage == "image" else "Noisy"
    return Frame(
        stage=state.stage,
        t=state.t,
        words=words,
        state=_picture(state.noisy, columns=len(labels), alt=f"{what}: {of}, {words}"),
        estimate=None
        if state.estimate is None
        else _picture(state.estimate, columns=len(labels), alt=f"Expected: {of}, {words}"),
    )
