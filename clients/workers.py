"""Trainers that a process keeps between messages, and files that it writes beside training.

A client object lives for one message, but building a U-Net and its optimiser takes as long as a
gradient step of a small one. Trainers of small models are therefore kept for the next message, of
any client; a borrower sets all of a trainer's state. Their files are written while training goes
on. Large models are built anew and written at once: a step dwarfs that, and memory is what counts.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, Self

import torch

from clients.local import LocalClient
from fedpdm.config import RunKind
from fedpdm.diffusion.denoisers import Denoiser
from fedpdm.diffusion.training import Trainer
from fedpdm.privacy.dpsgd import PrivateTrainer
from fedpdm.setup.build import build_denoiser, build_dp_sgd, build_optimizer_settings

__all__ = ["KEPT_BYTES", "WriteBehind", "borrowed"]

KEPT_BYTES = 64 << 20  # of weights, EMA and moments together

_shelf: dict[Any, Trainer[Denoiser]] = {}
_lock = threading.Lock()


@contextlib.contextmanager
def borrowed(
    local: LocalClient, role: str, *, device: torch.device, fresh: bool
) -> Iterator[Trainer[Denoiser]]:
    """A trainer of the client's coarse or fine model, for this block only.

    `fresh`: with the weights that a new model has, drawn from the run's seed, and no moments.
    Otherwise its state is left from other work: `load_state` or `restart` must set it.
    """
    config = local.config
    private = role == "coarse" and config.kind is RunKind.DP_SGD
    noise = (config.privacy, len(local.held.train)) if private else None
    key = (role, config.coarse if role == "coarse" else config.fine, config.run, local.setup.spec,
           config.schedule, str(device), noise)  # fmt: skip
    with _lock:
        trainer = _shelf.pop(key, None)
    if trainer is None or fresh:
        model = build_denoiser(local.setup, role, client=local.client_id)
        settings = build_optimizer_settings(config, role)
        if private:
            trainer = PrivateTrainer(
                model,
                settings,
                build_dp_sgd(config, num_images=len(local.held.train)),
                device=device,
            )
        else:
            trainer = Trainer(model, settings, device=device)
    yield trainer
    if 4 * sum(p.numel() * p.element_size() for p in trainer.weights().values()) <= KEPT_BYTES:
        with _lock:
            if len(_shelf) >= 4:
                _shelf.clear()  # of runs that are over
            _shelf[key] = trainer


class WriteBehind:
    """Runs small writes in another thread; on leaving the block all are done, or their error is
    raised."""

    def __init__(self) -> None:
        self._pending: list[Future[None]] = []

    def __enter__(self) -> Self:
        return self

    def __call__(self, write: Callable[[], None], *, num_bytes: int) -> None:
        """Do `write()`: at once if it is large, else beside what comes next."""
        if num_bytes > KEPT_BYTES:
            write()
        else:
            self._pending.append(_writer.submit(write))

    def wait(self) -> None:
        """All writes are done when this returns; raises what the first failed one raised."""
        errors = [future.exception() for future in self._pending]
        self._pending.clear()
        for error in errors:
            if error is not None:
                raise error

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.wait()
        else:
            with contextlib.suppress(Exception):  # the first error is the one to tell
                self.wait()


_writer = ThreadPoolExecutor(max_workers=1, thread_name_prefix="fedpdm-writer")
