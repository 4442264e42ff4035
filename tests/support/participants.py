"""A participant of a deployed federation: its files, and its command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from fedpdm.cli import main
from fedpdm.config import config_from_mapping
from fedpdm.deployment.certificates import make_authority, make_node, make_server
from fedpdm.deployment.invitation import make_invitation
from fedpdm.deployment.node import NodeSettings
from tests.support.deployments import deployed_config, draw_pictures

NAMES = [
    "certificate", "policy", "invitation", "versions", "clock", "classes", "data", "store", "disk",
    "memory", "coordinator", "bounds", "statement",
]  # fmt: skip


def make_federation(root: Path) -> Path:
    """Certificates, pictures and invitation under `root`, which is returned."""
    make_authority(root / "ca")
    make_server(root / "ca", root / "server", names=["127.0.0.1"])
    make_node(root / "ca", root / "node", client_id=1)
    draw_pictures(root / "public", seed=1, count=2, test=2)
    draw_pictures(root / "hospital" / "images", seed=101)
    (root / "node" / "invitation.json").write_text(make_invitation(quiet(root)))
    return root


def quiet(root: Path, **sections: Any) -> Any:
    """The config of two clients whose metrics on raw images stay where they are."""
    plain = json.loads(json.dumps(deployed_config(root / "public").__dict__, default=vars))
    plain["evaluation"]["image_metrics"] = False
    for name, values in sections.items():
        plain[name] |= values
    return config_from_mapping(plain)


class Participant:
    """A participant with its own copy of everything, and its command line."""

    def __init__(self, made: Path, root: Path, port: int, capsys: Any) -> None:
        shutil.copytree(made / "node", root / "node")
        shutil.copytree(made / "hospital", root / "hospital")
        self.made, self.root, self.capsys = made, root, capsys
        self.certificate = root / "node" / "node-1.crt"
        self.invitation = root / "node" / "invitation.json"
        self.data, self.store = root / "hospital" / "images", root / "store"
        self.policy = root / "hospital" / "policy.yaml"
        self.address = f"127.0.0.1:{port}"

    def call(self, action: str, *more: str) -> tuple[int, str, str]:
        """Exit code, standard output and standard error."""
        self.capsys.readouterr()
        code = main(
            [
                "node", action, "--coordinator", self.address,
                "--certificate", str(self.certificate), "--data", str(self.data),
                "--store", str(self.store), *more,
            ]
        )  # fmt: skip
        printed = self.capsys.readouterr()
        return code, printed.out, printed.err

    def failed(self, *more: str) -> dict[str, str]:
        """The checks that failed, with their lines."""
        code, out, _ = self.call("check", "--json", "--timeout", "2", *more)
        report = json.loads(out)
        assert [check["name"] for check in report["checks"]] == NAMES
        found = {check["name"]: check["detail"] for check in report["checks"] if not check["ok"]}
        assert code == (2 if found else 0)
        assert report["ok"] == (not found)
        assert not any("\n" in line for line in found.values())
        return found

    def rewrite(self, **changes: Any) -> None:
        """Change the invitation."""
        content = json.loads(self.invitation.read_text())
        for name, values in changes.items():
            content[name] = {**content[name], **values} if isinstance(values, dict) else values
        self.invitation.write_text(json.dumps(content))

    def settings(self) -> NodeSettings:
        return NodeSettings.of(self.address, self.certificate, self.data, store=self.store)
