"""Measure the scale of a reward on a run's samples, for the constants that `weighted` needs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ddpo.basics.images import decode_image
from ddpo.config.yaml_text import write_yaml
from ddpo.errors import ConfigError, RewardError
from ddpo.prompts import Prompt
from ddpo.rewards import Reward, score_images
from ddpo.runs import Run
from ddpo.store import keys
from ddpo.store.kinds import ROLLOUTS

_DIGITS = 6  # significant digits of the constants in a config


@dataclass(frozen=True)
class RewardRange:
    """The distribution of a reward over a run's samples, in the reward's unit."""

    epochs: tuple[int, ...]
    """Epochs whose samples were scored."""
    count: int
    """Number of samples with a score."""
    failed: int
    """Number of samples that could not be scored."""
    mean: float
    """Mean score."""
    std: float
    """Standard deviation of the scores."""
    low: float
    """Lowest score."""
    high: float
    """Highest score."""

    def component(self, name: str, parameters: Mapping[str, Any]) -> str:
        """Return the reward, standardized by this range, as YAML for `weighted`'s `rewards`.

        Args:
            name: The measured reward.
            parameters: Its parameters.

        Returns:
            A YAML list with one item.

        Raises:
            RewardError: All samples have the same score, so the standard deviation is zero.
        """
        constants = {key: float(f"{getattr(self, key):.{_DIGITS}g}") for key in ("mean", "std")}
        if constants["std"] == 0:
            raise RewardError(
                f"reward {name!r} gives every sample {self.mean:.{_DIGITS}g}: there is no spread "
                "to standardize by, and nothing to learn from"
            )
        optional = {"parameters": dict(parameters)} if parameters else {}
        component = {"name": name, **optional, "weight": 1.0, **constants}
        return write_yaml([component])


def measure_range(
    reward: Reward,
    run: Run,
    epochs: Sequence[int] = (),
    progress: Callable[[str], object] = lambda message: None,
) -> RewardRange:
    """Score a run's saved samples and return the distribution of the scores.

    Args:
        reward: Any reward, not necessarily the run's own.
        run: The run.
        epochs: The epochs to score; by default the earliest whose samples are kept. Epoch 0 was
            sampled before any training, which is the range to standardize by.
        progress: Called with a message before each shard is scored.

    Raises:
        ConfigError: The run has no samples of an epoch.
        RewardError: The reward raised an error, or could not score any sample.
        StoreError: Samples are damaged, or retention has deleted them.
    """
    listed = run.store.list(ROLLOUTS.data_folder("rollouts", run.run_id))
    kept = sorted({where.epoch for _, where in filter(None, map(keys.parse_object, listed))})
    chosen = sorted(set(epochs)) or kept[:1]
    if not chosen:
        raise ConfigError(f"run {run.run_id!r} has no samples; choose a run listed by `ddpo runs`")
    values: list[float] = []
    failed = 0
    for epoch in chosen:
        shards = ROLLOUTS.find_all(run.store, run.run_id, epoch)
        if not shards:
            known = f"epochs {kept[0]} to {kept[-1]}" if kept else "none"
            raise ConfigError(f"run {run.run_id!r} has no samples of epoch {epoch}; it has {known}")
        for number, shard in enumerate(shards, start=1):
            progress(f"epoch {epoch}, shard {number} of {len(shards)}")
            samples = ROLLOUTS.load(run.store, shard).rows()
            images = [decode_image(sample.image_png) for sample in samples]
            prompts = [Prompt(sample.prompt, sample.prompt_metadata) for sample in samples]
            scores = score_images(reward, images, prompts)
            values += scores.values[~scores.failed].tolist()
            failed += int(scores.failed.sum())
    if not values:
        raise RewardError(
            f"reward {reward.identity.reward_id} failed on all {failed} samples; score one image "
            "with `ddpo score NAME IMAGE` to see why"
        )
    array = np.asarray(values, np.float64)
    return RewardRange(
        epochs=tuple(chosen),
        count=len(values),
        failed=failed,
        mean=float(array.mean()),
        std=float(array.std()),
        low=float(array.min()),
        high=float(array.max()),
    )
