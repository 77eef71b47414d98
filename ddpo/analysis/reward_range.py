"""The range in which a reward scores a run's samples: the constants that `weighted` takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml

from ddpo.basics.images import decode_image
from ddpo.errors import ConfigError, RewardError
from ddpo.prompts import Prompt
from ddpo.rewards import Reward, score_images
from ddpo.runs.run import Run
from ddpo.store import keys, manifests
from ddpo.store.tables import decode_rollouts

_DIGITS = 6  # of the constants that go into a config


@dataclass(frozen=True)
class RewardRange:
    """How a reward scores the samples of a run.

    Attributes:
        epochs: Those whose samples were scored.
        count: How many samples have a score.
        failed: How many have none.
        mean: Mean of the scores, in the reward's unit.
        std: Their standard deviation.
        low: The lowest.
        high: The highest.
    """

    epochs: tuple[int, ...]
    count: int
    failed: int
    mean: float
    std: float
    low: float
    high: float

    def component(self, name: str, parameters: Mapping[str, Any]) -> str:
        """Return the reward, standardised by this range, as an item of `weighted`'s `rewards`.

        Args:
            name: The reward that was measured.
            parameters: Its parameters.

        Returns:
            YAML: a list of one.

        Raises:
            RewardError: All samples score alike, so that nothing can divide them.
        """
        constants = {key: float(f"{getattr(self, key):.{_DIGITS}g}") for key in ("mean", "std")}
        if constants["std"] == 0:
            raise RewardError(
                f"reward {name!r} gives every sample {self.mean:.{_DIGITS}g}: there is no spread "
                "to standardise by, and nothing to learn from"
            )
        given = {"parameters": dict(parameters)} if parameters else {}
        component = {"name": name, **given, "weight": 1.0, **constants}
        return yaml.safe_dump([component], sort_keys=False)


def measure_range(
    reward: Reward,
    run: Run,
    epochs: Sequence[int] = (),
    progress: Callable[[str], object] = lambda said: None,
) -> RewardRange:
    """Score a run's saved samples.

    Args:
        reward: The reward; it need not be the run's own.
        run: The run.
        epochs: Which; by default the earliest whose samples are kept. Epoch 0 is what the model
            drew before any training, which is the range to standardise by.
        progress: Told what is being scored, a shard at a time.

    Returns:
        The range.

    Raises:
        ConfigError: The run has no samples of such an epoch.
        RewardError: The reward raised, or no sample has a score.
        StoreError: Samples are damaged, or were retired.
    """
    found = run.store.list(keys.rollouts_prefix(run.run_id))
    kept = sorted({epoch for key in found if (epoch := keys.parse_epoch(key)) is not None})
    chosen = sorted(set(epochs)) or kept[:1]
    if not chosen:
        raise ConfigError(f"run {run.run_id!r} has no samples yet; name one that `ddpo runs` shows")
    values: list[float] = []
    failed = 0
    for epoch in chosen:
        shards = _committed_shards(run, epoch)
        if not shards:
            there = f"epochs {kept[0]} to {kept[-1]}" if kept else "none"
            raise ConfigError(f"run {run.run_id!r} has no samples of epoch {epoch}; it has {there}")
        for number, shard in enumerate(shards, start=1):
            progress(f"epoch {epoch}, shard {number} of {len(shards)}")
            samples = decode_rollouts(run.store.get(shard.objects["rollouts"]))
            images = [decode_image(sample.image_png) for sample in samples]
            prompts = [Prompt(sample.prompt, sample.prompt_metadata) for sample in samples]
            scores = score_images(reward, images, prompts)
            values += scores.values[~scores.failed].tolist()
            failed += int(scores.failed.sum())
    if not values:
        raise RewardError(
            f"reward {reward.identity.reward_id} failed on all {failed} samples; try it on one "
            "picture with `ddpo score NAME IMAGE`, whose columns say why"
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


def _committed_shards(run: Run, epoch: int) -> list[manifests.Manifest]:
    places = [keys.rollout_manifest_key(run.run_id, epoch, shard) for shard in range(run.shards)]
    found = [manifests.find(run.store, key) for key in places]
    return [each.manifest for each in found if each is not None]
