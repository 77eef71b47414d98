"""Check that a run can start, then start it. No other module creates runs."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING

from pydantic import JsonValue

from ddpo.basics.outages import PATIENCE_S
from ddpo.basics.paths import expand
from ddpo.basics.trust import check_place
from ddpo.basics.version import VERSION
from ddpo.config import EvaluationConfig, RunConfig
from ddpo.config.model import size_of
from ddpo.errors import ConfigError, RunIdentityMismatch
from ddpo.models import check_family, check_model, load_policy
from ddpo.models.numerics import Numerics, changes_since, resolve_again, resolve_numerics
from ddpo.prompts import load_prompts
from ddpo.rewards import Reward, load_reward
from ddpo.rewards.trial import try_out
from ddpo.runs.forks.checks import check_fork, check_policy
from ddpo.runs.pins import Pins
from ddpo.runs.readback import check_readable
from ddpo.runs.run import (
    Fork,
    Run,
    fork_of,
    identity_digest,
    open_run,
    pair_files,
    run_of_record,
    storage_root,
)
from ddpo.store import keys, runs
from ddpo.store.documents import differences
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT, EPOCH, EVALUATION_SHARD
from ddpo.store.objects import Store
from ddpo.store.upkeep.probe import probe

if TYPE_CHECKING:
    from ddpo.models import ModelFacts, Policy
    from ddpo.runs.batch_search import BatchSearch, BatchSizes

_logger = logging.getLogger(__name__)

_ROOM = 2**20  # bytes, for a report and the weights of a small adapter


@dataclass(frozen=True)
class RunPlan:
    """A run that has passed all checks and may be started."""

    store: Store
    """The store, which is waited for."""
    run_id: str
    """The run's name."""
    config: RunConfig
    """The config of this start."""
    numerics: Numerics
    """The numerics: those frozen by the first start, if the run exists. Until `sized`, a new run's
    batches that are `auto` are the smallest."""
    identity: dict[str, JsonValue]
    """The settings and digests that must be the same at every start."""
    reward: Reward
    """The reward, kept so that it is not built again for the run."""
    awaits_parent: bool = False
    """Whether a fork's parent has not run yet; what is inherited is then checked by `start`."""
    awaits_sizes: bool = False
    """Whether it is a new run with batch sizes that are still to be found (`auto`)."""
    batch_sizes: BatchSizes | None = None
    """The batch sizes that were found for this start, if they were."""
    begun: Event = field(default_factory=Event, compare=False)
    """Set once the run and a start of it are in the store, so that it can be resumed."""

    def __post_init__(self) -> None:
        check_readable(self.store, self.run_id, self.config, self.numerics, self.identity)

    @property
    def identity_digest(self) -> str:
        """The `identity_digest` of the run."""
        return identity_digest(self.config, self.numerics)

    @property
    def fork(self) -> Fork | None:
        """What the run inherits from its parent; None unless it is a fork."""
        return fork_of(self.store, self.config)

    @property
    def has_checkpoint(self) -> bool:
        """Whether the run has its first checkpoint, made by an earlier start."""
        first = self.config.fork.epoch if self.config.fork else 0
        return CHECKPOINT.exists(self.store, Partition(self.run_id, first))

    def check_model(self, policy: Policy) -> None:
        """Check what only the run's loaded model can tell.

        Args:
            policy: The model.

        Raises:
            PolicyMismatch: A fork's base model or sampler is not that of the saved rollouts.
        """
        if self.fork and not self.awaits_parent:
            check_policy(self.fork, policy)

    def sized(self, search: BatchSearch) -> RunPlan:
        """Return the plan with the batch sizes that are `auto` found by measuring.

        Args:
            search: Of the run's model.
        """
        if not self.awaits_sizes:
            return self
        found = search.sizes(self.config)
        compiled = self.config.numerics.compile
        numerics = self.numerics.batched(found.sample, found.micro, compiled=compiled)
        return replace(self, numerics=numerics, awaits_sizes=False, batch_sizes=found)

    def start(self) -> Run:
        """Create the run, or resume the one in the store; this machine trusts it from now on.

        Its batch sizes are known by now; see `sized`.

        Raises:
            RunIdentityMismatch: Another process has just created the run with another config.
            RunBeingDeleted: The run's deletion has begun since it was checked.
            DdpoError: As `check_fork`, if the parent had yet to run.
        """
        assert not self.awaits_sizes
        if self.fork and self.awaits_parent and not self.has_checkpoint:
            check_fork(self.fork)
        record = runs.create_or_check_run(
            self.store,
            self.run_id,
            identity=self.identity,
            numerics=self.numerics.model_dump(mode="json"),
            code={"ddpo": VERSION},
        )
        # After the run's record: a deletion that has not seen it is seen here.
        runs.check_not_being_deleted(self.store, self.run_id)
        operation = self.config.operation()
        number = runs.append_operation(self.store, self.run_id, operation)
        self.begun.set()
        if changed := changes_since(self.numerics):
            _logger.warning(
                "run %s was started with %s: results from here on may differ by rounding",
                self.run_id,
                "; ".join(changed),
            )
        uid = runs.run_uid(self.store, self.run_id)
        run = run_of_record(self.store, record, operation, number, uid=uid)
        run.trust()
        return run


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
    plan = check_run(config, run_id)
    if plan.awaits_sizes:
        from ddpo.runs.batch_search import BatchSearch

        policy = load_policy(config.model, config.trainable, plan.numerics, seed=config.seed)
        plan = plan.sized(BatchSearch(policy))
    return plan.start()


def check_run(
    config: RunConfig,
    run_id: str,
    *,
    awaits_parent: bool = False,
    before_models: Callable[[], None] = lambda: None,
) -> RunPlan:
    """Check that a run can start or be resumed, before a model is loaded or anything is written.

    Args:
        config: The config of this start.
        run_id: The run's name.
        awaits_parent: Whether a fork's parent has not run yet.
        before_models: Called when all is checked that can be without the libraries of models, which
            take seconds to import.

    Returns:
        The run, ready to start.

    Raises:
        DdpoError: The config, the model, the store, a folder or a fork's parent cannot be used; or
            the run exists with another identity.
    """
    keys.validate_run_id(run_id)
    _check_folders(config.outputs)
    store = Store.open(storage_root(config.storage.root), config.storage.s3)
    probe(store)
    runs.check_not_being_deleted(store, run_id)
    check_family(config.model)  # before the prompts, which may take seconds
    reward = load_reward(config.reward.name, config.reward.parameters)
    if config.evaluation:
        check_evaluation(config.evaluation, reward)
    identity = _identity(config, reward)
    before_models()
    check_denoising(config)
    exists = store.exists(keys.run_key(run_id))
    awaits_sizes = not exists and config.numerics.searches
    if exists:
        numerics = _check_stored(store, run_id, config, identity, reward)
        _check_kernels(config, numerics)
    else:
        # Sizes are measured without compiling, which takes longer than the search.
        compiles = config.numerics.compile and not awaits_sizes
        numerics = resolve_numerics(config.smallest_batches.changed(compile=compiles))
        fork = fork_of(store, config)
        if fork and not awaits_parent:
            check_fork(fork)
        _check_kernels(config, numerics)
        prompts = load_prompts(config.prompts.name, config.prompts.parameters)
        try_out(reward, prompts, config.model.size)
        _warn_of_memory(config, numerics, len(prompts))
    patient = store.patient(PATIENCE_S)
    plan = RunPlan(
        *(patient, run_id, config, numerics, identity, reward, awaits_parent, awaits_sizes)
    )
    if store.exists(keys.start_key(run_id, 1)):
        plan.begun.set()
    return plan


def _check_kernels(config: RunConfig, numerics: Numerics) -> None:
    """Check that what computes otherwise than plain torch works on the device."""
    if config.optimizer.eight_bit:
        from ddpo.training.eight_bit import check_eight_bit  # imports torch

        check_eight_bit(numerics.device)
    if config.numerics.compile:
        from ddpo.models.compiled import check_compiler  # likewise

        check_compiler(numerics.device)


def _warn_of_memory(config: RunConfig, numerics: Numerics, prompts: int) -> None:
    """Log a warning if a GPU seems to have too little free memory for a run that computes here."""
    if numerics.device != "cuda" or config.engine.type != "local":
        return
    from ddpo.memory.advice import check_fit, free_memory

    try:
        fit = check_fit(config, numerics, free_memory(numerics), prompts=prompts)
    except Exception as error:  # an estimate that fails is no reason not to run
        _logger.info("memory was not estimated: %s: %s", type(error).__name__, error)
        return
    if not fit.fits:
        _logger.warning("memory: %s", fit.message)


def check_denoising(config: RunConfig) -> ModelFacts:
    """Check that a model can be trained with a config's sampler, without loading it.

    Args:
        config: Model, trained weights and sampler.

    Returns:
        What the files say of the model.

    Raises:
        ConfigError: The model's noise schedule has fewer steps than the sampler, or the window of
            steps contains none to train on; or as `check_model`.
        ModelError: As `check_model`.
    """
    facts = check_model(config.model, config.trainable)
    # These import torch: once the model is there.
    from ddpo.diffusion.window import check_sampler, check_steps
    from ddpo.models.facts import resized

    check_sampler(facts.schedule, config)
    if config.evaluation:
        try:
            check_steps(facts.schedule, config.evaluation.sampler_of(config.sampler))
            size = size_of(config.evaluation.resolution)
            resized(facts.size, facts.latent_shape, size or facts.size, facts.schedule.patch)
        except ConfigError as error:
            raise ConfigError(f"evaluation: {error}") from None
    return facts


def _check_same_evaluation(store: Store, run_id: str, now: EvaluationConfig | None) -> None:
    """Reject evaluations of a run that differ from those of its earlier checkpoints."""
    starts = runs.list_operations(store, run_id)
    sections = [start.get("evaluation") for start in starts if isinstance(start, dict)]
    before = next((section for section in reversed(sections) if section), None)
    if before is None or now is None:
        return
    if EvaluationConfig.model_validate(before).changed(every=now.every, gate=now.gate) == now:
        return
    if EVALUATION_SHARD.partitions_of(store, run_id):
        raise ConfigError(
            f"run {run_id!r} has already evaluated checkpoints with other settings (`evaluation`), "
            "and one curve cannot show both. Keep those, or use `ddpo evaluate` to evaluate the "
            "checkpoints with the new ones"
        )


def check_evaluation(config: EvaluationConfig, own: Reward) -> None:
    """Check that an evaluation's prompts and rewards can be loaded.

    Args:
        config: The evaluation.
        own: The run's own reward.

    Raises:
        ConfigError: One cannot; or a judge is listed twice, or is the run's own reward.
        DdpoError: As `load_reward`.
    """
    if config.prompts:
        load_prompts(config.prompts.name, config.prompts.parameters)
    ids = [own.identity.reward_id]
    for judge in config.rewards:
        ids.append(load_reward(judge.name, judge.parameters).identity.reward_id)
        if ids[-1] in ids[:-1]:
            raise ConfigError(
                f"evaluation.rewards: {judge.name!r} is listed twice, or is the run's own reward, "
                "which always scores the images"
            )


def _check_stored(
    store: Store,
    run_id: str,
    config: RunConfig,
    identity: Mapping[str, JsonValue],
    reward: Reward,
) -> Numerics:
    """Refuse to resume a run with another config; return the numerics that it is resumed with."""
    first = config.fork.epoch if config.fork else 0
    committed = first + len(EPOCH.partitions_of(store, run_id))
    if config.epochs < committed:
        raise ConfigError(
            f"epochs is {config.epochs}, but run {run_id!r} has already committed {committed}; "
            f"set at least as many (--epochs {committed} on resume), or start another run"
        )
    stored = open_run(store, run_id)
    numerics = resolve_again(config.numerics, stored.numerics)
    frozen = stored.numerics.model_dump(mode="json")
    wanted = Pins.model_validate(identity["digests"])
    _check_same_evaluation(store, run_id, config.evaluation)
    reasons = (
        stored.pins.change_of_prompts(wanted.prompts, config.prompts.name),
        stored.pins.change_of_reward(reward.identity, config.reward.name),
        config.preferences
        and stored.pins.change_of_preferences(wanted.preferences, config.preferences.path),
    )
    changed = [
        *differences(stored.config.identity(), config.identity()),
        *differences(frozen, numerics.model_dump(mode="json"), "numerics"),
        *(reason for reason in reasons if reason),
    ]
    if changed:
        raise RunIdentityMismatch(run_id, changed)
    return numerics


def _check_folders(outputs: str) -> None:
    """Check up front that the output folder is writable, so no run fails after hours of work."""
    folder = Path(expand(outputs))
    check_place(f"its report and weights go to {outputs}", outputs, folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_ROOM))
    except OSError as error:
        raise ConfigError(
            f"cannot write to the output folder {folder}: {error.strerror}. It receives the "
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
    pairs = pair_files(config.preferences) if config.preferences else None
    pins = Pins.of(prompts, reward, pairs)
    return {**config.identity(), "digests": pins.model_dump(mode="json")}
