"""`fedpdm node check`: everything that can be known before a node joins, one line per check."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Callable
from dataclasses import asdict
from typing import TypeVar

from fedpdm.config import ConfigError
from fedpdm.deployment.acceptance import acceptance_of
from fedpdm.deployment.certificates import read_node_certificate
from fedpdm.deployment.classes import load_classes
from fedpdm.deployment.invitation import Software, installed_software, read_invitation
from fedpdm.deployment.node.images import compare_classes, compare_images
from fedpdm.deployment.node.network import shake_hands
from fedpdm.deployment.node.report import Check, NodeReport
from fedpdm.deployment.node.resources import (
    check_clock,
    check_store,
    free_disk,
    free_memory,
    store_bytes,
    training_bytes,
)
from fedpdm.deployment.node.settings import NodeSettings
from fedpdm.deployment.node.statement import (
    check_spending,
    images_sha256,
    node_statement,
    statement_text,
)
from fedpdm.deployment.policy import NodePolicy, check_code, check_config
from fedpdm.privacy.accountant import delta_warning
from fedpdm.privacy.mechanism import mechanism_of
from fedpdm.privacy.releases import ReleaseStore
from fedpdm.privacy.statement import baseline_statement
from fedpdm.setup.build import model_sizes
from fedpdm.setup.run_setup import RunSetup, set_up
from fedpdm.storage.files import StoreError
from fedpdm.text import line

__all__ = ["check_node"]

LONGEST_DETAIL = 4000
SOON = 30.0  # days; a certificate that ends sooner is pointed out
T = TypeVar("T")


class _Missing(ValueError):
    """A check needs what an earlier one did not find."""


def check_node(settings: NodeSettings, *, timeout: float = 10.0) -> NodeReport:
    """Look at everything; nothing but an empty store is written, and nothing but TLS is sent.

    A check that fails does not stop the others. Never raises for what a user can get wrong.
    """
    return _Checking(settings, timeout=timeout).run()


class _Checking:
    """The checks in order, each a method that returns its line or raises it."""

    def __init__(self, settings: NodeSettings, *, timeout: float) -> None:
        self.settings = settings
        self.timeout = timeout
        self.now = datetime.datetime.now(datetime.UTC)
        self.report = NodeReport(settings=settings)
        self._classes_agree = True

    def run(self) -> NodeReport:
        steps: tuple[tuple[str, Callable[[], str]], ...] = (
            ("certificate", self.certificate),
            ("policy", self.policy),
            ("invitation", self.invitation),
            ("versions", self.versions),
            ("clock", self.clock),
            ("classes", self.classes),
            ("data", self.data),
            ("store", self.store),
            ("disk", self.disk),
            ("memory", self.memory),
            ("coordinator", self.coordinator),
            ("bounds", self.bounds),
            ("statement", self.statement),
        )
        for name, step in steps:
            try:
                check = Check(name=name, ok=True, detail=line(step(), limit=LONGEST_DETAIL))
            except (ValueError, OSError, FileNotFoundError, MemoryError) as error:
                why = line(error, limit=LONGEST_DETAIL) or type(error).__name__
                check = Check(name=name, ok=False, detail=why)
            self.report.checks.append(check)
        return self.report

    # What the node was given.

    def certificate(self) -> str:
        found = read_node_certificate(self.settings.certificate)
        self.report.certificate = found
        found.check_time(self.now)
        days = found.days_left(self.now)
        hint = "; renew it" if days < SOON else ""
        return (
            f"client {found.client_id}, valid for {days:.0f} days until "
            f"{min(found.not_after, found.authority_not_after):%F}, signed by "
            f"{found.authority_name}{hint}"
        )

    def policy(self) -> str:
        policy = self.settings.load_policy()
        self.report.policy = policy
        if self.settings.policy is None:
            return f"{self.settings.bounds()}; no raw metrics, no second release"
        shown = asdict(policy) | {"mechanisms": ", ".join(policy.mechanisms)}
        if policy.mechanisms == NodePolicy().mechanisms:
            del shown["mechanisms"]
        bounds = [f"{name} {value}" for name, value in shown.items() if value]
        bounds += [f"NO {name}" for name in ("max_epsilon", "min_t0") if shown[name] is None]
        return f"{self.settings.policy}: {', '.join(bounds)}"

    def invitation(self) -> str:
        found = read_invitation(self.settings.invitation)
        check_code(self._given(self.report.policy), found.config)
        self.report.invitation = found
        config, client = found.config, self._given(self.report.certificate).client_id
        if client >= config.partition.num_clients:
            raise ConfigError(
                f"partition.num_clients: {config.partition.num_clients}, but the certificate is "
                f"client {client}'s"
            )
        return (
            f"{config.name}: {config.data.name}, {config.partition.num_clients} clients, "
            f"{config.run.rounds} rounds, {config.coarse.training} training"
        )

    def versions(self) -> str:
        wanted, here = self._given(self.report.invitation).software, installed_software()
        if wanted is None:
            raise ConfigError(
                f"{self.settings.invitation}: does not say what the coordinator runs; it makes the "
                "file with fedpdm node invite"
            )
        return _compare(here, wanted, also=self._given(self.report.policy).code)

    def clock(self) -> str:
        times = []
        if self.report.invitation is not None and self.report.invitation.made_at is not None:
            times.append(self.report.invitation.made_at)
        certificate = self.report.certificate
        if certificate is not None:
            times.append(certificate.not_before)
            ledger = ReleaseStore(self.settings.store_of(certificate.client_id)).ledger()
            times += [datetime.datetime.fromisoformat(r.at) for r in ledger.records[-1:]]
        return check_clock(self.now, not_before=max(times, default=None))

    # What is on this machine.

    def classes(self) -> str:
        invitation, certificate = self._given(self.report.invitation), self.report.certificate
        store = None if certificate is None else self.settings.store_of(certificate.client_id)
        try:
            self.report.classes = compare_classes(
                invitation, self.settings.data, given=self.settings.classes, store=store
            )
        except ConfigError:
            self._classes_agree = False
            raise
        except (ValueError, OSError):  # as the next check says
            raise _Missing("not checked, since these failed: data") from None
        if self.report.classes is None:
            return "NOT compared: the invitation names none; each node numbers its own by name"
        return self.report.classes.describe()

    def data(self) -> str:
        invitation = self._given(self.report.invitation)
        self._given(self._classes_agree or None)
        config, policy = invitation.config, self.report.policy or NodePolicy()
        aside = policy.sets_aside(image_metrics=config.evaluation.image_metrics)
        every = load_classes(
            config, "train", root=self.settings.data, classes=self.report.classes, whole=not aside
        )
        first = every.distinct()
        images = every if len(first) == len(every) else every.subset(first)
        values = compare_images(invitation, images)
        channels, height, width = images.images.shape[1:]
        self.report.images = images
        counts = ", ".join(f"{name} {count}" for name, count in self.report.counts().items())
        copies, rest = len(every) - len(images), every.inventory.words()
        return (
            f"{self.settings.data}: {len(images):,} distinct images of {channels}x{height}x{width}"
            f"{f' ({copies:,} copies left out)' if copies else ''}; {counts}; {values}"
            f"{rest and f'; {rest}'}"
        )

    def store(self) -> str:
        client = self._given(self.report.certificate).client_id
        root = self.settings.store_of(client)
        where = check_store(root)
        store = ReleaseStore(root)
        ledger = store.ledger()
        if ledger.client_id not in (None, client):
            raise StoreError(f"{root}: is the store of client {ledger.client_id}, not {client}")
        store.check_traces()
        self.report.store = store
        return f"{where}: writable, {len(ledger.releases())} releases in its ledger"

    def disk(self) -> str:
        self._given(self.report.store)
        root = self.settings.store_of(self._given(self.report.certificate).client_id)
        return _enough(free_disk(root), store_bytes(**self._sizes), what="disk")

    def memory(self) -> str:
        found = _enough(free_memory(), training_bytes(**self._sizes), what="memory")
        return f"{found}, and the activations of a batch"

    @functools.cached_property
    def _sizes(self) -> dict[str, int]:
        """Parameters of the two models, and values in all images."""
        images = self._given(self.report.images)
        return model_sizes(self._setup) | {"values": images.images.size}

    # What joining would mean.

    def coordinator(self) -> str:
        certificate = self._given(self.report.certificate)
        shown = shake_hands(
            self.settings.coordinator,
            authority_pem=certificate.authority_pem,
            timeout=self.timeout,
        )
        days = (shown.not_after - self.now).total_seconds() / 86_400
        through = f" through proxy {shown.proxy}" if shown.proxy else ""
        return (
            f"{self.settings.coordinator}{through}: {shown.tls} handshake, gRPC answers; its "
            f"certificate is for {', '.join(shown.names)}, {days:.0f} days left"
        )

    def bounds(self) -> str:
        policy = self._given(self.report.policy)
        config = self._given(self.report.invitation).config
        check_config(policy, config)
        plan = self._setup.plan
        if plan is None:
            return "nothing is released"
        images = self._given(self.report.images)
        total = check_spending(
            policy, config, plan, self._given(self.report.store), images, client_id=self._client
        )
        channels, height, width = images.images.shape[1:]
        described, size = [], 0
        for each in plan.rounds:
            mechanism = mechanism_of(each)
            described.append(mechanism.describe(each))
            if each is not plan.gradients:
                size += mechanism.num_bytes(each, len(images), (channels, height, width))
        if plan.gradients is not None:  # its rounds are as large as the network
            size += plan.gradients.rounds * (4 * self._sizes["coarse"] + 8)
        sent = f", {size / 1e6:.1f} MB sent" if config.coarse.training == "server" else ""
        few = plan.sample_warning(len(images))
        return (
            f"{'; '.join(described)}{sent}, epsilon {total:.4g} in all at delta {policy.delta:g}: "
            f"within bounds{self._warning(policy.delta)}{f'; WARNING: {few}' if few else ''}"
        )

    def statement(self) -> str:
        policy, store = self._given(self.report.policy), self._given(self.report.store)
        images = self._given(self.report.images)
        config, plan = self._setup.config, self._setup.plan
        if plan is not None:
            statement = node_statement(
                config,
                plan,
                store,
                images,
                client_id=self._client,
                allow_new_release=policy.allow_new_release,
                raw_metrics=policy.allow_raw_metrics and config.evaluation.image_metrics,
            )
            self.report.text = statement_text(statement, self.report.counts())
        else:
            statement = baseline_statement(config) | {
                "images": len(images),
                "client_id": self._client,
            }
            self.report.text = statement["words"] + "\n"
        self.report.statement = statement
        record = acceptance_of(store.ledger(), config)
        self.report.accepted = record is not None
        words = f"epsilon {statement['epsilon']:.4g} at delta {statement['delta']:g} per image"
        warning = self._warning(statement["delta"])
        if record is None:
            return f"{words}, not accepted yet{warning}"
        same = record.fields.get("images_sha256") == images_sha256(images)
        changed = "" if same else f" for {record.fields['images']:,} other images than today's"
        return f"{words}, accepted {record.at} by {record.fields['by']}{changed}{warning}"

    def _warning(self, delta: float) -> str:
        """What follows a line that counts at a delta too large for the images here."""
        found = delta_warning(delta, images=len(self._given(self.report.images)))
        return f"; WARNING: {found}" if found else ""

    @functools.cached_property
    def _setup(self) -> RunSetup:
        config = self._given(self.report.invitation).config
        return set_up(config, self._given(self.report.images))

    @property
    def _client(self) -> int:
        return self._given(self.report.certificate).client_id

    def _given(self, found: T | None) -> T:
        if found is None:
            failed = ", ".join(check.name for check in self.report.checks if not check.ok)
            raise _Missing(f"not checked, since these failed: {failed}")
        return found


def _compare(here: Software, wanted: Software, *, also: tuple[str, ...]) -> str:
    """A line about versions; `ConfigError` for the first that must agree and does not."""
    for name in ("flwr", "fedpdm"):
        ours, theirs = getattr(here, name), getattr(wanted, name)
        if ours != theirs:
            raise ConfigError(f"versions: {name} is {ours} here, {theirs} at the coordinator")
    if here.code != wanted.code and wanted.code not in also:
        raise ConfigError(
            f"versions: the code here has digest {here.code[:16]}..., the coordinator's "
            f"{wanted.code[:16]}...; install the same, or allow it in the policy (code)"
        )
    return f"fedpdm {here.fedpdm}, flwr {here.flwr}, code {here.code[:16]}... as the coordinator's"


def _enough(free: int, needed: int, *, what: str) -> str:
    if free < needed:
        raise ConfigError(f"{what}: needs {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free")
    return f"{free / 1e9:.1f} GB free, needs {needed / 1e9:.2f} GB"
