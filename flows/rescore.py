"""Score a run's saved samples with another reward, shown beside the run; nothing is sampled."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ddpo.errors import RetiredObject
from ddpo.runs.forks.checks import saved_rollouts
from ddpo.store.artefacts import RolloutShard, Scores
from ddpo.store.keys import Partition
from ddpo.store.kinds import ADVANTAGES, CHECKPOINT, STATISTICS
from ddpo.store.manifests import Ref
from ddpo.store.statistics import HoldsStatistics
from ddpo_workflow.flows.flow import artifact_key, ddpo_flow
from ddpo_workflow.flows.forms import Parameters, Text
from ddpo_workflow.flows.links import link_page
from ddpo_workflow.flows.run_requests import RescoreRequest, Rescoring
from ddpo_workflow.flows.start import scores_before
from ddpo_workflow.tasks.credit import credit_of
from ddpo_workflow.tasks.progress import note
from ddpo_workflow.tasks.score import score_shard
from ddpo_workflow.tasks.statistics import rebuild_statistics
from ddpo_workflow.tasks.tracking.page import open_rescored_page
from ddpo_workflow.tasks.tracking.rescored import track_disagreement, track_rescored

_logger = logging.getLogger(__name__)


@ddpo_flow(name="ddpo-rescore", run_name="{run_id} by {reward}")
def rescore(
    run_id: str,
    reward: str,
    parameters: Parameters = None,
    epochs: Text = None,
    storage: Text = None,
    tracking: Text = None,
    trust: bool = False,
) -> str:
    """Score a run's saved samples with another reward; committed scores are reused.

    Args:
        run_id: The run's name.
        reward: Name of the reward.
        parameters: Parameters of the reward.
        epochs: One epoch, or a range `a:b` that excludes b; a or b may be omitted. Empty: all.
        storage: Folder or URL of the store. Empty: the worker's DDPO_ROOT, or the local store.
        tracking: MLflow's tracking URI. Empty: the run's.
        trust: Allow the MLflow server that a run from another machine names.

    Returns:
        The reward's id, which is `reward_name=` of its tables in the store.
    """
    rescoring = RescoreRequest(
        run_id=run_id,
        reward=reward,
        parameters=parameters,
        epochs=epochs,
        storage=storage,
        tracking=tracking,
        trust=trust,
    ).plan()
    run, new = rescoring.run, rescoring.reward
    with open_rescored_page(run, new, rescoring.reward_id, uri=tracking) as page:
        key = artifact_key(f"{run.run_id}-by-{rescoring.reward_id}", run.uid)
        link_page(page, key, f"{run.run_id} by {rescoring.reward_id}")
        for number, epoch in enumerate(rescoring.epochs, start=1):
            note(f"scoring epoch {epoch}, {number} of {len(rescoring.epochs)} ...")
            rollouts = saved_rollouts(run, epoch)
            scores = [
                score_shard(run.handle, ref, epoch, shard, new)
                for shard, ref in enumerate(rollouts)
            ]
            metrics = track_rescored(run.handle, page.handle, scores, epoch)
            reason = "none of its samples could be scored"
            if "reward/mean" in metrics:
                reason = _commit_advantages(rescoring, rollouts, scores, epoch)
            if reason:
                _logger.warning("epoch %d has no advantages: %s", epoch, reason)
        track_disagreement(run.handle, page.handle, rescoring.epochs, new)
    return rescoring.reward_id


def _commit_advantages(
    rescoring: Rescoring,
    rollouts: Sequence[Ref[RolloutShard]],
    scores: Sequence[Ref[Scores]],
    epoch: int,
) -> str:
    """Commit an epoch's advantages under the new reward; return the reason if there are none."""
    try:
        statistics = _statistics_before(rescoring, epoch)
    except RetiredObject as error:
        return str(error)
    if statistics is None:
        return f"there are no prompt statistics before it by {rescoring.reward_id}"
    handle = rescoring.run.handle
    credit_of(handle, statistics, rollouts, scores, epoch, rescoring.reward)
    return ""


def _statistics_before(rescoring: Rescoring, epoch: int) -> Ref[HoldsStatistics] | None:
    """Return what holds the prompt statistics before an epoch, under the new reward.

    Those of a fork's first checkpoint are on the scale of the fork's own reward, so the epochs
    before the fork are scored again.
    """
    run = rescoring.run
    before = Partition(run.run_id, epoch - 1, reward_id=rescoring.reward_id)
    if epoch > run.first_epoch:
        return ADVANTAGES.find(run.store, before)
    if epoch and run.fork and run.fork.rebuilds_statistics:
        statistics = STATISTICS.find(run.store, before)
        if statistics is None:
            scores = scores_before(run.fork, rescoring.reward)
            return rebuild_statistics(run.handle, scores, epoch, rescoring.reward)
        return statistics
    return CHECKPOINT.find(run.store, Partition(run.run_id, epoch))
