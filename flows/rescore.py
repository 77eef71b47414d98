"""A run's saved samples under another reward: scored again, shown beside the run, nothing drawn."""

from __future__ import annotations

from collections.abc import Sequence

from prefect import get_run_logger

from ddpo.analysis.history import History
from ddpo.config import RewardConfig
from ddpo.errors import ConfigError, RetiredObject
from ddpo.rewards import load_reward
from ddpo.runs.forks.checks import rebuilds_statistics, saved_rollouts
from ddpo.runs.run import Run, open_run, storage_root
from ddpo.store import keys
from ddpo.store.artefacts import RolloutShard, Scores
from ddpo.store.keys import Partition
from ddpo.store.kinds import ADVANTAGES, CHECKPOINT, STATISTICS
from ddpo.store.manifests import Ref
from ddpo.store.objects import Store
from ddpo.store.statistics import HoldsStatistics
from ddpo_workflow.flows.flow import ddpo_flow
from ddpo_workflow.flows.start import scores_before
from ddpo_workflow.flows.train import Parameters, Text
from ddpo_workflow.tasks.credit import credit_of
from ddpo_workflow.tasks.score import score_shard
from ddpo_workflow.tasks.statistics import rebuild_statistics
from ddpo_workflow.tasks.tracking.page import open_rescored_page
from ddpo_workflow.tasks.tracking.rescored import track_disagreement, track_rescored
from ddpo_workflow.tasks.worker import RunHandle, opened


@ddpo_flow(name="ddpo-rescore", run_name="{run_id} by {reward}")
def rescore(
    run_id: str,
    reward: str,
    parameters: Parameters = None,
    epochs: Text = None,
    storage: Text = None,
    tracking: Text = None,
) -> str:
    """Score a run's saved samples with another reward; what is scored already is not scored again.

    Args:
        run_id: The run.
        reward: Name of the new reward.
        parameters: Its parameters.
        epochs: Which: one, or `a:b`, without b; either may be left out. Empty: all.
        storage: Folder or URL that remembers the run. Empty: the worker's DDPO_ROOT, or the local
            store.
        tracking: MLflow's tracking URI. Empty: the run's.

    Returns:
        The new reward's id: the part `reward_name=` of its tables in the store.
    """
    run = open_run(Store.open(storage_root(storage)), run_id)
    chosen = chosen_epochs(run, epochs)
    config = RewardConfig(
        name=reward,
        parameters=dict(parameters or {}),
        tries=run.config.reward.tries,
        on_failure=run.config.reward.on_failure,
    )
    reward_id = load_reward(config.name, config.parameters).identity.reward_id
    if reward_id == run.reward_id:
        raise ConfigError(f"{reward_id} is the run's own reward: its samples have these scores")
    handle = run.handle.model_copy(update={"reward": config.model_dump_json()})
    rescored = opened(handle)
    with open_rescored_page(run, config, reward_id, uri=tracking) as page:
        for epoch in chosen:
            rollouts = saved_rollouts(run, epoch)
            scores = [score_shard(handle, ref, epoch, shard) for shard, ref in enumerate(rollouts)]
            metrics = track_rescored(handle, page.handle, scores, epoch)
            reason = "not one of its samples could be scored"
            if "reward/mean" in metrics:
                reason = _advantages(rescored, handle, rollouts, scores, epoch)
            if reason:
                get_run_logger().warning("epoch %d has no advantages: %s", epoch, reason)
        track_disagreement(handle, page.handle, chosen)
    return reward_id


def chosen_epochs(run: Run, asked: str | None) -> list[int]:
    """Return the committed epochs of a run that are asked for and whose samples are kept.

    Args:
        run: The run.
        asked: One epoch, or `a:b`, without b; either may be left out. None for all.

    Returns:
        Epochs, in order.

    Raises:
        ConfigError: The words are no range; or retention deleted all that is asked for.
        NotInHistory: None of them is committed.
    """
    wanted = History(run).epochs_within(asked)
    kept = [
        epoch
        for epoch in wanted
        if not run.store.exists(keys.retired_key("samples", run.run_id, epoch))
    ]
    if not kept:
        raise ConfigError(
            f"run {run.run_id!r} has no saved samples of the epochs {asked or 'asked for'}: "
            "retention deleted them (storage.retention)"
        )
    return kept


def _advantages(
    run: Run,
    handle: RunHandle,
    rollouts: Sequence[Ref[RolloutShard]],
    scores: Sequence[Ref[Scores]],
    epoch: int,
) -> str:
    """Commit an epoch's advantages under the new reward; returns why there are none, if so."""
    try:
        before = _statistics_before(run, handle, epoch)
    except RetiredObject as error:
        return str(error)
    if before is None:
        return f"there are no prompt statistics before it by {run.reward_id}"
    credit_of(handle, before, rollouts, scores, epoch)
    return ""


def _statistics_before(run: Run, handle: RunHandle, epoch: int) -> Ref[HoldsStatistics] | None:
    """Return what holds the prompt statistics before an epoch, under the run's (new) reward.

    A fork's own are of its own reward, on another scale: the epochs before it are scored again.
    """
    before = Partition(run.run_id, epoch - 1, reward_id=run.reward_id)
    if epoch > run.first_epoch:
        return ADVANTAGES.find(run.store, before)
    if rebuilds_statistics(run.config) and epoch:
        found = STATISTICS.find(run.store, before)
        return found or rebuild_statistics(handle, scores_before(run), epoch)
    return CHECKPOINT.find(run.store, Partition(run.run_id, epoch))
