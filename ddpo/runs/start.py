"""Check that a run can start, then start it. No other module creates runs."""

from __future__ import annotations

import logging
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pydantic import JsonValue

from ddpo.basics.version import VERSION
from ddpo.config import RunConfig
from ddpo.errors import ConfigError, RunIdentityMismatch
from ddpo.models import check_model
from ddpo.models.numerics import Numerics, changed_versions, resolve_again, resolve_numerics
from ddpo.prompts import load_prompts, prompt_set_digest
from ddpo.rewards import Reward, load_reward
from ddpo.runs.readback import check_readable
from ddpo.runs.run import Run, run_of_record, storage_root
from ddpo.store import keys, runs
from ddpo.store.documents import differences
from ddpo.store.kinds import EPOCH
from ddpo.store.objects import Store
from ddpo.store.upkeep.probe import probe

_logger = logging.getLogger(__name__)

_ROOM = 2**20  # bytes, for a report and the weights of a small adapter


@dataclass(frozen=True)
class RunPlan:
    """A run that has passed all checks and may be started."""

    store: Store
    """The store."""
    run_id: str
    """The run's name."""
    config: RunConfig
    """The config of this start."""
    numerics: Numerics
    """The numerics: those frozen by the first start, if the run exists."""
    identity: dict[str, JsonValue]
    """The settings and digests that must be the same at every start."""
    reward: Reward
    """The reward, kept so that it is not built again for the run."""

    def __post_init__(self) -> None:
        check_readable(self.store, self.run_id, self.config, self.numerics, self.identity)

    def start(self) -> Run:
        """Create the run, or resume the one in the store.

        Raises:
            RunIdentityMismatch: Another process has just created the run with another config.
        """
        record = runs.create_or_check_run(
            self.store,
            self.run_id,
            identity=self.identity,
            numerics=self.numerics.model_dump(mode="json"),
            code={"ddpo": VERSION},
        )
        operation = self.config.operation()
        number = runs.append_operation(self.store, self.run_id, operation)
        if changed := changed_versions(self.numerics):
            _logger.warning(
                "run %s was started with %s: results from here on may differ by rounding",
                self.run_id,
                "; ".join(changed),
            )
        uid = runs.run_uid(self.store, self.run_id)
        return run_of_record(self.store, record, operation, number, uid=uid)


def start_run(config: RunConfig, run_id: str) -> Run:
    """Create a run in its store, or resume the one that exists.

    Args:
        config: The config of this start.
        run_id: The run's name.

    Returns:
        The run, with the numerics frozen by its first start.

    Raises:
        DdpoError: As `check_run`.
    """
    return check_run(config, run_id).start()


def check_run(config: RunConfig, run_id: str) -> RunPlan:
    """Check that a run can start or be resumed, before a model is loaded or anything is written.

    Args:
        config: The config of this start.
        run_id: The run's name.

    Returns:
        The run, ready to start.

    Raises:
        DdpoError: The config, the model, the store or a folder cannot be used; or the run exists
            with another identity.
    """
    keys.validate_run_id(run_id)
    _check_folders(config.outputs)
    store = Store.open(storage_root(config.storage.root), config.storage.s3)
    probe(store)
    runs.check_not_being_deleted(store, run_id)
    if not store.exists(keys.run_key(run_id)):
        numerics, reward = check_config(config)
        return RunPlan(store, run_id, config, numerics, _identity(config, reward), reward)
    first = config.fork.epoch if config.fork else 0
    committed = first + len(EPOCH.partitions_of(store, run_id))
    if config.epochs < committed:
        raise ConfigError(
            f"epochs is {config.epochs}, but run {run_id!r} has already committed {committed}; "
            f"set at least as many (--epochs {committed} on resume), or start another run"
        )
    record = runs.load_run(store, run_id)
    frozen = Numerics.model_validate(record.numerics)
    numerics = resolve_again(config.numerics, frozen)
    reward = load_reward(config.reward.name, config.reward.parameters)
    identity = _identity(config, reward)
    changed = differences(record.identity, identity)
    changed += differences(record.numerics, numerics.model_dump(mode="json"), "numerics")
    if changed:
        raise RunIdentityMismatch(run_id, changed)
    check_config(config)
    return RunPlan(store, run_id, config, numerics, identity, reward)


def check_config(config: RunConfig) -> tuple[Numerics, Reward]:
    """Check all that can be checked before a model is loaded.

    Args:
        config: The config.

    Returns:
        The numerics, resolved on this machine, and the reward.

    Raises:
        ConfigError: Unknown prompt set or reward, wrong parameters, missing device.
        ModelError: The model is neither on disk nor downloadable.
    """
    load_prompts(config.prompts.name, config.prompts.parameters)
    reward = load_reward(config.reward.name, config.reward.parameters)
    numerics = resolve_numerics(config.numerics)
    check_model(config.model)
    return numerics, reward


def _check_folders(outputs: str) -> None:
    """Check up front that the output folder is writable, so no run fails after hours of work."""
    try:
        Path(outputs).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=outputs) as file:
            file.write(bytes(_ROOM))
    except OSError as error:
        raise ConfigError(
            f"cannot write to the output folder {outputs}: {error.strerror}. It receives the "
            "report and the weights; choose another with --set outputs=FOLDER"
        ) from error
    try:
        tempfile.gettempdir()
    except OSError as error:
        raise ConfigError(
            f"{error.strerror}: weights are assembled in one. Free some space there, or choose "
            "another with TMPDIR"
        ) from error


def _identity(config: RunConfig, reward: Reward) -> dict[str, JsonValue]:
    """Return the config's identity, with digests of what its names refer to today."""
    prompts = load_prompts(config.prompts.name, config.prompts.parameters)
    digests: JsonValue = {
        "prompts": prompt_set_digest(prompts),
        "reward": reward.identity.digest,
        "reward_id": reward.identity.reward_id,
    }
    return {**config.identity(), "digests": digests}
