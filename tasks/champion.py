"""The champion of a run: the task that chooses it, and draws its images again."""

from __future__ import annotations

import tempfile
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from ddpo.analysis.evaluation.champion import RULE, Candidate, best_of
from ddpo.analysis.evaluation.plan import evaluation_set
from ddpo.analysis.evaluation.proof import Job, prove
from ddpo.basics.digests import canonical_json, json_digest
from ddpo.basics.images import decode_image
from ddpo.config import EvaluationConfig, FullConfig
from ddpo.diffusion.window import whole_process
from ddpo.models import hub
from ddpo.runs import Run
from ddpo.store import artefacts
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHAMPION, CHECKPOINT, EVALUATION_SHARD, committed
from ddpo.store.manifests import Ref
from ddpo.store.objects import Objects
from ddpo_workflow.tasks.evaluated import candidates, shown_weights, summary_id
from ddpo_workflow.tasks.progress import begin_stage
from ddpo_workflow.tasks.retries import STORAGE
from ddpo_workflow.tasks.worker import RunHandle, opened, policy_at

_REFERENCE_IMAGES = 4


@task(
    name="champion", task_run_name="champion of {handle.run_id}", cache_policy=NO_CACHE, **STORAGE
)
def find_champion(handle: RunHandle, config: EvaluationConfig) -> Ref[artefacts.Champion] | None:
    """Commit the best of a run's evaluated checkpoints, or find it.

    It is committed only after plain diffusers, in a fresh process, has drawn with its exported
    weights what the run has sampled with the checkpoint.

    Args:
        handle: The run.
        config: The evaluation's settings.

    Returns:
        The champion; None if no checkpoint is better than the first one, see `best_of`.

    Raises:
        ModelError: The exported weights draw something else.
    """
    run = opened(handle)
    found = candidates(run, config)
    best = best_of(found) if found else None
    if best is None:
        return None
    chosen = [[each.epoch, each.mean, list(each.alarms)] for each in found]
    images = evaluation_set(run, config, shown_weights(run))
    # More checkpoints may be evaluated later, or judged by other limits: another choice.
    name = json_digest([summary_id(run, config, images), chosen])[:8]
    return committed(
        run.store,
        CHAMPION,
        Partition(run.run_id, found[-1].epoch, images_id=name),
        {"candidates": chosen},
        lambda: _proved(run, config, best, len(found)),
    )


def _proved(run: Run, config: EvaluationConfig, best: Candidate, candidates: int) -> Objects:
    begin_stage("champion")
    checkpoint = CHECKPOINT.find(run.store, Partition(run.run_id, best.epoch))
    assert checkpoint is not None
    images = evaluation_set(run, config, shown_weights(run))
    where = Partition(run.run_id, best.epoch, 0, images_id=images.set_id)
    rows = EVALUATION_SHARD.require(run.store, where).rows()[:_REFERENCE_IMAGES]
    with tempfile.TemporaryDirectory() as scratch:
        weights = Path(scratch) / "weights"
        with policy_at(run, checkpoint, weights="average") as lease:
            policy = lease.policy
            policy.export(weights)
            whole = isinstance(run.config.trainable, FullConfig)
            files = hub.local_files(policy.folder, policy.parts)
            width, height = images.size or policy.size
            job = Job(
                pipeline=str(weights if whole else policy.folder),
                variant=None if whole else files.variant,
                lora=None if whole else str(weights),
                device=policy.device.type,
                threads=policy.numerics.threads,
                prompts=[row.prompt for row in rows],
                seeds=[row.seed for row in rows],
                arguments={
                    **images.sampler.pipeline_arguments,
                    **policy.pipeline_arguments,
                    "width": width,
                    "height": height,
                },
                scheduler=whole_process(policy, images.sampler).plain_scheduler,
                vae=None if whole or policy.vae_folder is None else str(policy.vae_folder),
                without=(
                    "safety_checker",
                    "feature_extractor",
                    *(part for part in policy.optional_parts if part not in policy.parts),
                ),
            )
        expected = [decode_image(row.image_png) for row in rows]
        difference = prove(job, expected, Path(scratch), dtype=run.numerics.dtype)
    return {
        "champion": canonical_json(
            {
                "epoch": best.epoch,
                "mean": best.mean,
                "rule": RULE,
                "candidates": candidates,
                "redrawn": len(rows),
                "largest_difference": difference,
            }
        )
    }
