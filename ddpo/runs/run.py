"""A run: its config, its place in a store, and what they resolve to."""

from __future__ import annotations

import logging
import os
import tempfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, JsonValue

from ddpo.basics.digests import json_digest
from ddpo.basics.version import VERSION
from ddpo.config import NumericsConfig, RunConfig
from ddpo.config.files import parse_config
from ddpo.config.s3 import S3Options
from ddpo.errors import ConfigError, RewardError, RunIdentityMismatch
from ddpo.models import check_model
from ddpo.models.numerics import Numerics, changed_versions, resolve_again, resolve_numerics
from ddpo.prompts import Prompt, load_prompts, prompt_set_digest
from ddpo.rewards import Reward, load_reward
from ddpo.rewards.identity import reward_id_of
from ddpo.store import epochs as commits
from ddpo.store import keys, runs
from ddpo.store.documents import differences
from ddpo.store.keys import Partition
from ddpo.store.kinds import EPOCH, SCORES
from ddpo.store.objects import Store
from ddpo.store.runs import RunRecord
from ddpo.store.upkeep.probe import probe

_logger = logging.getLogger(__name__)

DEFAULT_ROOT = "ddpo-data/store"

_ROOM = 2**20  # a report and the weights of a small adapter


class RunHandle(BaseModel):
    """The address of a run at one of its starts: small, and safe to show in a UI."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    root: str
    """The store's address."""
    s3: S3Options | None = None
    """How to connect to its bucket."""
    run_id: str
    """The run's name."""
    start: int | None = None
    """Which start of the run, from 1; its operation settings apply. By default the last."""
    reward: str | None = None
    """A `RewardConfig` as JSON that stands in for the run's own, when its samples are scored again.
    Text, since a handle is a key of caches."""

    def open(self) -> Run:
        """Open the run.

        Raises:
            RunNotFound: The store has no such run.
        """
        return open_run(Store.open(self.root, self.s3), self.run_id, start=self.start)


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
    """What its bytes depend on, frozen by the first start."""
    pinned_reward: str | None
    """Digest of the reward's identity at the first start; None where another reward stands in for
    the run's own."""
    start: int | None = None
    """The number of the start that operates it, from 1; None before the first."""

    @property
    def handle(self) -> RunHandle:
        """The run's address, for tasks."""
        return RunHandle(
            root=self.store.root, s3=self.store.s3, run_id=self.run_id, start=self.start
        )

    @cached_property
    def prompts(self) -> tuple[Prompt, ...]:
        """The prompt set."""
        return load_prompts(self.config.prompts.name, self.config.prompts.parameters)

    @cached_property
    def reward(self) -> Reward:
        """The reward.

        Raises:
            RewardError: It is no longer the one that the run was started with.
            DdpoError: As `load_reward`.
        """
        reward = load_reward(self.config.reward.name, self.config.reward.parameters)
        found = reward.identity
        if self.pinned_reward not in (None, found.digest):
            raise RewardError(
                f"run {self.run_id!r} was started with a reward of digest {self.pinned_reward}, "
                f"and {self.config.reward.name!r} is now {found.reward_id} of digest "
                f"{found.digest}: its service, its weights or its code were exchanged. Put back "
                "what the run was started with and resume it, or go on under the new reward in a "
                "run of its own (`ddpo fork`)"
            )
        return reward

    @cached_property
    def reward_id(self) -> str:
        """The reward's id, 'NAME-<digest8>'; a pinned one is not loaded for it.

        Raises:
            DdpoError: As `reward`, where none is pinned.
        """
        if self.pinned_reward is None:
            return self.reward.identity.reward_id
        usual = reward_id_of(self.config.reward.name, self.pinned_reward)
        if SCORES.exists(self.store, Partition(self.run_id, self.first_epoch, 0, usual)):
            return usual
        # A served reward has the name that its service tells, and the digest covers the name.
        return commits.reward_of_digest(self.store, self.pinned_reward) or usual

    @property
    def identity_digest(self) -> str:
        """sha256 over the identity and numerics: what checkpoint 0 is made from."""
        return json_digest(
            {"identity": self.config.identity(), "numerics": self.numerics.model_dump(mode="json")}
        )

    @property
    def first_epoch(self) -> int:
        """The run's first epoch: 0, unless it branches off another run."""
        return self.config.fork.epoch if self.config.fork else 0

    @property
    def shards(self) -> int:
        """Shards an epoch."""
        return self.config.rollouts.samples_per_epoch // self.config.rollouts.shard_size


def storage_root(root: str | None) -> str:
    """Return the store's address: what is asked for, else DDPO_ROOT, else a local default."""
    return root or os.environ.get("DDPO_ROOT") or DEFAULT_ROOT


def check_config(config: RunConfig) -> Numerics:
    """Check all that can be checked before a model is loaded.

    Args:
        config: The config.

    Returns:
        The numerics, settled on this machine.

    Raises:
        ConfigError: Unknown prompt set or reward, wrong parameters, absent device.
        ModelError: The model is neither on disk nor reachable.
    """
    load_prompts(config.prompts.name, config.prompts.parameters)
    load_reward(config.reward.name, config.reward.parameters)
    numerics = resolve_numerics(config.numerics)
    check_model(config.model)
    return numerics


def check_run(config: RunConfig, run_id: str) -> tuple[Store, Numerics]:
    """Check that a run can start or go on, before a model is loaded and anything written.

    Args:
        config: The config of this start.
        run_id: The run's name.

    Returns:
        The store, and the numerics: frozen ones if the run exists.

    Raises:
        DdpoError: Something is wrong with the config, the model or the store; or the run exists
            with another identity.
    """
    keys.validate_run_id(run_id)
    _check_folders(config.outputs)
    store = Store.open(storage_root(config.storage.root), config.storage.s3)
    probe(store)
    if not store.exists(keys.run_key(run_id)):
        return store, check_config(config)
    first = config.fork.epoch if config.fork else 0
    committed = first + len(EPOCH.partitions_of(store, run_id))
    if config.epochs < committed:
        raise ConfigError(
            f"epochs is {config.epochs}, and run {run_id!r} has {committed} already; give at least "
            f"as many (--epochs {committed} on resume), or start another run"
        )
    record = runs.load_run(store, run_id)
    frozen = Numerics.model_validate(record.numerics)
    numerics = resolve_again(config.numerics, frozen)
    changed = differences(record.identity, _pinned_identity(config))
    changed += differences(record.numerics, numerics.model_dump(mode="json"), "numerics")
    if changed:
        raise RunIdentityMismatch(run_id, changed)
    check_config(config)
    return store, numerics


def _check_folders(outputs: str) -> None:
    """Check that what a run hands over in the end can be written; after a night it is late."""
    try:
        Path(outputs).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=outputs) as file:
            file.write(bytes(_ROOM))
    except OSError as error:
        raise ConfigError(
            f"the folder for outputs, {outputs}, cannot be written to: {error.strerror}. It gets "
            "the report and the weights; give another with --set outputs=FOLDER"
        ) from error
    try:
        tempfile.gettempdir()
    except OSError as error:
        raise ConfigError(
            f"{error.strerror}: weights are put together in one. Make room there, or name another "
            "with TMPDIR"
        ) from error


def start_run(config: RunConfig, run_id: str) -> Run:
    """Create a run in its store, or go on with the one that is there.

    Args:
        config: The config of this start.
        run_id: The run's name.

    Returns:
        The run, with the numerics that its first start froze.

    Raises:
        DdpoError: As :func:`check_run`.
    """
    store, numerics = check_run(config, run_id)
    record = runs.create_or_check_run(
        store,
        run_id,
        identity=_pinned_identity(config),
        numerics=numerics.model_dump(mode="json"),
        code={"ddpo": VERSION},
    )
    start = runs.append_operation(store, run_id, config.operation())
    if changed := changed_versions(numerics):
        _logger.warning(
            "run %s was started with %s: results from here on may differ by rounding",
            run_id,
            "; ".join(changed),
        )
    return _from_record(store, record, config.operation(), start)


def open_run(store: Store, run_id: str, *, start: int | None = None) -> Run:
    """Open a run.

    Args:
        store: The store.
        run_id: The run's name.
        start: The start whose operation settings apply, from 1; by default the last.

    Raises:
        RunNotFound: The store has no such run.
    """
    record = runs.load_run(store, run_id)
    operations = runs.list_operations(store, run_id)
    start = start or len(operations) or None
    operation = operations[start - 1] if start else {}
    return _from_record(store, record, operation if isinstance(operation, dict) else {}, start)


def _pinned_identity(config: RunConfig) -> dict[str, JsonValue]:
    """Add to the config's identity what its names stand for today."""
    prompts = load_prompts(config.prompts.name, config.prompts.parameters)
    reward = load_reward(config.reward.name, config.reward.parameters)
    digests: JsonValue = {
        "prompts": prompt_set_digest(prompts),
        "reward": reward.identity.digest,
    }
    return {**config.identity(), "digests": digests}


def _from_record(
    store: Store, record: RunRecord, operation: dict[str, Any], start: int | None
) -> Run:
    numerics = Numerics.model_validate(record.numerics)
    identity = {name: value for name, value in record.identity.items() if name != "digests"}
    frozen = numerics.model_dump(include=set(NumericsConfig.model_fields))
    source = str(Path(keys.run_key(record.run_id)))
    config = parse_config({**identity, **operation, "numerics": frozen}, source)
    return Run(store, record.run_id, config, numerics, _pinned_reward(record), start)


def _pinned_reward(record: RunRecord) -> str | None:
    digests = record.identity.get("digests")
    digest = digests.get("reward") if isinstance(digests, dict) else None
    return digest if isinstance(digest, str) else None
