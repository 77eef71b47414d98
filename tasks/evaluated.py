"""What is committed of a run's evaluations, read back by tasks and flows."""

from __future__ import annotations

from contextlib import suppress
from functools import lru_cache

from ddpo.analysis.evaluation.alarms import CLIPPED, CONSTANT, alarms, constant_share
from ddpo.analysis.evaluation.champion import Candidate
from ddpo.analysis.evaluation.plan import Evaluated, EvaluationSet, evaluation_set
from ddpo.analysis.evaluation.summary import reward_labels
from ddpo.basics.digests import json_digest
from ddpo.config import EvaluationConfig
from ddpo.errors import MissingObject, RetiredObject
from ddpo.runs import Run
from ddpo.store.artefacts import Evaluation
from ddpo.store.keys import Partition
from ddpo.store.kinds import ADVANTAGES, CHECKPOINT, EPOCH, EVALUATION, ROLLOUTS
from ddpo.store.manifests import Ref
from ddpo.store.upkeep.retention import is_retired
from ddpo_workflow.tasks.worker import RunHandle, opened, scorer_of


def summary_id(run: Run, config: EvaluationConfig, images: EvaluationSet) -> str:
    """Return an evaluation's name in keys: of its images, and of the rewards that judge them."""
    return json_digest([images.set_id, _reward_ids(run, config)])[:8]


def labels_of(run: Run, config: EvaluationConfig) -> list[str]:
    """Return the labels of an evaluation's rewards in its summary, the run's own reward first."""
    names = [run.config.reward.name, *(reward.name for reward in config.rewards)]
    return reward_labels(names, _reward_ids(run, config))


def evaluated_epochs(run: Run, config: EvaluationConfig, weights: Evaluated) -> list[int]:
    """Return the checkpoints whose evaluation with these weights is committed, in order."""
    name = _name(run, config, weights)
    found = {
        w.epoch for w in EVALUATION.partitions_of(run.store, run.run_id) if w.images_id == name
    }
    if _find(run, config, run.first_epoch, weights):
        found.add(run.first_epoch)  # by its trained weights, if the average equals them
    return sorted(found)


def completely_evaluated(run: Run, config: EvaluationConfig) -> set[int]:
    """Return the checkpoints of which all sets of weights are evaluated."""
    found, shown = (
        set(evaluated_epochs(run, config, weights)) for weights in ("trained", shown_weights(run))
    )
    return found & shown


def is_evaluated(run: Run, config: EvaluationConfig, epoch: int) -> bool:
    """Return whether the evaluation of a checkpoint's trained weights is committed."""
    return _find(run, config, epoch, "trained") is not None


def evaluation_ref(
    run: Run, config: EvaluationConfig, epoch: int, weights: Evaluated = "trained"
) -> Ref[Evaluation]:
    """Return the evaluation of a checkpoint.

    Raises:
        MissingObject: The checkpoint is not evaluated.
    """
    where = _where(run, config, epoch, weights)
    found = EVALUATION.find(run.store, where)
    if found is None:
        raise MissingObject(EVALUATION.key(where), run.store.root)
    return found


def metrics_of(
    run: Run, config: EvaluationConfig, epoch: int, weights: Evaluated = "trained"
) -> dict[str, float]:
    """Return the committed summary of a checkpoint.

    Raises:
        MissingObject: The checkpoint is not evaluated.
    """
    return EVALUATION.require(run.store, _where(run, config, epoch, weights)).metrics


def alarms_of(
    run: Run, config: EvaluationConfig, epoch: int, weights: Evaluated = "trained"
) -> list[str]:
    """Return which limits an evaluated checkpoint has passed, see `alarms`.

    Nothing without an evaluation of the first checkpoint, or for that one itself.

    Args:
        run: The run.
        config: The evaluation's settings.
        epoch: The checkpoint.
        weights: The weights that were evaluated.

    Raises:
        MissingObject: The checkpoint is not evaluated.
    """
    ref = baseline_of(run, config, weights, epoch)
    if ref is None:
        return []
    first = EVALUATION.load(run.store, ref)
    own, *_ = labels_of(run, config)
    return alarms(
        own,
        metrics_of(run, config, epoch, weights),
        first.metrics,
        first.rows(),
        config.gate,
        _training_signs(run, epoch),
    )


def baseline_of(
    run: Run, config: EvaluationConfig, weights: Evaluated, epoch: int
) -> Ref[Evaluation] | None:
    """Return the evaluation of a run's first checkpoint; None for that one itself."""
    return None if epoch == run.first_epoch else _find(run, config, run.first_epoch, weights)


def is_average_trained(run: Run, epoch: int) -> bool:
    """Return whether a checkpoint's average equals its trained weights, so that one will do.

    It does at the start of a run, unless the run is a fork, which inherits its parent's average.
    """
    return epoch == run.first_epoch and run.fork is None


def weights_to_evaluate(run: Run, epoch: int) -> list[Evaluated]:
    """Return a checkpoint's sets of weights: the trained ones, and their average if they differ."""
    if shown_weights(run) == "trained" or is_average_trained(run, epoch):
        return ["trained"]
    return ["trained", "average"]


def shown_weights(run: Run) -> Evaluated:
    """Return the weights that are exported: the average if the run keeps one."""
    return "trained" if run.config.optimizer.ema_decay is None else "average"


def candidates(run: Run, config: EvaluationConfig, before: int | None = None) -> list[Candidate]:
    """Return the evaluated checkpoints that can be the champion, the run's first one first.

    Those whose weights retention has deleted are left out; so is everything if the first
    checkpoint, with which the others are compared, is not evaluated.

    Args:
        run: The run.
        config: The evaluation's settings.
        before: Only checkpoints before this one.
    """
    weights = shown_weights(run)
    epochs = [
        epoch
        for epoch in evaluated_epochs(run, config, weights)
        if before is None or epoch < before
    ]
    if run.first_epoch not in epochs:
        return []
    return [
        _candidate(run.handle, config.model_dump_json(), weights, epoch)
        for epoch in epochs
        if epoch == run.first_epoch or not is_retired(run.store, run.run_id, epoch)
    ]


@lru_cache(maxsize=2048)
def _candidate(handle: RunHandle, config_json: str, weights: Evaluated, epoch: int) -> Candidate:
    """Read a candidate once: what is committed never changes, and every epoch asks for all."""
    run, config = opened(handle), EvaluationConfig.model_validate_json(config_json)
    own, *_ = labels_of(run, config)
    mean = metrics_of(run, config, epoch, weights).get(f"{own}/mean")
    return Candidate(epoch, mean, tuple(alarms_of(run, config, epoch, weights)))


def _training_signs(run: Run, epoch: int) -> dict[str, float]:
    """Return the signs of the epoch before a checkpoint, as far as retention has left them."""
    if epoch == run.first_epoch:
        return {}
    found: dict[str, float] = {}
    checkpoint = CHECKPOINT.require(run.store, Partition(run.run_id, epoch))
    if (clipped := checkpoint.metrics.get(CLIPPED)) is not None:
        found[CLIPPED] = clipped
    commit = EPOCH.get(run.store, Partition(run.run_id, epoch - 1))
    if commit is None:  # a run that is under way has not committed it yet
        return found
    with suppress(RetiredObject):
        prompts = [
            sample.prompt
            for ref in commit.rollouts
            for sample in ROLLOUTS.load(run.store, ref).samples()
        ]
        rewards = ADVANTAGES.load(run.store, commit.advantages).rewards()
        if (share := constant_share(prompts, rewards)) is not None:
            found[CONSTANT] = share
    return found


def _find(
    run: Run, config: EvaluationConfig, epoch: int, weights: Evaluated
) -> Ref[Evaluation] | None:
    return EVALUATION.find(run.store, _where(run, config, epoch, weights))


def _where(run: Run, config: EvaluationConfig, epoch: int, weights: Evaluated) -> Partition:
    if weights == "average" and is_average_trained(run, epoch):
        weights = "trained"
    return Partition(run.run_id, epoch, images_id=_name(run, config, weights))


def _name(run: Run, config: EvaluationConfig, weights: Evaluated) -> str:
    return summary_id(run, config, evaluation_set(run, config, weights))


def _reward_ids(run: Run, config: EvaluationConfig) -> list[str]:
    return [run.reward_id, *(scorer_of(run, reward).reward_id for reward in config.rewards)]
