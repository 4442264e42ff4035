"""Experiments: every cell of the committed suites, equal budgets, published values, refusals."""

from __future__ import annotations

import copy
import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from fedpdm.config import ConfigError, RunConfig, Suite, load_paper_values, load_suite
from tests.support.cases import every

FOLDER = Path(__file__).parents[2] / "experiments"
NAMES = ("cifar10", "colored-mnist", "celeba")
CELLS = [
    (name, profile, method)
    for name in NAMES
    for suite in [load_suite(FOLDER / f"{name}.yaml")]
    for profile in suite.profiles
    for method in suite.methods_of(profile)
]


def suite_of(name: str) -> Suite:
    return load_suite(FOLDER / f"{name}.yaml")


def drawn_per_client(config: RunConfig) -> int:
    """Images that gradient steps draw in a whole run, per client: of both models, wherever."""
    coarse, fine = config.coarse, config.fine
    rounds, clients = config.run.rounds, config.partition.num_clients
    total = 0
    if coarse.training == "server":
        steps = config.aggregation.server_steps_per_round or coarse.steps_per_round * clients
        total += rounds * steps * coarse.batch_size
    elif coarse.training == "federated":
        total += rounds * clients * coarse.steps_per_round * coarse.batch_size
    if coarse.images == "released":  # others have no models of their own
        total += rounds * clients * fine.steps_per_round * fine.batch_size
    assert total % clients == 0
    return total // clients


# The committed suites.


@pytest.mark.parametrize("name", NAMES)
def test_profiles_and_methods(name: str) -> None:
    suite = suite_of(name)
    assert suite.name == name
    sizes = {
        "colored-mnist": ["smoke", "cpu", "long", "converged", "converged-smoke", "paper"],
        "cifar10": ["smoke", "cpu", "converged", "converged-smoke", "paper"],
        "celeba": ["smoke", "cpu", "paper"],
    }
    assert list(suite.profiles) == sizes[name]
    assert suite.profiles["cpu"].seeds >= 3
    assert {"centralised", "feddm", "alone", "pfdm", "ours", "ours-federated"} <= set(suite.table)
    if name != "celeba":
        assert {"feddm-prox", "feddm-quant", "pfdm-federated", "dpdm"} <= set(suite.table)
    assert all(suite.method(m).title and suite.method(m).trust for m in suite.table)
    titles = [suite.method(m).title for m in suite.table]
    assert len(set(titles)) == len(titles)


@pytest.mark.slow
@every("name, profile, method", CELLS)
def test_cell(name: str, profile: str, method: str) -> None:
    suite = suite_of(name)
    size = suite.profile(profile)
    config = suite.compose(profile, method, seed=2)
    assert config.name == f"{name}-{profile}-{method}-seed2"
    assert config.run.seed == 2
    assert config.run.simulation
    assert (config.privacy.epsilon, config.privacy.delta) == (10, 1e-5)
    assert size.clients <= config.partition.num_clients
    assert not config.evaluation.image_metrics  # scored afterwards, on equal terms
    assert (config.coarse.steps_per_round > 0) == (suite.method(method).shared > 0)
    assert (config.fine.steps_per_round > 0) == (suite.method(method).shared < 1)
    assert size.shared_steps or (suite.method(method).stop, suite.method(method).above) == (
        "last", "model"
    )  # fmt: skip
    for section in (config.coarse, config.fine):
        steps = section.steps_per_round * config.run.rounds
        assert steps == 0 or 1 <= section.warmup_steps <= max(1, steps // 10)
    assert suite.compose(profile, method, seed=2) == config  # nothing is kept between calls


@pytest.mark.slow
@pytest.mark.parametrize(("name", "profile"), sorted({cell[:2] for cell in CELLS}))
def test_every_method_draws_as_many_images(name: str, profile: str) -> None:
    suite = suite_of(name)
    size = suite.profile(profile)
    for method in suite.methods_of(profile):
        config = suite.compose(profile, method, seed=0)
        rounds, steps = config.run.rounds, size.steps
        if size.shared_steps and suite.method(method).shared:
            steps += size.shared_steps
        # Steps are whole per round and model: each is off by half a step at most.
        slack = rounds * (config.coarse.batch_size + config.fine.batch_size) / 2
        assert abs(drawn_per_client(config) - steps * 32) <= slack, method
        if "smoke" not in profile:
            assert drawn_per_client(config) == pytest.approx(steps * 32, rel=0.01), method


def test_where_own_models_are_shared_all_methods_train_the_same() -> None:
    suite = suite_of("colored-mnist")
    methods = suite.methods_of("converged")
    plain = [m for m in methods if m != "alone-augmented"]
    trained = {
        dataclasses.replace(suite.compose("converged", m, seed=10).fine, t_range="all")
        for m in plain
    }
    assert len(trained) == 1
    with pytest.raises(ConfigError, match=r"converged\.shared_steps: feddm has no own models"):
        suite.compose("converged", "feddm", seed=10)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_methods_differ_in_nothing_but_what_they_say(name: str) -> None:
    """One network, one learning rate, one split and one sampler for all rows of a table."""
    suite = suite_of(name)
    for profile in suite.profiles:
        configs = [suite.compose(profile, m, seed=0) for m in suite.methods_of(profile)]
        released = [c.privacy.clip_norm for c in configs if c.privacy.release == "images"]
        assert len(set(released)) == 1
        for read in (
            lambda c: c.data,
            lambda c: c.partition,
            lambda c: c.evaluation,
            lambda c: c.schedule,
            lambda c: (c.coarse.preset, c.fine.preset, c.coarse.prediction, c.fine.prediction),
            lambda c: (c.coarse.lr, c.fine.lr, c.coarse.ema_decay, c.fine.ema_decay),
            lambda c: (c.sampling.scheduler, c.sampling.guidance),
            lambda c: (c.privacy.epsilon, c.privacy.delta),
            lambda c: c.run.rounds,
        ):
            assert len({read(config) for config in configs}) == 1


@pytest.mark.slow
@pytest.mark.parametrize("profile", ["smoke", "cpu", "paper"])
@pytest.mark.parametrize("name", NAMES)
def test_sampling_in_two_chains_gets_no_fewer_steps(name: str, profile: str) -> None:
    """PFDM's T + t0 levels share its steps; all others have equally many for T levels."""
    suite = suite_of(name)
    steps: dict[str, set[int]] = {"truncated": set(), "noise_to_noise": set()}
    for method in suite.table:
        config = suite.compose(profile, method, seed=0)
        steps[config.coarse.objective].add(config.sampling.num_steps)
    assert len(steps["truncated"]) == 1
    assert min(steps["noise_to_noise"]) >= max(steps["truncated"])


def test_trust_models() -> None:
    """Who sees what follows from the method's settings, not from its words alone."""
    suite = suite_of("cifar10")

    def made(method: str) -> RunConfig:
        return suite.compose("cpu", method, seed=0)

    assert made("alone").coarse.training == "none"
    assert (made("centralised").coarse.training, made("centralised").coarse.images) == (
        "server",
        "raw",
    )
    for method in ("feddm", "feddm-prox", "feddm-quant"):
        assert (made(method).coarse.training, made(method).coarse.images) == ("federated", "raw")
    assert made("feddm").aggregation.method == "fedavg"
    assert made("feddm-prox").aggregation.method == "fedprox"
    assert made("feddm-quant").aggregation.encoding == "int8"
    for method in ("pfdm", "pfdm-federated", "ours", "ours-federated"):
        assert made(method).kind.releases
        assert made(method).kind.has_fine_model
        training = "federated" if method.endswith("federated") else "server"
        assert made(method).coarse.training == training
    for method in ("pfdm", "pfdm-federated"):  # as published
        config = made(method)
        assert config.coarse.objective == "noise_to_noise"
        assert config.privacy.accounting == "paper"
        assert config.privacy.shift == 0.0
        assert config.fine.t_range == "below_t0"
        assert config.sampling.coarse_worth is None
    assert made("ours").privacy.accounting == "exact"


def test_dp_sgd_counts_images_not_draws_of_noise() -> None:
    suite = suite_of("cifar10")
    size = suite.profile("cpu")
    for coarse in (
        {"batch_size": 32, "noise_multiplicity": 1},
        {"batch_size": 64, "noise_multiplicity": 1},
        {"batch_size": 64, "noise_multiplicity": 8},
        {"batch_size": 100, "noise_multiplicity": 2},
    ):
        config = suite.compose("cpu", "dpdm", seed=0, overrides=[{"coarse": coarse}])
        assert config.coarse.images == "dp_sgd"
        steps = size.steps * 32 / coarse["batch_size"] / size.rounds
        assert abs(config.coarse.steps_per_round - steps) <= 0.5


ABLATIONS = [(name, ablation) for name in NAMES for ablation in suite_of(name).ablations]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "kind"), ABLATIONS)
def test_ablation(name: str, kind: str) -> None:
    suite = suite_of(name)
    ablation = suite.ablation(kind)
    assert ablation.title
    assert set(ablation.methods) <= set(suite.methods)
    for method in ablation.methods:
        configs = {
            variant: suite.compose(
                "cpu", method, seed=0, overrides=[change], label=f"{kind}{variant}"
            )
            for variant, change in ablation.variants.items()
        }
        assert len({config.name for config in configs.values()}) == len(configs)
        plain = [dataclasses.replace(config, name="same") for config in configs.values()]
        assert len(set(plain)) == len(plain)  # every variant differs


def test_draws_of_the_noise_in_ablations_of_converged() -> None:
    suite = suite_of("colored-mnist")
    size = suite.profile("converged")
    assert (size.draws, size.first_seed, size.seeds) == (3, 12, 3)
    wanted = {
        "minority": {"1", "3", "10", "30", "100"},
        "clients": {"2", "4", "16", "64"},
        "budget": {"1", "3", "10", "10000"},
    }
    for name, variants in wanted.items():
        assert variants <= set(suite.ablation(name).variants)
    plain, drawn = (suite.compose("converged", "statistics", seed=10, draw=d) for d in (0, 2))
    assert plain == suite.compose("converged", "statistics", seed=10)
    assert drawn.name == f"{plain.name}-draw2"
    assert drawn.privacy == dataclasses.replace(plain.privacy, noise_draw=2)
    assert dataclasses.replace(drawn, name=plain.name, privacy=plain.privacy) == plain


def test_clients_ablation_keeps_the_total_of_images() -> None:
    suite = suite_of("cifar10")
    variants = suite.ablation("clients").variants
    assert list(variants) == ["4", "16", "64", "128"]
    for variant, change in variants.items():
        config = suite.compose("cpu", "ours", seed=0, overrides=[change])
        assert config.partition.num_clients == int(variant)
        assert config.data == suite.compose("cpu", "ours", seed=0).data


# Published values, written down from the paper's table and not read from the file under test.

PAPER = {
    "cifar10": {
        "centralised": (16.27, 17.62, 16.95),
        "feddm": (18.05, 19.15, 18.60),
        "alone": (19.87, 36.44, 28.16),
        "pfdm": (19.85, 35.78, 27.82),
    },
    "colored_mnist": {
        "centralised": (1.85, 1.45, 1.66),
        "feddm": (1.89, 1.51, 1.70),
        "alone": (2.19, 5.99, 4.09),
        "pfdm": (1.72, 4.79, 3.26),
    },
    "celeba": {
        "centralised": (13.72, 11.70, 12.71),
        "feddm": (14.47, 11.83, 13.15),
        "alone": (23.42, 41.38, 32.40),
        "pfdm": (18.11, 28.09, 23.10),
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_paper_values(name: str) -> None:
    suite = suite_of(name)
    assert suite.paper is not None
    values = load_paper_values(FOLDER / "expected" / "paper.yaml", suite.paper)
    assert values == PAPER[suite.paper]
    rows = [suite.method(method).paper for method in suite.table]
    assert set(values) <= set(rows)  # every published row stands in the table
    cited = [row for row in rows if row is not None]
    assert len(set(cited)) == len(cited)  # and once


def test_average_of_the_paper_is_that_of_its_groups() -> None:
    for table in PAPER.values():
        for majority, minority, average in table.values():
            assert average == pytest.approx((majority + minority) / 2, abs=0.011)


def test_no_paper_table() -> None:
    path = FOLDER / "expected" / "paper.yaml"
    assert load_paper_values(path, None) == {}
    with pytest.raises(ConfigError, match=r"paper\.yaml: has no table imagenet$"):
        load_paper_values(path, "imagenet")


# Composition of small suites written here.

BASE = {
    "table": ["alone", "ours"],
    "common": {"data": {"name": "digits"}, "coarse": {"preset": "micro"}},
    "profiles": {"smoke": {"rounds": 2, "steps": 40}},
}


METHODS = {
    "alone": {"shared": 0.0, "set": {"coarse": {"training": "none"}}},
    "ours": {"shared": 0.25, "set": {"coarse": {"training": "server"}}},
}


def write(folder: Path, change: dict | None = None) -> Path:
    """`BASE`, with some keys of the suite replaced, beside `METHODS`."""
    (folder / "methods").mkdir(exist_ok=True)
    for name, method in METHODS.items():
        (folder / "methods" / f"{name}.yaml").write_text(yaml.safe_dump(method))
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**copy.deepcopy(BASE), **(change or {})}))
    return path


def test_defaults(tmp_path: Path) -> None:
    suite = load_suite(write(tmp_path))
    assert (suite.name, suite.title, suite.paper) == ("small", "small", None)
    config = suite.compose("smoke", "ours", seed=0)
    # A quarter of 40 steps of 32 for the shared model, over 2 rounds.
    assert (config.coarse.steps_per_round, config.fine.steps_per_round) == (5, 15)
    assert config.coarse.batch_size == 32


def test_order_of_precedence(tmp_path: Path) -> None:
    suite = load_suite(
        write(
            tmp_path,
            {
                "common": {"fine": {"lr": 1e-3, "ema_decay": 0.5, "grad_clip": 2, "batch_size": 8}},
                "profiles": {
                    "smoke": {
                        "rounds": 2,
                        "steps": 40,
                        "set": {"fine": {"ema_decay": 0.6, "grad_clip": 3, "batch_size": 16}},
                    }
                },
                "methods": {"alone": {"fine": {"grad_clip": 4, "batch_size": 64}}},
            },
        )
    )
    fine = suite.compose("smoke", "alone", seed=0, overrides=[{"fine": {"batch_size": 128}}]).fine
    assert (fine.lr, fine.ema_decay, fine.grad_clip, fine.batch_size) == (1e-3, 0.6, 4, 128)
    assert fine.steps_per_round == 40 * 32 // 128 // 2
    other = suite.compose("smoke", "ours", seed=0).fine
    assert (other.grad_clip, other.batch_size) == (3, 16)
    assert other.steps_per_round == 30 * 32 // 16 // 2


def test_seed_and_steps_are_the_budgets(tmp_path: Path) -> None:
    suite = load_suite(write(tmp_path))
    overrides = [{"run": {"seed": 9, "rounds": 4}, "fine": {"steps_per_round": 7}}]
    config = suite.compose("smoke", "alone", seed=1, overrides=overrides)
    assert config.run.seed == 1
    assert (config.run.rounds, config.fine.steps_per_round) == (4, 10)


def test_composing_changes_no_method(tmp_path: Path) -> None:
    """A section that a method alone has is the method's: the budget must not be written there."""
    common = {"data": {"name": "digits"}}
    profiles = {name: {"rounds": 1, "steps": steps} for name, steps in (("a", 1000), ("b", 20))}
    suite = load_suite(write(tmp_path, {"common": common, "profiles": profiles}))
    before = copy.deepcopy(suite.method("ours").set)
    first = suite.compose("a", "ours", seed=0)
    assert suite.method("ours").set == before
    assert first.coarse.warmup_steps == 25
    assert suite.compose("b", "ours", seed=0).coarse.warmup_steps == 1


def test_variants_may_be_numbers_and_empty(tmp_path: Path) -> None:
    variants = {4: None, 8: {"partition": {"num_clients": 8}}}
    path = write(tmp_path, {"ablations": {"clients": {"methods": ["ours"], "variants": variants}}})
    expected = {"4": {}, "8": {"partition": {"num_clients": 8}}}
    assert load_suite(path).ablation("clients").variants == expected


BAD_SUITES = {
    "unknown key": ({"profile": {}}, r"small\.yaml: profile: unknown key"),
    "no profiles": ({"profiles": {}}, r"profiles: must be a mapping with at least one profile"),
    "profiles in a list": ({"profiles": ["a"]}, r"profiles: must be a mapping with at least one"),
    "no table": ({"table": []}, r"small\.yaml: table: must be a list of methods"),
    "table in words": ({"table": "ours"}, r"table: must be a list of methods"),
    "method of the table": (
        {"table": ["alone", "hours"]},
        r"small\.yaml: table: there is no .*methods.hours\.yaml",
    ),
    "changed method": ({"methods": {"hours": {}}}, r"methods\.hours: there is no .*hours\.yaml"),
    "methods in a list": ({"methods": ["ours"]}, r"small\.yaml: methods: must be a mapping, got"),
    "method in words": ({"methods": {"ours": "x"}}, r"ours: must be a mapping, got 'x'"),
    "common": ({"common": 3}, r"small\.yaml: common: must be a mapping, got 3"),
    "key of a profile": (
        {"profiles": {"smoke": {"step": 3}}},
        r"profiles\.smoke\.step: unknown key; did you mean steps\?",
    ),
    "no steps": (
        {"profiles": {"smoke": {"steps": 0}}},
        r"profiles\.smoke\.steps: must be at least 1, got 0",
    ),
    "rounds": (
        {"profiles": {"smoke": {"rounds": 1.5}}},
        r"profiles\.smoke\.rounds: must be int, got 1\.5",
    ),
    "key of an ablation": (
        {"ablations": {"e": {"variant": {}}}},
        r"ablations\.e\.variant: unknown key; did you mean variants\?",
    ),
    "variant": (
        {"ablations": {"e": {"variants": {"1": 5}}}},
        r"small\.yaml: 1: must be a mapping, got 5",
    ),
}


@pytest.mark.parametrize("kind", BAD_SUITES)
def test_bad_suite(tmp_path: Path, kind: str) -> None:
    change, words = BAD_SUITES[kind]
    with pytest.raises(ConfigError, match=words) as caught:
        load_suite(write(tmp_path, change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("titel: ours\n", r"new\.yaml\.titel: unknown key; did you mean title\?"),
        ("shared: 1.5\n", r"new\.yaml\.shared: must be at most 1, got 1\.5"),
        ("set: 3\n", r"new\.yaml\.set: must be a mapping, got 3"),
        ("- ours\n", r"new\.yaml: must hold a mapping, got list"),
    ],
)
def test_bad_method_file(tmp_path: Path, content: str, words: str) -> None:
    path = write(tmp_path)
    (tmp_path / "methods" / "new.yaml").write_text(content)
    with pytest.raises(ConfigError, match=words):
        load_suite(path)


BAD_CELLS = {
    "key": ({"common": {"fine": {"rate": 1}}}, r"fine\.rate: unknown key"),
    "section": ({"common": {"fin": {}}}, r"fin: unknown key; did you mean fine\?"),
    "value": (
        {"common": {"fine": {"batch_size": "many"}}},
        r"fine\.batch_size: must be int, got 'many'",
    ),
    "section in words": ({"common": {"fine": "x"}}, r"fine: must be a mapping, got 'x'"),
    "too few for the shared model": (
        {"profiles": {"smoke": {"rounds": 5, "steps": 8}}},
        r"profiles\.smoke\.steps: 8 over 5 rounds leave no coarse step of ours",
    ),
    "too few with large batches": (
        {"common": {"fine": {"batch_size": 4096}}},
        r"profiles\.smoke\.steps: 40 over 2 rounds leave no fine step of ours",
    ),
}


@pytest.mark.parametrize("kind", BAD_CELLS)
def test_bad_cell(tmp_path: Path, kind: str) -> None:
    change, words = BAD_CELLS[kind]
    suite = load_suite(write(tmp_path, change))
    with pytest.raises(ConfigError, match=words) as caught:
        suite.compose("smoke", "ours", seed=0)
    assert "\n" not in str(caught.value)


def test_unknown_names(tmp_path: Path) -> None:
    suite = load_suite(write(tmp_path))
    for ask, words in (
        (lambda: suite.compose("cpu", "ours", seed=0), "profile: small has smoke, got 'cpu'"),
        (lambda: suite.ablation("epsilon"), "ablation: small has none, got 'epsilon'"),
        (lambda: suite.method("hours"), "method: must be one of alone, .*, got 'hours'"),
    ):
        with pytest.raises(ConfigError) as caught:
            ask()
        assert re.fullmatch(words, str(caught.value))


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot be read: No such file"):
        load_suite(tmp_path / "nowhere.yaml")


def test_empty_sections_change_nothing(tmp_path: Path) -> None:
    plain = load_suite(write(tmp_path)).compose("smoke", "ours", seed=0)
    common = {**BASE["common"], "run": None, "fine": None}
    empty = {"common": common, "methods": {"ours": None}, "ablations": None}
    assert load_suite(write(tmp_path, empty)).compose("smoke", "ours", seed=0) == plain
