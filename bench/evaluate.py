"""A trained model against its base, on the same prompts and the same noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddpo.policies import Policy
from ddpo.randomness import derive_seed
from ddpo.rewards import score_images
from ddpo.run import Run
from ddpo.sampling import sample
from ddpo.store.checkpoints import find_checkpoint, load_checkpoint

SEEDS = (101, 102, 103, 104)


@dataclass(frozen=True)
class Evaluation:
    """Pictures of every prompt with every fixed seed, and their rewards.

    Attributes:
        rewards: [P, S], prompts by seeds.
        diversity: Root mean square difference between two pictures of one prompt, in grey levels
            (0 to 255), mean over prompts and pairs of seeds.
        images: P·S pictures, seeds together.
    """

    rewards: NDArray[np.float64]
    diversity: float
    images: list[Image.Image]


@dataclass(frozen=True)
class Gain:
    """A paired difference of rewards.

    Attributes:
        mean: Of trained minus base over all pairs.
        standard_error: Of that mean.
    """

    mean: float
    standard_error: float

    @classmethod
    def of(cls, trained: Evaluation, base: Evaluation) -> Gain:
        """Compare picture by picture: same prompt, same noise."""
        difference = (trained.rewards - base.rewards).ravel()
        return cls(
            float(difference.mean()),
            float(difference.std(ddof=1) / math.sqrt(len(difference))),
        )

    @property
    def standard_errors(self) -> float:
        """The gain in units of its standard error."""
        return self.mean / self.standard_error


def evaluate(run: Run, epoch: int, *, seeds: Sequence[int] = SEEDS) -> Evaluation:
    """Draw and score every prompt of a run's set with fixed seeds.

    Args:
        run: Gives prompts, sampler, reward.
        epoch: The checkpoint; 0 is the base model.
        seeds: Noise seeds, the same for every checkpoint and run.

    Returns:
        Rewards, diversity and pictures.

    Raises:
        ValueError: The checkpoint is not committed.
    """
    checkpoint = find_checkpoint(run.store, run.run_id, epoch)
    if checkpoint is None:
        raise ValueError(f"run {run.run_id} has no checkpoint {epoch}")
    policy = Policy(run.config.model, run.config.trainable, run.numerics, seed=run.config.seed)
    policy.weights.load(load_checkpoint(run.store, checkpoint.ref).weights)
    prompts = [prompt for prompt in run.prompts for _ in seeds]
    noise = [derive_seed(seed, "evaluate", p.text) for p in run.prompts for seed in seeds]
    images = sample(policy, [p.text for p in prompts], noise, run.config.sampler).images
    scores = score_images(run.reward, images, prompts)
    shape = (len(run.prompts), len(seeds))
    return Evaluation(
        rewards=scores.values.astype(np.float64).reshape(shape),
        diversity=_diversity(images, len(seeds)),
        images=images,
    )


def _diversity(images: Sequence[Image.Image], seeds: int) -> float:
    pixels = np.stack([np.asarray(image, dtype=np.float64) for image in images])
    by_prompt = pixels.reshape(-1, seeds, *pixels.shape[1:])
    distances = [
        np.sqrt(((by_prompt[:, i] - by_prompt[:, j]) ** 2).mean(axis=(1, 2, 3)))
        for i in range(seeds)
        for j in range(i)
    ]
    return float(np.mean(distances))
