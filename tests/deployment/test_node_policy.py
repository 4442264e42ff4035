"""A node's own bounds: whatever a server asks for, beyond them nothing is released."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.stats import norm

from clients.local import open_local_client
from fedpdm import wire
from fedpdm.config import ConfigError, RunConfig, config_from_mapping
from fedpdm.deployment.acceptance import accept, acceptance_of, config_digest
from fedpdm.deployment.code_digest import PACKAGES, code_digest, code_root
from fedpdm.deployment.policy import NodePolicy, PolicyError, check_config, load_policy
from fedpdm.engines.deployed.guard import BundleRefused, InstalledCode, write_commands
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.setup.flower_config import run_config_of
from fedpdm.storage.files import StoreError
from tests.support.deployments import Federation, deployment, policy_text
from tests.support.refusals import tree

FIRST = {"round": 1, "phase": "release", "final": True}
KINDS = ("get_properties", "train", "evaluate")


def spent(config: RunConfig, t0: int, *, delta: float, times: int = 1) -> float:
    """Epsilon of `times` releases at t0, by the formula of Balle and Wang (2018) and scipy."""
    abar = float(np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))[t0 - 1])  # linear betas
    sigma = math.sqrt((1 - abar) / abar)
    mu = math.sqrt(times) * 2 * config.privacy.clip_norm / sigma

    def excess(epsilon: float) -> float:
        a, b = mu / 2 - epsilon / mu, -mu / 2 - epsilon / mu
        return float(norm.cdf(a) - math.exp(epsilon + norm.logcdf(b)) - delta)

    return float(brentq(excess, 0.0, 500.0, xtol=1e-12))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the two clients and the server have their pictures."""
    root = tmp_path_factory.mktemp("pictures")
    deployment(root)
    return root


class Place:
    """Federations on the same pictures whose first client has its store under `root`."""

    def __init__(self, pictures: Path, root: Path) -> None:
        self.pictures, self.root = pictures, root
        self.policy, self.store = root / "policy.yaml", root / "vault"

    def federation(self, options: dict[str, Any] | None = None, **sections: Any) -> Federation:
        """With node config `options` for client 0; image metrics are off unless asked for."""
        own = {"store-dir": str(self.store), **(options or {})}
        evaluation = {"image_metrics": False, **sections.pop("evaluation", {})}
        made = deployment(self.pictures, options={0: own}, **sections)
        config = json.loads(made.run_config["resolved-config"])
        config["evaluation"] |= evaluation
        changed = {"resolved-config": json.dumps(config), "run-dir": str(self.root / "run")}
        return Federation(made.nodes, {**made.run_config, **changed})

    def with_policy(
        self, text: str, options: dict[str, Any] | None = None, **sections: Any
    ) -> Federation:
        """A federation whose first client has this policy; bounds that it does not say are none."""
        self.policy.write_text(policy_text(text))
        return self.federation({"policy-file": str(self.policy), **(options or {})}, **sections)

    def release_files(self) -> dict[str, bytes]:
        return {name: data for name, data in tree(self.store).items() if "releases/" in name}


@pytest.fixture
def place(pictures: Path, tmp_path: Path) -> Place:
    return Place(pictures, tmp_path)


def refusal(federation: Federation, kind: str = "train") -> str:
    """The line with which client 0 refuses a message; it holds nothing else."""
    sent = federation.ask(0, kind, FIRST)
    assert len(sent.data) < 700
    if sent.reply.has_error():
        line = sent.reply.error.reason
    else:
        line = sent.metrics["error"]
        assert set(sent.metrics) == {"client_id", "error"}
        assert sent.payload == []
    assert "\n" not in line
    return str(line)


def releases(federation: Federation) -> bool:
    """Whether client 0 answers a request for its release with one."""
    sent = federation.ask(0, "train", FIRST)
    if sent.reply.has_error() or not sent.payload:
        return False
    return len(wire.decode_release(sent.payload, who="it", client_id=0)) > 0


# --- Refused, for every kind of message -------------------------------------------------------

T0: dict[str, Any] = {"epsilon": None, "t0": 600}
ASKING = [
    ("max_epsilon: 5", {}, "privacy.epsilon: an image would spend 9.9"),
    ("min_t0: 700", {}, "privacy.t0: 642 is less than the 700 of this node"),
    ("min_t0: 601", {"privacy": T0}, "privacy.t0: 600 is less than the 601 of this node"),
    # A delta of 0.4 makes the same words "epsilon 10" mean next to nothing.
    ("max_epsilon: 11", {"privacy": {"delta": 0.4}}, "privacy.epsilon: an image would spend"),
    # Small betas make t0 = 1000 mean next to no noise.
    (
        "{max_epsilon: 11, min_t0: 900}",
        {
            "privacy": {"epsilon": None, "t0": 999},
            "schedule": {"beta_start": 1e-5, "beta_end": 2e-5},
        },
        "privacy.epsilon: an image would spend",
    ),
    (
        "max_epsilon: 11",
        {"evaluation": {"image_metrics": True}},
        "evaluation.image_metrics: true asks for metrics on raw images",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("text", "sections", "reason"), ASKING)
def test_a_config_that_asks_for_more_is_refused(
    place: Place, text: str, sections: dict[str, Any], reason: str
) -> None:
    federation = place.with_policy(text, **sections)
    for kind in KINDS:
        assert reason in refusal(federation, kind)
    assert not place.store.exists()
    assert releases(place.federation(**sections))  # without a policy


@pytest.mark.parametrize("name", ["max_epsilon", "min_t0"])
def test_a_bound_may_be_reached_and_not_passed(place: Place, name: str) -> None:
    """The bound's own value, by another computation of epsilon, is the last that passes."""
    config = run_config_of(place.federation(privacy=T0).run_config)
    epsilon = spent(config, 600, delta=1e-5)
    inside = {"max_epsilon": epsilon * (1 + 1e-6), "min_t0": 600}[name]
    outside = {"max_epsilon": epsilon * (1 - 1e-6), "min_t0": 601}[name]
    check_config(NodePolicy(**{name: inside}), config)
    with pytest.raises(PolicyError):
        check_config(NodePolicy(**{name: outside}), config)


def test_epsilon_is_counted_at_the_nodes_own_delta(place: Place) -> None:
    asked = place.federation(privacy={"epsilon": None, "t0": 600, "delta": 0.01})
    config = run_config_of(asked.run_config)
    at_theirs, at_ours = spent(config, 600, delta=0.01), spent(config, 600, delta=1e-6)
    assert at_theirs < 0.8 * at_ours
    between = (at_theirs + at_ours) / 2
    with pytest.raises(PolicyError, match=f"{at_ours:.4g} in all at delta 1e-06"):
        check_config(NodePolicy(max_epsilon=between, delta=1e-6), config)
    check_config(NodePolicy(max_epsilon=between, delta=0.01), config)


BROKEN = [
    None,
    "max_epsilon: [",
    "{max_epsilonn: 3, max_epsilon: 3, min_t0: none}",
    "{max_epsilon: 3, min_t0: none, code: [abc]}",
    # Cut short, or a slip: each would bound less than its owner meant.
    "",
    "# a policy\n",
    "null",
    "[]",
    "max_epsilon:",
    "max_epsilon: null\nmin_t0: 600\n",
    "max_epsilon: ~\nmin_t0: 600\n",
    "max_epsilon: 5\ndelta: 1e-5\n",
    "max_epsilon: 5\ndelta: 1e-5\nmin_t0:",
    "min_t0: 600\n",
    "max_epsilon: unbounded\nmin_t0: 600\n",
    "max_epsilon: 5\nmin_t0: 600\nmax_epsilon: 500\n",
]


@pytest.mark.slow
@pytest.mark.parametrize("text", BROKEN)
def test_a_policy_that_cannot_be_read_refuses_everything(
    place: Place, text: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    federation = place.with_policy("{}")
    place.policy.write_text(text or "")
    if text is None:
        place.policy.unlink()
    for kind in KINDS:
        told = "failed; client 0 shows the details to its owner alone"
        assert told in refusal(federation, kind)
        assert str(place.policy) in capsys.readouterr().err
    assert not place.store.exists()


def test_no_bound_is_a_word_and_no_silence(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("max_epsilon: none\nmin_t0: none\n")
    assert load_policy(path) == NodePolicy()
    for text, line in (
        ("min_t0: none\n", "max_epsilon: is missing; give a bound, or none for no bound"),
        ("max_epsilon: 10\nmin_t0:\n", "min_t0: is empty; give a bound, or none for no bound"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            load_policy(path)
        assert str(caught.value) == f"{path}: {line}"


# --- All releases of an image together --------------------------------------------------------


@pytest.mark.slow
def test_epsilon_in_all_is_bounded_over_releases(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two releases at t0 = 600 are refused where one is allowed, though each alone is fine."""
    text, may = "{max_epsilon: %r, allow_new_release: true}", {"allow-new-release": True}
    config = run_config_of(place.federation(privacy=T0).run_config)
    one, two = (spent(config, 600, delta=1e-5, times=times) for times in (1, 2))
    assert releases(place.with_policy(text % ((one + two) / 2), may, privacy=T0))
    before = place.release_files()
    # Around another background, the same images would be released once more.
    moved = {**T0, "shift": 0.25}
    again = place.with_policy(text % ((one + two) / 2), may, privacy=moved)
    capsys.readouterr()
    second = {"round": 2, "phase": "release", "final": True}
    line = again.ask(0, "train", second).metrics["error"]
    assert "with earlier releases an image would spend more than this node allows" in line
    assert f"{two:.4g} in all" in capsys.readouterr().err  # for the owner
    assert f"{two:.3g}" not in line  # and not for the server
    assert place.release_files() == before
    # A bound just below two releases refuses, one just above lets it happen.
    closer = place.with_policy(text % (two * (1 - 1e-6)), may, privacy=moved)
    assert closer.ask(0, "train", second).metrics["error"] == line
    wider = place.with_policy(text % (two * (1 + 1e-6)), may, privacy=moved)
    assert wider.ask(0, "train", second).payload
    assert ReleaseStore(place.store).spent(delta=1e-5).largest == pytest.approx(two, rel=1e-6)
    # Now even what is stored is beyond the first bound: nothing is computed on it any more.
    narrow = place.with_policy(text % ((one + two) / 2), may, privacy=moved)
    assert narrow.ask(0, "train", {**second, "round": 3}).metrics["error"] == line
    evaluated = narrow.ask(0, "evaluate", {"round": 3, "final": False})
    assert evaluated.metrics["error"] == line


def test_a_policy_counts_for_the_next_message(place: Place) -> None:
    federation = place.with_policy("max_epsilon: 11")
    assert releases(federation)
    place.policy.write_text(policy_text("max_epsilon: 9"))
    assert "privacy.epsilon" in refusal(federation)  # not even the stored reply of that round


def test_the_policy_is_above_the_node_config(place: Place) -> None:
    own = {"raw-metrics": True, "allow-new-release": True}
    federation = place.with_policy("{max_epsilon: 11}", own)
    local = open_local_client(dict(federation.nodes[0]), federation.run_config, 0)
    assert (local.raw_metrics, local.allow_new_release) == (False, False)
    sent = federation.ask(0, "train", {"round": 1, "phase": "coarse"})
    assert sent.payload
    assert not set(sent.metrics) & set(wire.RAW_METRICS)


def test_raw_metrics_where_both_allow_them(place: Place) -> None:
    federation = place.with_policy(
        "allow_raw_metrics: true", {"raw-metrics": True}, evaluation={"image_metrics": True}
    )
    assert "fine_loss" in federation.ask(0, "train", {"round": 1, "phase": "coarse"}).metrics


def test_a_simulation_is_refused_by_every_policy() -> None:
    with pytest.raises(PolicyError, match=r"^run\.simulation: true seeds the privacy noise"):
        check_config(NodePolicy(), config_from_mapping({"name": "seeded"}))


def test_a_mechanism_that_is_not_there_is_named(tmp_path: Path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(policy_text("mechanisms: [images, sums]"))
    with pytest.raises(ConfigError, match=r"policy\.yaml: mechanisms: .*'sums'") as caught:
        load_policy(path)
    assert "\n" not in str(caught.value)


def test_code_that_a_coordinator_names_is_not_imported(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither without a policy nor with one that does not name it."""
    monkeypatch.setattr("tests.support.deployments.initial_message", lambda _: [])
    (place.root / "theirs.py").write_text("raise SystemExit('their code ran')\n")
    monkeypatch.syspath_prepend(str(place.root))
    for federation in (
        place.federation(privacy={"release": "theirs:Own"}),
        place.with_policy("max_epsilon: 10", privacy={"release": "theirs:Own"}),
    ):
        line = refusal(federation)
        assert "privacy.release: 'theirs:Own' is not one of the mechanisms" in line
    named = place.federation(data={"name": "theirs:images"})
    assert "data.name: theirs:images is code of a module" in refusal(named)
    assert "theirs" not in sys.modules
    assert not place.store.exists()


# --- Acceptance --------------------------------------------------------------------------------


def accepted(place: Place, config: RunConfig) -> ReleaseStore:
    store = ReleaseStore(place.store)
    statement = {"epsilon": 9.9, "delta": 1e-5, "images": 40}
    own = {"client_id": 0, "by": "A. Larsson", "code": "0" * 64, "images_sha256": "1" * 64}
    accept(store, config, statement, **own)  # type: ignore[arg-type]
    return store


def test_nothing_is_done_without_acceptance(place: Place) -> None:
    federation = place.federation({"require-acceptance": True})
    for kind in KINDS:
        assert "has not accepted the privacy statement" in refusal(federation, kind)
    assert not place.store.exists()
    store = accepted(place, run_config_of(federation.run_config))
    assert releases(federation)
    assert [r.kind for r in store.ledger().records] == ["opened", "accepted", "release"]


def changed(config: RunConfig, **sections: Mapping[str, Any]) -> RunConfig:
    mapping = json.loads(json.dumps(dataclasses.asdict(config)))
    for name, values in sections.items():
        mapping[name] = {**mapping[name], **values} if isinstance(values, dict) else values
    return config_from_mapping(mapping)


CHANGES: list[tuple[str, Any]] = [
    ("privacy", {"clip_norm": 8.5}),
    ("privacy", {"epsilon": 9.0}),
    ("run", {"rounds": 3}),
    ("coarse", {"training": "server"}),
    ("aggregation", {"encoding": "int8"}),
    ("schedule", {"kind": "cosine"}),
]


@pytest.mark.parametrize(("section", "values"), CHANGES)
def test_acceptance_is_of_exactly_this_config(
    place: Place, section: str, values: dict[str, Any]
) -> None:
    federation = place.federation({"require-acceptance": True})
    accepted(place, changed(run_config_of(federation.run_config), **{section: values}))
    assert "has not accepted" in refusal(federation)
    assert place.release_files() == {}


def test_the_coordinators_own_places_do_not_matter(place: Place) -> None:
    config = run_config_of(place.federation().run_config)
    elsewhere = changed(config, data={"root": "/somewhere/else"})
    assert config_digest(elsewhere) == config_digest(config)
    assert config_digest(dataclasses.replace(config, name="other")) == config_digest(config)
    assert len({config_digest(changed(config, **{s: v})) for s, v in CHANGES}) == len(CHANGES)


def test_acceptance_in_another_clients_store_or_forged(place: Place) -> None:
    config = run_config_of(place.federation().run_config)
    store = accepted(place, config)
    with pytest.raises(StoreError, match="is the store of client 0, not of client 1"):
        store.note("accepted", {}, client_id=1)
    assert acceptance_of(store.ledger(), config) is not None
    path = store.root / "ledger.jsonl"
    path.write_text(path.read_text().replace("A. Larsson", "B. Larsson"))
    with pytest.raises(StoreError, match="checksum is wrong"):
        store.ledger()


# --- Code --------------------------------------------------------------------------------------


def app(root: Path, body: str = "x = 1\n") -> Path:
    """Three small packages, of which `clients.part` has this body."""
    for package in PACKAGES:
        (root / package).mkdir(parents=True)
        (root / package / "__init__.py").write_text("")
    (root / "clients" / "part.py").write_text(body)
    return root


def test_the_digest_is_of_names_and_contents(tmp_path: Path) -> None:
    first = code_digest(app(tmp_path / "a"))
    assert code_digest(app(tmp_path / "b")) == first
    assert code_digest(app(tmp_path / "c", "x = 2\n")) != first
    same = tmp_path / "b"
    (same / "clients" / "__pycache__").mkdir()
    (same / "clients" / "__pycache__" / "part.cpython-311.pyc").write_bytes(b"0")
    (same / "clients" / "test_part.py").write_text("left out of bundles")
    assert code_digest(same) == first
    (same / "clients" / "part.py").rename(same / "clients" / "port.py")
    assert code_digest(same) != first
    (tmp_path / "c" / "strategies" / "__init__.py").unlink()
    with pytest.raises(ValueError, match="no Python file of strategies"):
        code_digest(tmp_path / "c")
    assert len(code_digest()) == 64
    assert (code_root() / "clients" / "client_app.py").exists()


@pytest.mark.slow
def test_running_code_that_the_node_does_not_allow(place: Place) -> None:
    named = place.with_policy(f"code: ['{'0' * 64}']")
    for federation in (place.federation({"installed-code": "0" * 64}), named):
        for kind in KINDS:
            assert "code: its digest is not one that this node" in refusal(federation, kind)
    assert not place.store.exists()
    assert releases(place.with_policy(f"code: ['{code_digest()}']"))


def test_the_installed_code_runs_whatever_is_shipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    installed, bundles = app(tmp_path / "installed"), tmp_path / "home" / "apps"
    shipped = app(bundles / "it.fedpdm.1")
    monkeypatch.syspath_prepend(str(shipped))
    spec = InstalledCode(bundles, root=installed).find_spec("clients", None)
    assert spec is not None
    assert spec.origin == str(installed / "clients" / "__init__.py")
    (shipped / "clients" / "part.py").write_text("x = 3\n")
    with pytest.raises(BundleRefused, match="this node's policy does not name it") as caught:
        InstalledCode(bundles, root=installed).find_spec("clients", None)
    assert code_digest(shipped) in str(caught.value)
    assert "\n" not in str(caught.value)
    named = InstalledCode(bundles, root=installed, allowed=[code_digest(shipped)])
    spec = named.find_spec("clients", None)
    assert spec is not None
    assert spec.origin == str(installed / "clients" / "__init__.py")


def test_nothing_else_in_a_bundle_can_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundles = tmp_path / "apps"
    shipped = app(bundles / "it")
    (shipped / "evil.py").write_text("")
    (shipped / "numpy.py").write_text("")  # in front of the installed one
    (shipped / "spread").mkdir()  # a namespace package
    monkeypatch.syspath_prepend(str(shipped))
    guard = InstalledCode(bundles)
    for name in ("evil", "numpy", "spread"):
        with pytest.raises(BundleRefused, match=f"{name} is in the shipped bundle"):
            guard.find_spec(name, None)
    for name in ("json", "scipy", "nothing_of_this_name"):
        assert guard.find_spec(name, None) is None
    monkeypatch.undo()
    with pytest.raises(BundleRefused, match="no bundle of a coordinator"):
        guard.find_spec("clients", None)


@pytest.mark.parametrize("body", ["x = 1\n", "open('ran', 'w')\n"])
def test_shipped_code_does_not_run(tmp_path: Path, body: str) -> None:
    """In an interpreter of its own, by a real import, as Flower does it."""
    app(tmp_path / "apps" / "it", body)
    app(tmp_path / "installed")
    script = (
        "import sys; from pathlib import Path\n"
        "from fedpdm.engines.deployed.guard import InstalledCode\n"
        "here = Path(sys.argv[1])\n"
        "sys.meta_path.insert(0, InstalledCode(here / 'apps', root=here / 'installed'))\n"
        "sys.path.insert(0, str(here / 'apps' / 'it'))\n"
        "import clients.part; print(clients.part.__file__)\n"
    )
    answer = subprocess.run(
        [sys.executable, "-P", "-c", script, str(tmp_path)],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
    )
    assert not (tmp_path / "ran").exists()
    if body == "x = 1\n":
        assert answer.stdout.strip() == str(tmp_path / "installed" / "clients" / "part.py")
    else:
        assert "BundleRefused: code: the shipped bundle's digest is" in answer.stderr


def test_other_kinds_of_app_are_refused(tmp_path: Path) -> None:
    write_commands(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"flwr-clientapp", "flwr-agentapp"}
    answer = subprocess.run(
        [str(tmp_path / "flwr-agentapp"), "--token", "x"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 1
    assert answer.stderr == "fedpdm node: flwr-agentapp is refused: a node runs client apps only\n"


# --- The file ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("max_epsilon: 0", "max_epsilon: must be greater than 0"),
        ("max_epsilon: .inf", "max_epsilon: must be finite"),
        ("delta: 1", "delta: must be less than 1"),
        ("min_t0: 0", "min_t0: must be at least 1"),
        ("allow_raw_metrics: 1", "allow_raw_metrics: must be bool"),
        ("max_epsilonn: 1", "max_epsilonn: unknown key; did you mean max_epsilon?"),
        ("{max_epsilon: 3, min_t0: none, code: [ABC]}", r"code\[0\]: must be a SHA-256"),
        ("- 1", "must hold a mapping"),
    ],
)
def test_policies_that_are_wrong(tmp_path: Path, text: str, reason: str) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=reason) as caught:
        load_policy(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_policy_of_bounds_allows_no_raw_metrics_and_no_new_release(tmp_path: Path) -> None:
    (tmp_path / "policy.yaml").write_text(policy_text("{}"))
    policy = load_policy(tmp_path / "policy.yaml")
    assert policy == NodePolicy()
    assert (policy.allow_raw_metrics, policy.allow_new_release) == (False, False)


def test_code_that_a_config_names_is_the_operators_to_allow() -> None:
    """Clients import data sets and models: of modules that the policy names, and no others."""
    base = {"run": {"simulation": False}, "evaluation": {"image_metrics": False}}
    named = {"data": {"name": "theirs.sets:scans"}, "fine": {"preset": "theirs.nets:slim"}}
    config = config_from_mapping({**base, **named})
    with pytest.raises(PolicyError, match=r"^data\.name: theirs\.sets:scans is code of a module"):
        check_config(NodePolicy(), config)
    with pytest.raises(PolicyError, match=r"^fine\.preset: theirs\.nets:slim is code of a module"):
        check_config(NodePolicy(modules=("theirs.sets", "their")), config)
    for modules in (("theirs",), ("theirs.nets", "theirs.sets")):
        check_config(NodePolicy(modules=modules), config)
    strategy = config_from_mapping({**base, "aggregation": {"method": "nowhere_at_all:Mine"}})
    check_config(NodePolicy(), strategy)  # the server's alone


def test_a_client_does_not_import_the_servers_strategy(place: Place) -> None:
    federation = place.federation(aggregation={"method": "nowhere_at_all:Mine"})
    assert "error" not in str(federation.ask(0, "get_properties"))
