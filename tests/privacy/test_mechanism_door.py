"""Custom release mechanisms: through one door, and held to what holds for the first."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

from fedpdm import wire
from fedpdm.attacks.likelihood import clipped_means
from fedpdm.config import ConfigError, config_from_json, config_from_mapping, config_to_json
from fedpdm.data.spec import build_image_spec
from fedpdm.deployment.acceptance import config_digest
from fedpdm.deployment.policy import NodePolicy, PolicyError, check_config, load_policy
from fedpdm.privacy.accountant import compose, delta_spent, epsilon_spent, repeated, worst
from fedpdm.privacy.ledger import append, read_ledger
from fedpdm.privacy.mechanism import (
    ImageMechanism,
    SeededNoise,
    door,
    mechanism_named,
    mechanism_of,
    register,
)
from fedpdm.privacy.planning import build_release_plan, build_release_request
from fedpdm.privacy.releases import ReleaseRequest, ReleaseStore
from fedpdm.privacy.statement import client_statement, plain_text, run_statement
from fedpdm.privacy.types import GaussianEvent, ReleasedDataset, ReleaseParameters
from fedpdm.setup.run_setup import build_schedule, set_up
from fedpdm.storage.files import StoreError, read_tensors
from tests.support.federations import small_config
from tests.support.own_mechanisms import (
    ClassSums,
    Half,
    HalfParameters,
    LaplaceEvent,
    Odd,
    OddParameters,
    ReleasedSums,
    sum_rounds,
)
from tests.support.release_toys import DELTA, epsilon_of, image_set, request, settings

BEFORE = Path(__file__).parent / "store-of-before"  # made before there was a door
PLANTED = "tests.support.own_mechanisms"


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """What is registered in a test is forgotten after it."""
    known = dict(door._registered)
    monkeypatch.setattr(door, "_registered", known)
    return known


@pytest.fixture
def store(tmp_path: Path) -> ReleaseStore:
    return ReleaseStore(tmp_path / "client")


def config_with(release: str, **privacy: Any) -> Any:
    return small_config(
        privacy={"epsilon": None, "t0": 675, "clip_norm": 3.0, "release": release, **privacy}
    )


def halves(**changes: Any) -> ReleaseRequest:
    asked = request(**changes)
    parameters = HalfParameters(**vars(asked.parameters))
    return dataclasses.replace(asked, parameters=parameters)


def sums(round: int = 0, **changes: Any) -> ReleaseRequest:
    rounds = sum_rounds()
    means = torch.zeros(3, 16)
    return dataclasses.replace(
        request(**changes), parameters=rounds[round], planned=rounds, public={"means": means}
    )


def files(root: Path) -> dict[str, bytes]:
    return {p.relative_to(root).as_posix(): p.read_bytes() for p in root.rglob("*") if p.is_file()}


# --- What was made before there was a door -----------------------------------------------------


def test_a_store_of_before_opens_and_releases_nothing_again(tmp_path: Path) -> None:
    shutil.copytree(BEFORE, tmp_path / "client")
    store = ReleaseStore(tmp_path / "client")
    released = store.obtain(image_set(12), request())
    assert isinstance(released, ReleasedDataset)
    assert len(released) == 12
    kept = files(tmp_path / "client")
    kept.pop(".release-lock")
    assert kept == files(BEFORE)


def test_releases_of_images_are_the_same_values_as_before(store: ReleaseStore) -> None:
    """Files say more now: what came in, and what was done to it; a record has a mark."""
    store.obtain(image_set(8), request())
    store.obtain(image_set(12), request())
    for name in ("releases/000001.safetensors", "releases/000002.safetensors"):
        (tensors, said), (before, had) = (read_tensors(r / name) for r in (store.root, BEFORE))
        assert torch.equal(tensors.pop("identities"), tensors["digests"])  # nothing was done
        assert tensors.keys() == before.keys()
        assert all(torch.equal(tensors[key], before[key]) for key in before)
        assert said == had | {"preparation": "{}"}
    pattern = r'"(at|mark|sha256)": "[^"]*",?|"?chain"?:? "?[0-9a-f]{64}|"preparation": {},? |\s'
    texts = [(root / "ledger.jsonl").read_text() for root in (store.root, BEFORE)]
    assert re.sub(pattern, "", texts[0]) == re.sub(pattern, "", texts[1])
    assert "mechanism" not in texts[0]


@pytest.mark.parametrize(
    ("encoding", "digest"),
    [
        ("float32", "6eda7e61edaa262e1b436674104ee61419c2f99a8d5068b94ca1e0c6459a4a06"),
        ("bfloat16", "e0d9ed3756549256cd7bd16b279a0273d9a856c55eeaab4cdda524af29d0d297"),
        ("int8", "f0ad342d165a9a3bc766ecd79a5ee8b04119cbaf3613cd0450272c65c5e4808d"),
    ],
)
def test_messages_of_images_are_the_same_bytes_as_before(
    store: ReleaseStore, encoding: str, digest: str
) -> None:
    shutil.copytree(BEFORE, store.root)
    released = store.obtain(image_set(12), request())
    message = wire.encode_release(released, client_id=3, encoding=encoding)
    assert wire.fingerprint(message) == digest
    assert isinstance(wire.decode_release(message, who="client 3"), ReleasedDataset)


def test_configs_of_before_are_the_same_to_digests() -> None:
    """So an acceptance and a result of the time before the key are found."""
    mapping = {
        "name": "x", "run": {"simulation": False}, "evaluation": {"image_metrics": False}
    }  # fmt: skip
    config = config_from_mapping(mapping)
    before = "985514a90b8d6a84ee5e3c4c3013ff5d2e4a1033070aa1003860159d5a47ee1a"
    assert config_digest(config) == before
    assert (
        config_digest(config_from_mapping({**mapping, "privacy": {"release": "images"}})) == before
    )
    other = config_from_mapping({**mapping, "privacy": {"release": "half"}})
    assert config_digest(other) != before
    assert config_from_json(config_to_json(other)) == other


# --- Which mechanisms there are ----------------------------------------------------------------


def test_a_registered_name_is_found_and_no_other() -> None:
    assert type(mechanism_named("images")) is ImageMechanism
    with pytest.raises(ConfigError) as error:
        mechanism_named("image")
    assert str(error.value) == (
        "privacy.release: must be one of images, network, statistics or package.module:NAME, "
        "got 'image'; did you mean images?"
    )
    register(Half)
    assert type(mechanism_named("half")) is Half
    assert type(mechanism_of(HalfParameters(**vars(settings())))) is Half


def test_a_class_in_a_module_of_ones_own_is_registered_by_its_name() -> None:
    assert type(mechanism_named(f"{PLANTED}:Half")) is Half
    assert type(mechanism_named("half")) is Half


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("no_such_module_here:Half", "'no_such_module_here:Half' cannot be imported"),
        (f"{PLANTED}:Third", f"module {PLANTED} has no Third"),
        (f"{PLANTED}:HalfParameters", "must be a class of release mechanisms, got <class"),
        (f"{PLANTED}:sum_rounds", "must be a class of release mechanisms, got <function"),
        ("fedpdm.privacy.mechanism:ReleaseMechanism", "parameters.mechanism must be a name"),
    ],
)
def test_a_name_of_something_else_is_refused(value: str, words: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(words)) as error:
        mechanism_named(value)
    assert str(error.value).startswith("privacy.release: ")
    assert "\n" not in str(error.value)


@dataclass(frozen=True, kw_only=True)
class Listed(ReleaseParameters):
    mechanism: ClassVar[str] = "listed"
    blocks: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Clash(ReleaseParameters):
    mechanism: ClassVar[str] = "clash"
    seeded: int = 0


@dataclass(frozen=True, kw_only=True)
class Shouted(ReleaseParameters):
    mechanism: ClassVar[str] = "Loud: yes"


@pytest.mark.parametrize(
    ("parameters", "words"),
    [
        (ReleaseParameters, "mechanism 'images' is that of fedpdm.privacy.mechanism.images."),
        (Listed, "parameter blocks must be an int, float or str"),
        (Clash, "parameter seeded must be an int, float or str, and not be named client_id, "),
        (Shouted, "parameters.mechanism must be a name of small letters, digits and _"),
    ],
)
def test_what_cannot_be_recorded_is_not_registered(
    parameters: type[ReleaseParameters], words: str
) -> None:
    own = type("Own", (ImageMechanism,), {"parameters": parameters})
    with pytest.raises(ValueError, match=re.escape(words)):
        register(own)


def test_a_mechanism_that_lacks_methods_is_refused_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "half_made.py").write_text(
        "from fedpdm.privacy.mechanism import ReleaseMechanism\n"
        f"from {PLANTED} import SumParameters\n"
        "class Sums(ReleaseMechanism):\n    parameters = SumParameters\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="abstract") as error:
        mechanism_named("half_made:Sums")
    assert "\n" not in str(error.value)


def test_an_installed_package_declares_its_mechanisms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "halves-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: halves\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        f"[fedpdm.mechanisms]\nhalf = {PLANTED}:Half\nbroken = no_such_module_here:Half\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert type(mechanism_named("half")) is Half
    with pytest.raises(ConfigError, match=r"^entry point broken of fedpdm\.mechanisms: .*imported"):
        mechanism_named("broken")


# --- What it costs -----------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Subsampled(GaussianEvent):
    """A subclass may mean something else."""


@pytest.mark.parametrize(
    "event", [LaplaceEvent(noise_multiplier=1.0), Subsampled(noise_multiplier=1.0)]
)
def test_the_accountant_refuses_what_it_cannot_read(event: Any) -> None:
    known = GaussianEvent(noise_multiplier=2.0)
    line = f"^the accountant cannot read events of type {type(event).__name__}$"
    for account in (
        lambda: compose([known, event]),
        lambda: epsilon_spent([event], delta=DELTA),
        lambda: delta_spent([known, event], epsilon=1.0),
        lambda: repeated(event, 2),
        lambda: worst([known, event]),
    ):
        with pytest.raises(ValueError, match=line):
            account()


def test_an_unknown_cost_is_refused_before_anything_is_noised(store: ReleaseStore) -> None:
    register(Odd)
    config = config_with("odd")
    with pytest.raises(ValueError, match="cannot read events of type LaplaceEvent"):
        build_release_plan(config, build_schedule(config), build_image_spec(config))

    def noise(_: int) -> Any:
        raise AssertionError("noise was asked for")

    asked = dataclasses.replace(request(noise=noise), parameters=OddParameters(**vars(settings())))
    for act in (store.preview, store.obtain):
        with pytest.raises(ValueError, match="cannot read events of type LaplaceEvent"):
            act(image_set(4), asked)
    assert set(files(store.root)) <= {".release-lock"}


def test_a_baseline_has_no_plan() -> None:
    config = small_config(coarse={"training": "none"})
    assert build_release_plan(config, build_schedule(config), build_image_spec(config)) is None
    with pytest.raises(ConfigError, match="training none releases nothing"):
        set_up(config).release_request(client=0, allow_new_release=False)


# --- A row for each image ----------------------------------------------------------------------


def test_images_are_prepared_before_they_are_clipped(store: ReleaseStore) -> None:
    """The same noise on half the image: the difference is what clipping leaves of both."""
    register(Half)
    images = image_set(9)
    plain = ReleaseStore(store.root.parent / "plain").obtain(images, request())
    own = store.obtain(images, halves())
    assert isinstance(own, ReleasedDataset)
    assert isinstance(plain, ReleasedDataset)
    abar = own.parameters.alpha_bar
    moved = (own.x_tilde - plain.x_tilde).double().flatten(1).numpy() / math.sqrt(abar)
    expected = clipped_means(images.images, own.parameters) - clipped_means(
        images.images, plain.parameters
    )
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(moved, expected, atol=2e-2)  # steps of the grid
    assert own.event == plain.event
    (record,) = store.ledger().releases()
    assert record.parameters == HalfParameters(**vars(settings()))


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda x: x * np.float32(np.nan), "must return finite values"),
        (
            lambda x: x[:, :, :2],
            "must return finite values of shape (4, 1, 4, 4), got (4, 1, 2, 4)",
        ),
    ],
)
def test_prepared_images_must_be_images(
    store: ReleaseStore, monkeypatch: pytest.MonkeyPatch, prepare: Any, words: str
) -> None:
    register(Half)
    monkeypatch.setattr(Half, "prepare", lambda self, x: prepare(x))
    with pytest.raises(ValueError, match=re.escape(words)):
        store.obtain(image_set(4), halves())
    assert store.ledger().releases() == ()


# --- Sums, in two rounds -----------------------------------------------------------------------


def test_an_image_is_in_each_round_once(store: ReleaseStore) -> None:
    register(ClassSums)
    images, more = image_set(10), image_set(14)
    both = epsilon_of([2.5, 2.5])
    assert store.preview(images, sums(0)).epsilon_after == pytest.approx(both, rel=1e-9)
    first = store.obtain(images, sums(0))
    assert store.spent(delta=DELTA).largest == pytest.approx(epsilon_of([2.5]), rel=1e-9)
    ahead = store.preview(images, sums(1))
    assert (ahead.known, ahead.fresh, ahead.again) == (0, 10, 0)
    assert ahead.epsilon_after == pytest.approx(both, rel=1e-9)
    store.obtain(images, sums(1))
    assert store.spent(delta=DELTA).largest == pytest.approx(both, rel=1e-9)
    head = store.ledger().head
    again = store.obtain(images, sums(0))
    assert torch.equal(again.tensors()["sums"], first.tensors()["sums"])
    assert store.ledger().head == head
    # Images that come later are in a sum of their own.
    total = store.obtain(more, sums(0))
    assert [record.images for record in store.ledger().releases()] == [10, 10, 4]
    assert store.spent(delta=DELTA).images == 14
    exact = torch.zeros(3, 16)
    shown = torch.from_numpy(more.images.copy()).float().flatten(1) / 127.5 - 1.0
    shown *= (4.0 / shown.norm(dim=1)).clamp_max(1.0)[:, None]
    exact.index_add_(0, torch.from_numpy(more.labels.copy()), shown)
    error = (total.tensors()["sums"] - exact).std() / (20.0 * math.sqrt(2.0))
    assert 0.6 < float(error) < 1.5  # 48 values with the noise of two sums


def test_sums_are_recorded_with_their_mechanism(store: ReleaseStore) -> None:
    register(ClassSums)
    store.obtain(image_set(10), sums(0))
    (_, line, _) = (store.root / "ledger.jsonl").read_text().splitlines()[1:]
    fields = json.loads(line)
    assert (fields["mechanism"], fields["image_shape"]) == ("class_sums", [1, 4, 4])
    assert fields["parameters"] == {
        "stage": "means", "clip_norm": 4.0, "sigma": 20.0, "num_classes": 3
    }  # fmt: skip
    assert fields["noise_multiplier"] == 2.5
    assert read_ledger(store.root / "ledger.jsonl").releases()[0].parameters == sum_rounds()[0]


def test_a_crash_before_the_record_sends_the_same_sums(store: ReleaseStore) -> None:
    register(ClassSums)
    first = store.obtain(image_set(10), sums(0))
    ledger = store.root / "ledger.jsonl"
    empty = ReleaseStore(store.root.parent / "empty")
    empty.note("note", {}, client_id=3)
    ledger.write_bytes((empty.root / "ledger.jsonl").read_bytes())
    made = store.root / "releases" / "000001.safetensors"
    made.rename(made.with_suffix(".ready"))
    again = store.obtain(image_set(10), sums(0))
    assert torch.equal(again.tensors()["sums"], first.tensors()["sums"])
    (record,) = store.ledger().releases()
    assert (record.images, record.image_shape) == (10, (1, 4, 4))


def test_bytes_that_are_not_the_layouts_are_not_kept(
    store: ReleaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(ClassSums)
    monkeypatch.setattr(ClassSums, "make", lambda *_: iter([np.zeros(5, dtype=np.float32)]))
    with pytest.raises(ValueError, match="class_sums: made 20 bytes, its layout has 192"):
        store.obtain(image_set(4), sums())
    assert store.ledger().releases() == ()


# --- Several mechanisms ------------------------------------------------------------------------


def test_a_ledger_of_two_mechanisms_adds_up_both(store: ReleaseStore) -> None:
    register(ClassSums)
    images = image_set(6)
    store.obtain(images, request())
    with pytest.raises(StoreError, match=r"with mechanism = images \(now class_sums\); releasing"):
        store.obtain(images, sums(0))
    store.obtain(images.subset(np.arange(4)), sums(0, allow=True))
    spent = store.spent(delta=DELTA)
    one = epsilon_of([1.6705051629956633])
    both = epsilon_of([1.6705051629956633, 2.5])
    assert [count for _, count in spent.distribution] == [4, 2]
    np.testing.assert_allclose([epsilon for epsilon, _ in spent.distribution], [both, one])
    statement = client_statement(store, delta=DELTA)
    assert statement["released"] == ClassSums().sentence(sum_rounds()[0])
    assert statement["epsilon"] == pytest.approx(both)


def test_an_unknown_mechanism_in_a_ledger_is_one_line(
    store: ReleaseStore, registry: dict[str, Any]
) -> None:
    register(ClassSums)
    store.obtain(image_set(6), sums())
    del registry["class_sums"]
    with pytest.raises(StoreError) as error:
        store.ledger()
    assert str(error.value).endswith(
        "record 2: release mechanism 'class_sums' is not known here; import the module that "
        "registers it"
    )


def test_a_record_may_not_claim_another_mechanism(store: ReleaseStore) -> None:
    """The parameters of images under another name cost what that mechanism says."""
    register(Half)
    register(ClassSums)
    store.obtain(image_set(6), halves())
    path = store.root / "ledger.jsonl"
    for name in ("images", "class_sums"):
        record = read_ledger(path).records[1]
        fields = {**record.fields, "mechanism": name}
        other = append(
            dataclasses.replace(read_ledger(path), path=path.with_name(name), records=()),
            "opened", {"client_id": 3},
        )  # fmt: skip
        append(other, "release", fields)
        with pytest.raises(StoreError, match="record 2: "):
            read_ledger(path.with_name(name))


# --- What travels ------------------------------------------------------------------------------


def test_what_a_mechanism_of_ones_own_sends_is_read_by_it_alone(store: ReleaseStore) -> None:
    register(ClassSums)
    register(Half)
    released = store.obtain(image_set(10), sums())
    message = wire.encode_release(released, client_id=3)
    back = wire.decode_release(message, who="client 3", client_id=3, mechanism="class_sums")
    assert isinstance(back, ReleasedSums)
    assert back.parameters == sum_rounds()[0]
    assert back.event == GaussianEvent(noise_multiplier=2.5)
    assert torch.equal(back.sums, released.tensors()["sums"])
    for other in ("images", "half"):
        line = f"release of client 3: made by mechanism 'class_sums', expected {other}"
        with pytest.raises(wire.WireError, match=line):
            wire.decode_release(message, who="client 3", mechanism=other)
    images = wire.encode_release(
        ReleaseStore(store.root.parent / "other").obtain(image_set(4), request()), client_id=3
    )
    with pytest.raises(wire.WireError, match="made by mechanism 'images', expected class_sums"):
        wire.decode_release(images, who="client 3", mechanism="class_sums")


def test_nothing_but_a_release_is_encoded(store: ReleaseStore) -> None:
    register(ClassSums)
    released = store.obtain(image_set(10), sums())
    for thing in (released.tensors(), released.tensors()["sums"], sum_rounds()[0], image_set(4)):
        name = type(thing).__name__
        with pytest.raises(wire.WireError, match=f"only a Release may leave here, got {name}"):
            wire.encode_release(thing, client_id=3)  # type: ignore[arg-type]


@pytest.mark.parametrize("encoding", ["float32", "bfloat16", "int8"])
def test_sums_travel_in_every_encoding_and_bad_ones_are_refused(
    store: ReleaseStore, encoding: str
) -> None:
    register(ClassSums)
    released = store.obtain(image_set(10), sums())
    assert isinstance(released, ReleasedSums)
    message = wire.encode_release(released, client_id=3, encoding=encoding)
    back = wire.decode_release(message, who="client 3", mechanism="class_sums")
    torch.testing.assert_close(
        back.tensors()["sums"], released.sums, atol=float(released.sums.abs().max()) / 100, rtol=0
    )
    for bad, words in (
        ({"sums": released.sums[0]}, r"sums must be float32 \(K, D\)"),
        ({"sums": released.sums, "more": released.sums}, "expected sums, got"),
        ({}, r"expected sums, got \[\]"),
    ):
        spoilt = dataclasses.replace(released)
        object.__setattr__(spoilt, "tensors", lambda bad=bad: bad)
        message = wire.encode_release(spoilt, client_id=3, encoding=encoding)
        with pytest.raises(wire.WireError, match=words):
            wire.decode_release(message, who="client 3", mechanism="class_sums")


# --- Runs, statements and nodes ----------------------------------------------------------------


def test_a_run_plans_and_says_what_its_mechanism_releases() -> None:
    register(Half)
    config = config_with("half")
    spec = build_image_spec(config)
    plan = build_release_plan(config, build_schedule(config), spec)
    assert plan is not None
    assert isinstance(plan.rounds[0], HalfParameters)
    assert (plan.t0, plan.clip_norm, plan.shift) == (675, 3.0, spec.shift)
    asked = build_release_request(config, plan, client=0, allow_new_release=False)
    assert asked.noise(1).description == SeededNoise.description
    assert (asked.parameters, asked.rounds) == (plan.rounds[0], plan.rounds)
    statement = run_statement(config, plan, noise_source="")
    sentence = Half().sentence(plan.rounds[0])
    assert statement["released"] == sentence
    assert f"What is sent: {sentence}" in " ".join(plain_text(statement).split())


def test_a_mechanism_without_images_cannot_train_a_coarse_model() -> None:
    register(ClassSums)
    config = config_with("class_sums")
    plan = build_release_plan(config, build_schedule(config), build_image_spec(config))
    assert plan is not None
    assert plan.epsilon_exact == pytest.approx(epsilon_of([2.5, 2.5]))
    with pytest.raises(ConfigError, match="mechanism class_sums releases no images"):
        plan.t0  # noqa: B018


def deployed(release: str, **privacy: Any) -> Any:
    return small_config(
        run={"simulation": False},
        privacy={"epsilon": None, "t0": 675, "clip_norm": 3.0, "release": release, **privacy},
        evaluation={"image_metrics": False},
    )


def test_a_node_allows_images_alone_unless_its_policy_names_more(tmp_path: Path) -> None:
    register(Half)
    check_config(NodePolicy(), deployed("images"))
    with pytest.raises(PolicyError) as error:
        check_config(NodePolicy(), deployed("half"))
    assert str(error.value) == (
        "privacy.release: 'half' is not one of the mechanisms of this node: images"
    )
    path = tmp_path / "policy.yaml"
    bounds = "max_epsilon: none\nmin_t0: none\n"
    path.write_text(f"{bounds}mechanisms: [images, '{PLANTED}:Half', class_sums]\n")
    with pytest.raises(ConfigError, match=r"policy\.yaml: mechanisms: privacy\.release: must be"):
        load_policy(path)
    register(ClassSums)
    policy = load_policy(path)
    check_config(policy, deployed(f"{PLANTED}:Half"))
    check_config(policy, deployed("class_sums"))
    with pytest.raises(PolicyError, match="not one of the mechanisms of this node"):
        check_config(policy, deployed("half"))  # as the policy writes it, to the letter


def test_a_nodes_bounds_hold_for_every_mechanism() -> None:
    register(Half)
    register(ClassSums)
    allowed = {"mechanisms": ("half", "class_sums")}
    with pytest.raises(PolicyError, match=r"privacy\.t0: 675 is less than the 700 of this node"):
        check_config(NodePolicy(min_t0=700, **allowed), deployed("half"))
    check_config(NodePolicy(min_t0=700, **allowed), deployed("class_sums"))  # which has none
    both = epsilon_of([2.5, 2.5])  # of both rounds, before the first
    check_config(NodePolicy(max_epsilon=both * 1.001, **allowed), deployed("class_sums"))
    with pytest.raises(PolicyError, match="an image would spend"):
        check_config(NodePolicy(max_epsilon=both * 0.999, **allowed), deployed("class_sums"))
