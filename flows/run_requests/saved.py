"""Requests on what a run has saved: its samples scored anew, its checkpoints evaluated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ddpo_workflow.flows.run_requests.base import Request, before_models, opened

if TYPE_CHECKING:
    from ddpo.config import EvaluationConfig, RewardConfig
    from ddpo.runs import Run


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

        run = opened(storage_root(self.storage), self.run_id, trust=self.trust)
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

        before_models()
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

        run = opened(storage_root(self.storage), self.run_id, trust=self.trust)
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

        before_models()
        from ddpo.analysis.evaluation.plan import evaluation_set, kept_checkpoints
        from ddpo.runs.start import check_evaluation
        from ddpo_workflow.tasks.tracking.connection import connect  # imports MLflow

        epochs = kept_checkpoints(run, self.epochs)
        with run.naming(chosen=self.rewards):
            evaluation_set(run, config)
            check_evaluation(config, run.reward)
            connect(run.config.tracking.uri)
        return EvaluationPlan(run.patient(), config, epochs)


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
