"""A key is a client: in a deployed run, whoever claims first."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedpdm.config import ConfigError
from fedpdm.deployment.registered import FILE, registered_clients
from fedpdm.setup.flower_config import FEDERATION_VARIABLE
from tests.support.deployments import deployment

pytestmark = pytest.mark.slow

ALONE = {"on_failure": "raise", "min_clients": 1}


@pytest.mark.parametrize("liar", [0, 1])
def test_a_false_claim_leaves_the_honest_client_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], liar: int
) -> None:
    """Both nodes say that they are the honest one's client. The run goes on with that one."""
    honest = 1 - liar
    (tmp_path / "federation.json").write_text(json.dumps({"nodes": {"1": "node-0", "2": "node-1"}}))
    federation = deployment(
        tmp_path,
        options={liar: {"partition-id": honest}},
        aggregation=ALONE,
        run={"rounds": 2},
    )
    monkeypatch.setenv(FEDERATION_VARIABLE, str(tmp_path))
    federation.run()
    asked = {sent.client for sent in federation.of("train") + federation.of("evaluate")}
    assert asked == {honest}
    history = json.loads((tmp_path / "server" / "metrics.json").read_text())
    assert [record["failed"] for record in history["rounds"]] == [[], []]
    line = f"node {liar + 1} is client {liar} by its key and says that it is {honest}"
    assert capsys.readouterr().out.count(line) == 1
    assert f"{line}; it is left out" in (tmp_path / "server" / "log.txt").read_text()


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"nodes": 3}'], ids=["cut", "list", "empty", "number"]
)
def test_a_damaged_list_of_keys_is_not_an_empty_one(tmp_path: Path, text: str) -> None:
    """Else a damaged file would let every key be every client."""
    (tmp_path / FILE).write_text(text)
    with pytest.raises(ConfigError, match=rf"{FILE}: cannot be read") as caught:
        registered_clients({FEDERATION_VARIABLE: str(tmp_path)})
    assert "\n" not in str(caught.value)
    assert registered_clients({}) == {}
