"""The task that generates the same prompts and seeds with each checkpoint, to watch it change."""

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
from ddpo.runs import Run
from ddpo.store import keys
from ddpo.store.artefacts import CheckpointImages
from ddpo.store.checkpoints import Checkpoint
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT, IMAGES, committed
from ddpo.store.manifests import Ref
from ddpo.store.objects import Objects
from ddpo.store.tables import RolloutRow, encode_rollouts
from ddpo.store.upkeep.retention import is_retired
from ddpo_workflow.tasks.engines import on_device
from ddpo_workflow.tasks.progress import report
from ddpo_workflow.tasks.retries import STORAGE
from ddpo_workflow.tasks.worker import RunHandle, opened, policy_at

_DEFAULT_PROMPTS = 4


class PictureSet(BaseModel):
    """Fixed prompts and seeds: with each checkpoint, every prompt is generated with every seed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: tuple[str, ...]
    """The texts."""
    seeds: tuple[int, ...]
    """The seeds; an image depends on its own seed alone, not on the run's."""

    @property
    def pictures_id(self) -> str:
        """This set's name in keys."""
        return json_digest(self.model_dump(mode="json"))[:8]

    @property
    def pairs(self) -> list[tuple[str, int]]:
        """A prompt and a seed per image, in the order they are generated."""
        return [(prompt, seed) for prompt in self.prompts for seed in self.seeds]


def picture_set(run: Run, config: PicturesConfig) -> PictureSet:
    """Resolve a run's fixed prompts and seeds; the first prompts of its prompt set by default."""
    texts = config.prompts or tuple(p.text for p in run.prompts[:_DEFAULT_PROMPTS])
    return PictureSet(prompts=texts, seeds=config.seeds)


@task(
    name="pictures",
    task_run_name="pictures of checkpoint {epoch}",
    cache_policy=NO_CACHE,
    **STORAGE,
)
def draw_pictures(
    handle: RunHandle, checkpoint: Ref[Checkpoint], pictures: PictureSet, epoch: int
) -> Ref[CheckpointImages] | None:
    """Generate and commit a checkpoint's images of fixed prompts and seeds, or find them.

    Args:
        handle: The run.
        checkpoint: The checkpoint.
        pictures: The prompts and seeds.
        epoch: The checkpoint's epoch.

    Returns:
        The images; None if the checkpoint was retired before these were requested.
    """
    return on_device(_drawn, handle, checkpoint, pictures, epoch)


def _drawn(
    handle: RunHandle, checkpoint: Ref[Checkpoint], pictures: PictureSet, epoch: int
) -> Ref[CheckpointImages] | None:
    run = opened(handle)
    where = Partition(run.run_id, epoch, images_id=pictures.pictures_id)
    ema = run.config.optimizer.ema_decay is not None
    inputs = {
        "checkpoint": checkpoint,
        "pictures": pictures.model_dump(mode="json"),
        **({"weights": "ema"} if ema else {}),
    }
    if not IMAGES.exists(run.store, where) and is_retired(run.store, run.run_id, epoch):
        return None
    return committed(
        run.store, IMAGES, where, inputs, lambda: _generated(run, checkpoint, pictures, epoch)
    )


def _generated(run: Run, checkpoint: Ref[Checkpoint], pictures: PictureSet, epoch: int) -> Objects:
    pairs = pictures.pairs
    seeds = [derive_seed(seed, "pictures", prompt) for prompt, seed in pairs]
    report("pictures", 0, len(pairs))
    with policy_at(run, checkpoint, weights="average") as lease:
        # Always the window of epoch 0: the images differ by the policy alone.
        sampler = sampler_of_epoch(lease.policy, run.config, 0)
        generated = sample(
            lease.policy,
            [prompt for prompt, _ in pairs],
            seeds,
            sampler,
            updates=lease.state.updates,
        )
    report("pictures", len(pairs), len(pairs))
    digests = CHECKPOINT.load(run.store, checkpoint).digests
    ema = run.config.optimizer.ema_decay is not None
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
            log_prob_mean=generated.log_prob_mean(index),
            image_png=encode_image(generated.images[index]),
        )
        for index, (prompt, seed) in enumerate(pairs)
    ]
    return {"pictures": encode_rollouts(rows)}
