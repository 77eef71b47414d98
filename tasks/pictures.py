"""The task that draws the same prompts and seeds with each checkpoint, to watch it change."""

from __future__ import annotations

from prefect import task
from prefect.cache_policies import NO_CACHE
from pydantic import BaseModel, ConfigDict

from ddpo.basics.digests import json_digest
from ddpo.basics.images import encode_image
from ddpo.basics.randomness import derive_seed
from ddpo.config import PicturesConfig
from ddpo.diffusion.sampling import sample
from ddpo.diffusion.window import sampler_of_epoch
from ddpo.runs.run import Run
from ddpo.store import keys, manifests
from ddpo.store.checkpoints import load_document
from ddpo.store.manifests import Ref
from ddpo.store.tables import RolloutRow, encode_rollouts
from ddpo.store.upkeep.retention import is_retired
from ddpo_workflow.tasks.progress import report
from ddpo_workflow.tasks.retries import STORAGE
from ddpo_workflow.tasks.worker import RunHandle, opened, policy_at

_DEFAULT_PROMPTS = 4


class PictureSet(BaseModel):
    """Prompts and seeds that are drawn with each checkpoint, every prompt with every seed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: tuple[str, ...]
    """The texts."""
    seeds: tuple[int, ...]
    """The seeds; what one draws depends on it alone, not on the run's."""

    @property
    def pictures_id(self) -> str:
        """What keys call this set."""
        return json_digest(self.model_dump(mode="json"))[:8]

    @property
    def pairs(self) -> list[tuple[str, int]]:
        """All pictures, in the order they are drawn."""
        return [(prompt, seed) for prompt in self.prompts for seed in self.seeds]


def picture_set(run: Run, config: PicturesConfig) -> PictureSet:
    """Settle which pictures a run draws.

    Args:
        run: Its prompt set gives the default.
        config: What the config says.

    Returns:
        The set.
    """
    texts = config.prompts or tuple(p.text for p in run.prompts[:_DEFAULT_PROMPTS])
    return PictureSet(prompts=texts, seeds=config.seeds)


@task(
    name="pictures",
    task_run_name="pictures of checkpoint {epoch}",
    cache_policy=NO_CACHE,
    **STORAGE,
)
def draw_pictures(
    handle: RunHandle, checkpoint: Ref, pictures: PictureSet, epoch: int
) -> Ref | None:
    """Draw and commit a checkpoint's pictures.

    Args:
        handle: The run.
        checkpoint: The checkpoint.
        pictures: Which.
        epoch: The checkpoint's epoch.

    Returns:
        The pictures' manifest; None where the checkpoint was retired before these were asked for.
    """
    run = opened(handle)
    key = keys.pictures_manifest_key(pictures.pictures_id, run.run_id, epoch)
    ema = run.config.optimizer.ema_decay is not None
    inputs = {
        "checkpoint": checkpoint.model_dump(),
        "pictures": pictures.model_dump(mode="json"),
        **({"weights": "ema"} if ema else {}),
    }
    done = manifests.find(run.store, key, inputs=inputs)
    if done is not None:
        return done.ref
    if is_retired(run.store, run.run_id, epoch):
        return None
    pairs = pictures.pairs
    seeds = [derive_seed(seed, "pictures", prompt) for prompt, seed in pairs]
    report("pictures", 0, len(pairs))
    with policy_at(run, checkpoint, shown=True) as lease:
        # Always the window of epoch 0: pictures differ by the policy alone.
        sampler = sampler_of_epoch(lease.policy, run.config, 0)
        drawn = sample(lease.policy, [prompt for prompt, _ in pairs], seeds, sampler)
    report("pictures", len(pairs), len(pairs))
    digests = load_document(run.store, manifests.load(run.store, checkpoint), "digests")
    rows = [
        RolloutRow(
            sample_id=keys.sample_id(run.run_id, epoch, index),
            shard=0,
            index=index,
            prompt=prompt,
            prompt_metadata={"seed": seed},
            seed=seeds[index],
            policy_digest=digests["ema_digest" if ema else "policy_digest"],
            sampler_digest=digests["sampler_digest"],
            log_prob_mean=drawn.log_prob_mean(index),
            image_png=encode_image(drawn.images[index]),
        )
        for index, (prompt, seed) in enumerate(pairs)
    ]
    stem = keys.pictures_stem(pictures.pictures_id, run.run_id, epoch)
    objects = {"pictures": run.store.put(stem, ".parquet", encode_rollouts(rows))}
    return manifests.commit(run.store, key, kind="pictures", inputs=inputs, objects=objects).ref
