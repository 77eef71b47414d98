"""Requests of a user, as the command line and Prefect's forms fill them in.

A request is resolved once: its files are read and everything is checked before a run's name is
taken or anything is written. Heavy libraries are imported by then, so that a misspelt setting is
reported at once.
"""

from __future__ import annotations

import secrets
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from ddpo.analysis.comparison.plan import Comparison
    from ddpo.config import EvaluationConfig, RewardConfig, RunConfig
    from ddpo.runs import Run, RunPlan
    from ddpo.store.objects import Store

Plan = TypeVar("Plan")

_resolved: ContextVar[tuple[Request[Any], Any] | None] = ContextVar("resolved", default=None)
_beside_imports: ContextVar[Callable[[], None] | None] = ContextVar("beside", default=None)


class Request(BaseModel, Generic[Plan]):
    """What a user asks for. Its fields are the arguments of the flow that does it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @abstractmethod
    def resolve(self) -> Plan:
        """Read and check everything that the request names.

        Raises:
            DdpoError: It cannot be done; nothing was written.
        """

    @contextmanager
    def resolved(self, beside_imports: Callable[[], None] | None = None) -> Iterator[Plan]:
        """Resolve the request ahead of a flow with the same arguments, called in this context.

        Args:
            beside_imports: Begins what may go on while the libraries of models are imported; called
                once all is checked that needs none of them.
        """
        begun = _beside_imports.set(beside_imports)
        try:
            plan = self.resolve()
        finally:
            _beside_imports.reset(begun)
        token = _resolved.set((self, plan))
        try:
            yield plan
        finally:
            _resolved.reset(token)

    def plan(self) -> Plan:
        """Return what the request resolves to; the caller of the flow may have resolved it."""
        ahead = _resolved.get()
        return ahead[1] if ahead is not None and ahead[0] == self else self.resolve()


class TrainRequest(Request["RunPlan"]):
    """Start a run, or resume the one of that name."""

    config_file: str
    """A YAML file."""
    run_id: str
    """The run's name."""
    epochs: int | None = None
    """Number of epochs."""
    seed: int | None = None
    """The seed of everything random."""
    learning_rate: float | None = None
    """Learning rate of AdamW."""
    storage: str | None = None
    """The store."""
    tracking: str | None = None
    """MLflow's tracking URI."""
    overrides: tuple[str, ...] = ()
    """Any other setting, as ``sampler.steps=20``."""

    def resolve(self) -> RunPlan:
        """Read the config and check that the run can start."""
        from ddpo.config.files import read_config

        fields = {
            "epochs": self.epochs,
            "seed": self.seed,
            "optimizer.learning_rate": self.learning_rate,
            "storage.root": self.storage,
            "tracking.uri": self.tracking,
        }
        return _check_start(read_config(self.config_file, self.overrides, fields), self.run_id)


class ResumeRequest(Request["RunPlan"]):
    """Resume a run with the settings of its last start."""

    run_id: str
    """The run's name."""
    storage: str | None = None
    """The store."""
    epochs: int | None = None
    """Total number of epochs; by default as before."""
    trust: bool = False
    """Allow the code, addresses and files that the run names."""

    def resolve(self) -> RunPlan:
        """Open the run and check that it can be resumed."""
        from ddpo.config.files import parse_config
        from ddpo.errors import RunNotStarted
        from ddpo.runs import storage_root

        root = storage_root(self.storage)
        run = _opened(root, self.run_id, trust=self.trust)
        if run.start is None:
            raise RunNotStarted(run.run_id, run.store.root)
        raw: dict[str, Any] = run.config.whole()
        # As it is reached now; the address that an earlier start was given may be outdated.
        raw["storage"] |= {"root": root, "s3": {}}
        if self.epochs is not None:
            raw["epochs"] = self.epochs
        with run.naming():
            return _check_start(parse_config(raw, f"run {self.run_id}"), self.run_id)


class ForkRequest(Request["RunPlan"]):
    """Start a run from another one's checkpoint and saved samples."""

    run_id: str
    """The parent."""
    epoch: int
    """The fork's first epoch."""
    reward: str | None = None
    """Name of the new reward; by default the parent's reward."""
    parameters: Mapping[str, Any] | None = None
    """Parameters of the new reward."""
    fork_id: str | None = None
    """The fork's name."""
    epochs: int | None = None
    """Total number of epochs, including those before the fork."""
    statistics: Literal["rebuild", "reset"] = "rebuild"
    """Prompt statistics to start with."""
    overrides: tuple[str, ...] = ()
    """Any other setting, as ``optimizer.learning_rate=1e-4``."""
    storage: str | None = None
    """The store."""
    trust: bool = False
    """Allow the code, addresses and files that the parent names."""

    def resolve(self) -> RunPlan:
        """Plan the fork and check all that it inherits."""
        from ddpo.runs import storage_root
        from ddpo.runs.forks.plan import fork_config, fork_name

        parent = _opened(storage_root(self.storage), self.run_id, trust=self.trust)
        config = fork_config(
            parent,
            self.epoch,
            reward=self.reward,
            parameters=self.parameters,
            epochs=self.epochs,
            statistics=self.statistics,
            overrides=self.overrides,
        )
        with parent.naming(chosen=() if self.reward is None else (self.reward,)):
            return _check_start(config, self.fork_id or fork_name(parent, config))


@dataclass(frozen=True)
class Rescoring:
    """A run whose samples are about to be scored with another reward."""

    run: Run
    """The run."""
    reward: RewardConfig
    """The reward."""
    reward_id: str
    """The reward's id."""
    epochs: list[int]
    """The epochs to score."""


class RescoreRequest(Request[Rescoring]):
    """Score a run's saved samples with another reward."""

    run_id: str
    """The run's name."""
    reward: str
    """Name of the reward."""
    parameters: Mapping[str, Any] | None = None
    """Parameters of the reward."""
    epochs: str | None = None
    """The epochs: one, or a range ``a:b`` that excludes b; by default all."""
    storage: str | None = None
    """The store."""
    tracking: str | None = None
    """MLflow's tracking URI; by default the run's."""
    trust: bool = False
    """Allow the MLflow server that the run names."""

    def resolve(self) -> Rescoring:
        """Load the reward and find the samples."""
        from ddpo.config.files import parse_reward
        from ddpo.errors import ConfigError
        from ddpo.runs import storage_root

        run = _opened(storage_root(self.storage), self.run_id, trust=self.trust)
        epochs = rescorable_epochs(run, self.epochs)
        reward = parse_reward(
            {
                **dict(run.config.reward),
                "name": self.reward,
                "parameters": dict(self.parameters or {}),
            },
            f"reward {self.reward!r}",
        )
        try:
            run.config.algorithm.check_reward(normalises_by_group=reward.normalises_by_group)
        except ValueError as error:
            raise ConfigError(f"reward {self.reward!r}: {error}") from None

        _before_models()
        from ddpo_workflow.tasks.tracking.connection import connect  # imports MLflow
        from ddpo_workflow.tasks.worker import scorer_of

        reward_id = scorer_of(run, reward).reward_id
        if reward_id == run.reward_id:
            raise ConfigError(
                f"{reward_id} is the run's own reward, whose scores its samples already have"
            )
        if self.tracking:
            connect(self.tracking)
        else:
            with run.naming():
                connect(run.config.tracking.uri)
        return Rescoring(run.patient(), reward, reward_id, epochs)


@dataclass(frozen=True)
class EvaluationPlan:
    """A run whose checkpoints are about to be evaluated."""

    run: Run
    """The run."""
    config: EvaluationConfig
    """What the checkpoints are evaluated on."""
    epochs: list[int]
    """The checkpoints, the run's first one first if it is kept: the others are compared with it."""


class EvaluateRequest(Request[EvaluationPlan]):
    """Evaluate a run's checkpoints."""

    run_id: str
    """The run's name."""
    epochs: str | None = None
    """The checkpoints: one, or a range ``a:b`` that excludes b; by default all that are kept."""
    rewards: tuple[str, ...] = ()
    """Names of other rewards to score the images with."""
    overrides: tuple[str, ...] = ()
    """Settings of the evaluation, as ``evaluation.count=32``."""
    storage: str | None = None
    """The store."""
    trust: bool = False
    """Allow the code, addresses and files that the run names."""

    def resolve(self) -> EvaluationPlan:
        """Find the checkpoints, and load the prompts and all rewards."""
        from ddpo.config import EvaluationConfig
        from ddpo.config.files import parse_config
        from ddpo.config.overrides import apply_overrides
        from ddpo.errors import ConfigError
        from ddpo.runs import storage_root

        run = _opened(storage_root(self.storage), self.run_id, trust=self.trust)
        raw: dict[str, Any] = run.config.whole()
        part = raw.setdefault("evaluation", EvaluationConfig().model_dump(mode="json"))
        part["rewards"] = [*part.get("rewards", ()), *({"name": name} for name in self.rewards)]
        if strange := [item for item in self.overrides if not item.startswith("evaluation.")]:
            raise ConfigError(
                f"{strange[0]!r} is not a setting of the evaluation; expected, for example, "
                "evaluation.count=32"
            )
        apply_overrides(raw, self.overrides)
        config = parse_config(raw, f"the evaluation of run {self.run_id}").evaluation
        assert config is not None

        _before_models()
        from ddpo.analysis.evaluation.plan import evaluation_set, kept_checkpoints
        from ddpo.runs.start import check_evaluation
        from ddpo_workflow.tasks.tracking.connection import connect  # imports MLflow

        epochs = kept_checkpoints(run, self.epochs)
        with run.naming(chosen=self.rewards):
            evaluation_set(run, config)
            check_evaluation(config, run.reward)
            connect(run.config.tracking.uri)
        return EvaluationPlan(run.patient(), config, epochs)


@dataclass(frozen=True)
class ComparisonPlan:
    """A comparison whose runs have passed all checks."""

    comparison: Comparison
    """The comparison."""
    runs: Mapping[str, RunPlan]
    """Its runs by name, ready to start."""

    @property
    def store(self) -> Store:
        """The store of the runs, which is waited for."""
        return self.runs[self.comparison.members[0].run_id].store

    @property
    def epochs(self) -> int:
        """Number of epochs of all runs together."""
        return sum(member.config.epochs for member in self.comparison.members)


class CompareRequest(Request[ComparisonPlan]):
    """Train a model by several algorithms and compare the results."""

    config_file: str
    """A YAML file with `base`, `variants` and `seeds`."""
    name: str | None = None
    """The comparison's name; by default the file's."""
    storage: str | None = None
    """The store."""
    tracking: str | None = None
    """MLflow's tracking URI."""
    overrides: tuple[str, ...] = ()
    """Any setting of the base, as ``sampler.steps=20``."""

    def resolve(self) -> ComparisonPlan:
        """Read the comparison and check that each of its runs can start."""
        from ddpo.analysis.comparison.plan import read_comparison

        fields = {"storage.root": self.storage, "tracking.uri": self.tracking}
        return check_comparison(
            read_comparison(self.config_file, self.name, self.overrides, fields)
        )


def new_run_id(config_file: str) -> str:
    """Return a new run's name, made of its config's name, the time, and a random part.

    Jobs of an array start in the same second.
    """
    return f"{run_name_stem(config_file)}-{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"


def run_name_stem(config_file: str) -> str:
    """Return what the names of a config's runs start with."""
    return Path(config_file).stem.replace("_", "-")


def check_comparison(comparison: Comparison) -> ComparisonPlan:
    """Check that all runs of a comparison can start or be resumed, before one of them does.

    Args:
        comparison: The comparison.

    Raises:
        ConfigError: One of the runs exists with other settings.
        RunBeingTrained: Another process trains one of them.
        DdpoError: One of the runs cannot start, or MLflow cannot be reached.
    """
    from ddpo.errors import ConfigError, RunIdentityMismatch
    from ddpo.runs import check_run

    plans: dict[str, RunPlan] = {}
    for member in comparison.members:
        try:
            plans[member.run_id] = check_run(
                member.config,
                member.run_id,
                awaits_parent=member.config.fork is not None,
                before_models=_before_models,
            )
        except RunIdentityMismatch as error:
            shared = member is comparison.shared[member.seed]
            which = "the run with its shared samples" if shared else "its run"
            lines = "".join(f"\n  {difference}" for difference in error.differences)
            raise ConfigError(
                f"comparison {comparison.name!r} exists, and {which}, {member.run_id!r}, has other "
                f"settings:{lines}\nExisting runs stay as they are: give the changed comparison "
                "another name (--name), or undo the change"
            ) from error
    _check_surroundings(list(plans.values()))
    return ComparisonPlan(comparison, plans)


def rescorable_epochs(run: Run, words: str | None) -> list[int]:
    """Return the requested epochs of a run that are committed and whose samples are kept, in order.

    Args:
        run: The run.
        words: One epoch, or a range ``a:b`` that excludes b; by default all.

    Raises:
        ConfigError: The words are neither; or retention deleted all of these samples.
        NotInHistory: None of the epochs is committed.
    """
    from ddpo.analysis.history import History
    from ddpo.errors import ConfigError
    from ddpo.store import keys

    kept = [
        epoch
        for epoch in History(run).epochs_within(words)
        if not run.store.exists(keys.retired_key("samples", run.run_id, epoch))
    ]
    if not kept:
        raise ConfigError(
            f"run {run.run_id!r} has no saved samples{f' of epochs {words}' if words else ''}: "
            "retention deleted them (storage.retention)"
        )
    return kept


def _opened(root: str, run_id: str, *, trust: bool) -> Run:
    """Open a stored run, and trust it from now on if the user says so."""
    from ddpo.runs import open_run
    from ddpo.store.objects import Store

    run = open_run(Store.open(root), run_id)
    if trust:
        run.trust()
    return run


def _check_start(config: RunConfig, run_id: str) -> RunPlan:
    """Check that a run can start: every way of starting one by itself comes through here."""
    from ddpo.analysis.comparison.plan import check_not_shared
    from ddpo.runs import check_run

    plan = check_run(config, run_id, before_models=_before_models)
    check_not_shared(plan.store, plan.run_id)
    _check_surroundings([plan])
    return plan


def _check_surroundings(plans: Sequence[RunPlan]) -> None:
    """Check each run's engine, GPUs and lease, MLflow, and their model, which is loaded last."""
    from ddpo.runs.lease import wait_until_free
    from ddpo_workflow.tasks.engines import check_engine, check_gpus
    from ddpo_workflow.tasks.tracking.connection import connect
    from ddpo_workflow.tasks.worker import check_model

    for plan in plans:
        check_engine(plan.config.engine, plan.numerics.device)
        check_gpus(plan.config.engine, plan.numerics.device)
        wait_until_free(plan.store, plan.run_id)
    connect(plans[0].config.tracking.uri)
    check_model(plans)


def _before_models() -> None:
    """Say that the libraries of models are imported next: all that needs none is checked."""
    if begin := _beside_imports.get():
        begin()
