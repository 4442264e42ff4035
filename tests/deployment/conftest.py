"""A participant's machine for tests of node check and node start."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.participants import Participant, make_federation
from tests.support.tls_servers import server


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates, pictures and invitation that no test changes."""
    return make_federation(tmp_path_factory.mktemp("made"))


@pytest.fixture(scope="module")
def port(made: Path) -> Iterator[int]:
    """Of a TLS server that answers as the coordinator's."""
    with server(made / "server") as number:
        yield number


@pytest.fixture
def node(made: Path, tmp_path: Path, port: int, capsys: pytest.CaptureFixture[str]) -> Participant:
    """With a store of its own, which has accepted nothing."""
    return Participant(made, tmp_path, port, capsys)
