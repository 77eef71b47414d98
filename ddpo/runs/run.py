"""A run: its config, its store, and what they resolve to."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from ddpo.basics import trust
from ddpo.basics.digests import json_digest
from ddpo.basics.once import once_property
from ddpo.basics.outages import PATIENCE_S
from ddpo.basics.validation import in_one_line
from ddpo.config import (
    ForkConfig,
    NumericsConfig,
    PreferencesConfig,
    RewardConfig,
    RunConfig,
)
from ddpo.config.files import parse_config
from ddpo.config.s3 import S3Options
from ddpo.errors import ConfigError, MissingObject, RewardError, UnreadableData
from ddpo.models.numerics import Numerics
from ddpo.preferences import PairFiles
from ddpo.prompts import Prompt, load_prompts, prompt_set_digest
from ddpo.rewards import Reward, load_reward
from ddpo.runs.pins import Pins
from ddpo.store import keys, runs
from ddpo.store.keys import Partition
from ddpo.store.objects import Store
from ddpo.store.runs import RunRecord

DEFAULT_ROOT = "ddpo-data/store"


class RunHandle(BaseModel, frozen=True):
    """The address of a run at one of its starts: small, and safe to show in a UI."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    root: str
    """The store's address."""
    s3: S3Options | None = None
    """How to connect to its bucket."""
    run_id: str
    """The run's name."""
    start: int | None = None
    """Which start of the run, from 1; its operation settings apply. By default the last."""
    uid: str = ""
    """`Run.uid`: a worker may still remember an earlier run of the same name."""

    def open(self) -> Run:
        """Open the run in a store that is waited for.

        Raises:
            RunNotFound: The store has no such run.
        """
        store = Store.open(self.root, self.s3, PATIENCE_S)
        return open_run(store, self.run_id, start=self.start)


@dataclass(frozen=True)
class Scorer:
    """A reward, and the settings that samples are scored with."""

    config: RewardConfig
    """Name, parameters, and what happens to samples that cannot be scored."""
    reward: Reward
    """The reward."""

    @property
    def reward_id(self) -> str:
        """The reward's id, 'NAME-<digest8>'."""
        return self.reward.identity.reward_id


@dataclass(frozen=True)
class Run:
    """A run, as recorded in a store."""

    store: Store
    """The store."""
    run_id: str
    """The run's name."""
    config: RunConfig
    """Its config: identity and numerics as frozen by the first start, operation as of `start`."""
    numerics: Numerics
    """The settings that the bytes of its results depend on, frozen by the first start."""
    pins: Pins
    """What its prompt set, reward and preference pairs were at the first start."""
    start: int | None = None
    """The number of the start that operates it, from 1; None before the first."""
    uid: str = ""
    """Random: distinguishes the run from others of its name. Empty before the first start."""

    @property
    def reward_id(self) -> str:
        """Id of its reward, 'NAME-<digest8>'; the reward need not be available."""
        return self.pins.reward_id

    @property
    def reward_digest(self) -> str:
        """Digest of the reward's identity at the first start."""
        return self.pins.reward

    @property
    def handle(self) -> RunHandle:
        """The run's address, for tasks."""
        return RunHandle(
            root=self.store.root,
            s3=self.store.s3,
            run_id=self.run_id,
            start=self.start,
            uid=self.uid,
        )

    def patient(self) -> Run:
        """Return the same run in a store that is waited for while it is unavailable."""
        return replace(self, store=self.store.patient(PATIENCE_S))

    @once_property
    def prompts(self) -> tuple[Prompt, ...]:
        """The prompt set.

        Raises:
            NotTrusted: It is code or a file of the run's own, and the run is not trusted here.
            ConfigError: The prompts are no longer those that the run was started with; or as
                `load_prompts`.
        """
        with self.naming():
            prompts = load_prompts(self.config.prompts.name, self.config.prompts.parameters)
        change = self.pins.change_of_prompts(prompt_set_digest(prompts), self.config.prompts.name)
        if change:
            raise ConfigError(f"run {self.run_id!r} was started with other prompts: {change}")
        return prompts

    @once_property
    def pairs(self) -> PairFiles | None:
        """The preference pairs that take the place of its samples; None if it samples.

        Raises:
            NotTrusted: The run is not trusted here.
            ConfigError: They are no longer those that the run was started with; or as `PairFiles`.
        """
        if self.config.preferences is None:
            return None
        with self.naming():
            pairs = pair_files(self.config.preferences)
        change = self.pins.change_of_preferences(pairs.digest, self.config.preferences.path)
        if change:
            raise ConfigError(f"run {self.run_id!r} was started with other pairs: {change}")
        return pairs

    def pairs_digest(self, epoch: int) -> str | None:
        """Return the digest of the preference pairs that an epoch trains on; None for samples.

        It stands for the policy and the sampler that drew them, which are unknown.
        """
        if self.fork and self.fork.inherits(epoch):
            return self.fork.parent.pairs_digest(epoch)
        return self.pins.preferences

    @once_property
    def reward(self) -> Reward:
        """The reward.

        Raises:
            RewardError: It is no longer the one that the run was started with.
            NotTrusted: It is code or an address of the run's own, and the run is not trusted here.
            DdpoError: As `load_reward`.
        """
        with self.naming():
            reward = load_reward(self.config.reward.name, self.config.reward.parameters)
        name = self.config.reward.name
        if change := self.pins.change_of_reward(reward.identity, name):
            raise RewardError(
                f"run {self.run_id!r} was started with the reward {self.reward_id}, but {name!r} "
                f"is another one now: {change}"
            )
        return reward

    @once_property
    def scorer(self) -> Scorer:
        """The reward with its settings.

        Raises:
            DdpoError: As `reward`.
        """
        return Scorer(self.config.reward, self.reward)

    @property
    def identity_digest(self) -> str:
        """sha256 over identity and numerics: what checkpoint 0 is made from."""
        return identity_digest(self.config, self.numerics)

    @property
    def labels(self) -> dict[str, str | int | float | bool]:
        """What distinguishes runs at a glance: a few short settings by name."""
        config = self.config
        return {
            "model": config.model.path,
            "trainable": config.trainable.type,
            **config.trainable.labels,
            "prompts": config.prompts.name,
            "reward": config.reward.name,
            **config.algorithm.labels,
            "learning_rate": config.optimizer.learning_rate,
            "samples_per_epoch": config.rollouts.samples_per_epoch,
            "steps": config.sampler.steps,
            "guidance_scale": config.sampler.guidance_scale,
            "seed": config.seed,
        }

    @property
    def trusted_digest(self) -> str:
        """sha256 over all settings that may name code: the identity, and what is evaluated."""
        evaluation = self.config.evaluation
        if evaluation is None:
            return self.identity_digest
        return json_digest([self.identity_digest, evaluation.model_dump(mode="json")])

    def naming(self, chosen: Iterable[str] = ()) -> AbstractContextManager[None]:
        """Treat code, addresses and files within as named by this run, and not by the user.

        Args:
            chosen: Names of plug-ins that the user chose in place of the run's.
        """
        name = f"run {self.run_id!r} in {self.store.root}"
        return trust.acting_for(name, self.trusted_digest, chosen)

    def trust(self) -> None:
        """Trust the code, addresses and files that this run names, on this machine from now on."""
        trust.trust(self.trusted_digest)
        trust.trust_place(self.config.tracking.uri)
        trust.trust_place(self.config.outputs)

    @once_property
    def fork(self) -> Fork | None:
        """What the run inherits from its parent; None unless it is a fork."""
        return fork_of(self.store, self.config)

    def drawn_by(self, epoch: int) -> Partition:
        """Return the checkpoint that draws an epoch's samples.

        It is the one before the epoch; with `rollouts.sample_ahead` the one before that, except in
        the first epoch.
        """
        if self.config.rollouts.sample_ahead:
            if epoch > self.first_epoch:
                return Partition(self.run_id, epoch - 1)
            if self.fork and self.fork.inherits(epoch):
                return self.fork.drawn_by(epoch)
        return Partition(self.run_id, epoch)

    @property
    def first_epoch(self) -> int:
        """The run's first epoch: 0, unless it is a fork."""
        return self.fork.epoch if self.fork else 0

    @property
    def shards_per_epoch(self) -> int:
        """Number of shards in an epoch."""
        return self.config.rollouts.samples_per_epoch // self.config.rollouts.shard_size


@dataclass(frozen=True)
class Fork:
    """What a run inherits from its parent: a checkpoint, saved samples, prompt statistics."""

    store: Store
    """The store of both runs."""
    config: RunConfig
    """The fork's config."""
    settings: ForkConfig
    """The section `fork` of that config."""

    @once_property
    def parent(self) -> Run:
        """The parent.

        Raises:
            RunNotFound: The store has no such run.
        """
        return open_run(self.store, self.settings.run_id)

    @property
    def parent_id(self) -> str:
        """The parent's name."""
        return self.settings.run_id

    @property
    def epoch(self) -> int:
        """The fork's first epoch; it starts from the parent's checkpoint before that epoch."""
        return self.settings.epoch

    @property
    def inherited_epochs(self) -> range:
        """The epochs whose samples are the parent's."""
        return range(self.epoch, self.epoch + self.settings.rollouts)

    def inherits(self, epoch: int) -> bool:
        """Return whether an epoch trains on samples of the parent."""
        return self.settings.inherits(epoch)

    def is_off_policy(self, epoch: int) -> bool:
        """Return whether an epoch may train on samples of another policy than the checkpoint's."""
        return self.settings.off_policy and self.inherits(epoch)

    def drawn_by(self, epoch: int) -> Partition:
        """Return the parent's checkpoint whose samples an inherited epoch is to be trained on.

        They are on-policy: of the checkpoint before the epoch or, with `rollouts.sample_ahead`, of
        the one that the parent drew them with.
        """
        ahead = self.config.rollouts.sample_ahead
        return self.parent.drawn_by(epoch) if ahead else Partition(self.parent_id, epoch)

    @property
    def rebuilds_statistics(self) -> bool:
        """Whether the fork starts with prompt statistics over the epochs before it."""
        return self.config.algorithm.has_prompt_statistics and self.settings.statistics == "rebuild"

    def epochs_before(self) -> Iterator[tuple[Run, int]]:
        """Yield the run and the number of each epoch that prompt statistics are rebuilt from.

        Those are the epochs behind the fork's checkpoint, in order, back to the first, or to where
        one of the runs reset its statistics.
        """
        parent = self.parent
        if parent.fork and parent.fork.settings.statistics == "rebuild":
            yield from parent.fork.epochs_before()
        for epoch in range(parent.first_epoch, self.epoch):
            yield parent, epoch


def fork_of(store: Store, config: RunConfig) -> Fork | None:
    """Return what a run with this config inherits from its parent; None unless it is a fork."""
    return Fork(store, config, config.fork) if config.fork else None


def pair_files(config: PreferencesConfig) -> PairFiles:
    """Return the preference pairs that a config names.

    Raises:
        DdpoError: As `PairFiles`.
    """
    return PairFiles(
        config.path, prompt=config.prompt, chosen=config.chosen, rejected=config.rejected
    )


def identity_digest(config: RunConfig, numerics: Numerics) -> str:
    """Return the sha256 over the identity and the numerics of a run."""
    return json_digest(
        {"identity": config.identity(), "numerics": numerics.model_dump(mode="json")}
    )


def storage_root(root: str | None) -> str:
    """Return the store's address: the given one, else DDPO_ROOT, else the local default."""
    return root or os.environ.get("DDPO_ROOT") or DEFAULT_ROOT


def open_run(store: Store, run_id: str, *, start: int | None = None) -> Run:
    """Open a run.

    Args:
        store: The store.
        run_id: The run's name.
        start: The start whose operation settings apply, from 1; by default the last.

    Raises:
        RunNotFound: The store has no such run.
        MissingObject: It has no such start.
    """
    record = runs.load_run(store, run_id)
    starts = runs.list_starts(store, run_id)
    start = start or len(starts) or None
    if start and start > len(starts):
        raise MissingObject(keys.start_key(run_id, start), store.root)
    operation = starts[start - 1].operation if start else {}
    return run_of_record(
        store,
        record,
        operation if isinstance(operation, dict) else {},
        start,
        uid=starts[0].uid if starts else "",
    )


def run_of_record(
    store: Store, record: RunRecord, operation: dict[str, Any], start: int | None, *, uid: str
) -> Run:
    """Return a run from its record and the operation settings of a start.

    Args:
        store: The store.
        record: The run's record.
        operation: The operation half of the config.
        start: The number of the start.
        uid: As `Run.uid`.

    Raises:
        UnreadableData: The record holds something else than a run.
        ConfigError: Likewise; the message names the settings.
    """
    key = keys.run_key(record.run_id)
    identity: dict[str, Any] = dict(record.identity)
    try:
        pins = Pins.model_validate(identity.pop("digests", None))
        numerics = Numerics.model_validate(record.numerics)
    except ValidationError as error:
        raise UnreadableData(key, in_one_line(error)) from error
    frozen = numerics.model_dump(include=set(NumericsConfig.model_fields))
    return Run(
        store=store,
        run_id=record.run_id,
        config=parse_config({**identity, **operation, "numerics": frozen}, key),
        numerics=numerics,
        pins=pins,
        start=start,
        uid=uid,
    )
