"""How many clients share a GPU in simulation, and where Ray's files lie."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch

from fedpdm.config import ConfigError
from fedpdm.engines.flower import _gpu_share, _short_directory
from tests.support.federations import small_config


@pytest.mark.parametrize(
    ("gpus", "actors", "clients", "share"),
    [
        (1, 128, 100, 0.125),
        (4, 128, 100, 0.125),
        (1, 4, 100, 0.25),
        (2, 16, 1, 1.0),
        (0, 8, 8, 0.0),
    ],
)
def test_a_bounded_number_side_by_side(
    gpus: int, actors: int, clients: int, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    config = small_config(partition={"num_clients": clients})
    assert _gpu_share(config, actors) == share
    on_cpu = small_config(run={"device": "cpu"}, partition={"num_clients": clients})
    assert _gpu_share(on_cpu, actors) == 0.0


# Ray: DIR/ray/session_2026-11-30_17-45-33_123456_4194304/sockets/plasma_store
SOCKETS = "/ray/session_2026-11-30_17-45-33_123456_4194304/sockets/plasma_store"


def test_sockets_fit_wherever_temporary_files_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given in ("/tmp", str(tmp_path / ("t" * 82)), "/tmp/" + "é" * 12):
        monkeypatch.setattr(tempfile, "gettempdir", lambda given=given: given)
        with _short_directory() as folder:
            assert Path(folder).is_dir()
            assert Path(folder).stat().st_mode & 0o077 == 0
            assert len(os.fsencode(folder + SOCKETS)) <= 107  # of AF_UNIX, unix(7)
        assert not Path(folder).exists()


def test_where_no_place_is_short_enough_it_says_what_to_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nowhere(prefix: str, dir: str) -> str:
        raise PermissionError(13, "Permission denied", dir)

    monkeypatch.setattr(tempfile, "gettempdir", lambda: "/scratch/" + "t" * 80)
    monkeypatch.setattr(tempfile, "mkdtemp", nowhere)
    words = r"^TMPDIR: must be at most 20 bytes long"
    with pytest.raises(ConfigError, match=words), _short_directory():
        pass
