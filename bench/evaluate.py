"""A trained model against its base, on the same prompts and the same noise.

``python -m bench.evaluate RUN`` prints it for the last checkpoint of a run on the starter, with the
share of animals that its judge still recognizes.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddpo.basics.randomness import derive_seed
from ddpo.config import SamplerConfig
from ddpo.diffusion.sampling import sample
from ddpo.diffusion.window import sampler_of_epoch
from ddpo.models import load_policy
from ddpo.prompts import Prompt
from ddpo.rewards import score_images
from ddpo.runs import Run, open_run, storage_root
from ddpo.starter import JUDGE_PATH
from ddpo.starter.judge import Judge
from ddpo.starter.scenes import SCENES
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT
from ddpo.store.objects import Store
from ddpo_workflow.flows.cli.quiet import hide_loading_bars

SEEDS = (101, 102, 103, 104)
_SCENES = {scene.prompt: scene for scene in SCENES}


@dataclass(frozen=True)
class Evaluation:
    """Images of every prompt with every fixed seed, and their rewards.

    Attributes:
        rewards: [P, S], prompts by seeds.
        diversity: Root mean square difference between two images of one prompt, in gray levels
            (0 to 255), mean over prompts and pairs of seeds.
        recognised: Share of images in which the starter's judge finds what the prompt names
            (`Verdicts.right`), 0 to 1; for discs, of those that score higher for their own prompt
            than for any other.
    """

    rewards: NDArray[np.float64]
    diversity: float
    recognised: float


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
        """Compare image by image: same prompt, same noise."""
        difference = (trained.rewards - base.rewards).ravel()
        return cls(
            float(difference.mean()),
            float(difference.std(ddof=1) / math.sqrt(len(difference))),
        )

    @property
    def standard_errors(self) -> float:
        """The gain in units of its standard error."""
        return self.mean / self.standard_error


def evaluate(
    run: Run,
    epoch: int,
    *,
    seeds: Sequence[int] = SEEDS,
    prompts: Sequence[Prompt] | None = None,
    sampler: SamplerConfig | None = None,
) -> Evaluation:
    """Draw and score prompts with fixed seeds, and ask the judge.

    Args:
        run: Gives prompts (scenes of the starter, or discs), sampler, reward.
        epoch: The checkpoint; 0 is the base model.
        seeds: Noise seeds, the same for every checkpoint and run.
        prompts: What is drawn; by default the run's own set.
        sampler: How; by default as in the run's first epoch.

    Returns:
        Rewards, diversity and the share that is recognised.

    Raises:
        ValueError: The checkpoint is not committed, or a prompt names neither a scene of the
            starter nor a disc.
    """
    prompts = run.prompts if prompts is None else prompts
    discs = all("disc" in prompt.metadata for prompt in prompts)
    unknown = [prompt.text for prompt in prompts if prompt.text not in _SCENES]
    if unknown and not discs:
        raise ValueError(f"the starter's judge has no notion of the prompt {unknown[0]!r}")
    checkpoint = CHECKPOINT.commit_of(run.store, Partition(run.run_id, epoch))
    if checkpoint is None:
        raise ValueError(f"run {run.run_id} has no checkpoint {epoch}")
    config = run.config
    policy = load_policy(config.model, config.trainable, run.numerics, seed=config.seed)
    policy.weights.load(CHECKPOINT.load(run.store, checkpoint.ref).state().shown_weights)
    repeated = [prompt for prompt in prompts for _ in seeds]
    noise = [derive_seed(seed, "evaluate", p.text) for p in prompts for seed in seeds]
    sampler = sampler or sampler_of_epoch(policy, run.config, 0)
    images = sample(policy, [p.text for p in repeated], noise, sampler).images
    scores = score_images(run.reward, images, repeated)
    shape = (len(prompts), len(seeds))
    recognised = _told_apart(run, images, repeated) if discs else _found(images, repeated)
    return Evaluation(
        rewards=scores.values.astype(np.float64).reshape(shape),
        diversity=_diversity(images, len(seeds)),
        recognised=recognised,
    )


def _found(images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> float:
    shown = [_SCENES[prompt.text] for prompt in prompts]
    return float(Judge.load(JUDGE_PATH).look(images).right(shown).mean())


def _told_apart(run: Run, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> float:
    own = score_images(run.reward, images, prompts).values
    others = [
        np.where(
            [prompt == other for prompt in prompts],
            -np.inf,
            score_images(run.reward, images, [other] * len(images)).values,
        )
        for other in dict.fromkeys(prompts)
    ]
    return float((own > np.max(others, axis=0)).mean())


def _diversity(images: Sequence[Image.Image], seeds: int) -> float:
    pixels = np.stack([np.asarray(image, dtype=np.float64) for image in images])
    by_prompt = pixels.reshape(-1, seeds, *pixels.shape[1:])
    distances = [
        np.sqrt(((by_prompt[:, i] - by_prompt[:, j]) ** 2).mean(axis=(1, 2, 3)))
        for i in range(seeds)
        for j in range(i)
    ]
    return float(np.mean(distances))


def main() -> None:
    """Print base and trained model of one run side by side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_id")
    parser.add_argument("--root", help="the store; by default DDPO_ROOT, else ddpo-data/store")
    arguments = parser.parse_args()
    hide_loading_bars()
    run = open_run(Store.open(storage_root(arguments.root)), arguments.run_id)
    committed = [where.epoch for where in CHECKPOINT.partitions_of(run.store, run.run_id)]
    if not committed:
        parser.error(f"run {run.run_id} has no checkpoint yet; start it with `ddpo resume`")
    epochs = committed[-1]
    base, trained = evaluate(run, 0), evaluate(run, epochs)
    gain = Gain.of(trained, base)
    print(f"{run.run_id}, {epochs} epochs, {base.rewards.size} images from each model")
    print(f"reward: {base.rewards.mean():.4f} -> {trained.rewards.mean():.4f}, ", end="")
    print(f"gain {gain.mean:+.4f}, {gain.standard_errors:+.1f} standard errors")
    print(f"diversity: {trained.diversity / base.diversity:.0%} of the base's")
    kept = trained.recognised / base.recognised if base.recognised else math.nan
    print(
        f"recognised: {base.recognised:.1%} -> {trained.recognised:.1%}, {kept:.0%} of the base's"
    )


if __name__ == "__main__":
    main()
