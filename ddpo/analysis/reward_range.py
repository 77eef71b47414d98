"""Trying a reward before a run: what there is, how it scores pictures, and in what range."""

from __future__ import annotations

import inspect
import json
import math
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, UnidentifiedImageError
from pydantic import JsonValue

from ddpo.basics.images import PIXEL_LIMIT, decode_image
from ddpo.errors import ConfigError, RewardError
from ddpo.prompts import Prompt
from ddpo.rewards import Reward, Scores, available_rewards, score_images
from ddpo.rewards.registry import find_reward
from ddpo.runs.run import Run
from ddpo.store import keys, manifests
from ddpo.store.tables import decode_rollouts

_DIGITS = 6  # of the constants that go into a config
_MODULE = re.compile(r"\b(?:typing|collections\.abc|ddpo(?:\.\w+)*)\.")


@dataclass(frozen=True)
class ParameterDescription:
    """What a config may say to a reward.

    Attributes:
        name: Its key under `parameters`.
        type: Its annotation, as Python writes it.
        default: As JSON; None where there is none, so that a config must give it.
    """

    name: str
    type: str
    default: str | None


@dataclass(frozen=True)
class RewardDescription:
    """What there is to know of a reward without building it.

    Attributes:
        name: As a config names it.
        summary: First line of its documentation, or why it cannot be imported.
        needs: What it wants beside pictures and prompts, as its attribute ``needs`` says.
        parameters: What it takes.
    """

    name: str
    summary: str
    needs: str
    parameters: tuple[ParameterDescription, ...]


def describe_rewards() -> list[RewardDescription]:
    """Describe all rewards that have a name, entry points among them, by name."""
    return [_describe(name) for name in available_rewards()]


def read_picture(path: Path) -> Image.Image:
    """Read a picture of any format that Pillow knows, as RGB.

    Args:
        path: The file.

    Returns:
        The picture.

    Raises:
        ConfigError: It is no picture, damaged, or has more than 4096x4096 pixels.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > PIXEL_LIMIT:
                raise ConfigError(
                    f"{path} has {image.width}x{image.height} pixels; 4096x4096 is the most"
                )
            return image.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{path} cannot be read as a picture: {error}") from error


def prompts_for(
    texts: Sequence[str], count: int, metadata: Mapping[str, JsonValue] | None = None
) -> list[Prompt]:
    """Give each of some pictures its prompt.

    Args:
        texts: One for all, or one for each.
        count: How many pictures there are.
        metadata: What rewards know about the prompts beside the words; the same for all.

    Returns:
        The prompts.

    Raises:
        ConfigError: Another number of prompts.
    """
    if len(texts) not in (1, count):
        raise ConfigError(
            f"there are {count} pictures and {len(texts)} prompts; give one --prompt for all, or "
            "one for each (a reward that looks at pictures alone takes any)"
        )
    every = list(texts) * (count if len(texts) == 1 else 1)
    return [Prompt(text, metadata or {}) for text in every]


def findings(scores: Scores) -> dict[str, list[str]]:
    """Return scores and columns as text to show.

    Args:
        scores: Of B pictures.

    Returns:
        B texts each for ``reward`` (``failed`` where it has none) and the reward's own columns.
        Numbers have 4 digits; nan is blank.
    """
    rewards = [
        "failed" if failed else f"{value:.4g}"
        for value, failed in zip(scores.values.tolist(), scores.failed.tolist(), strict=True)
    ]
    columns = {name: [_shown(value) for value in column] for name, column in scores.columns.items()}
    return {"reward": rewards, **columns}


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


def _describe(name: str) -> RewardDescription:
    try:
        target, parameters = find_reward(name)
    except ConfigError as error:  # of another package; the others are still to be seen
        return RewardDescription(name, str(error), "", ())
    summary = (inspect.getdoc(target) or "").partition("\n")[0].replace("``", "`")
    return RewardDescription(
        name, summary, getattr(target, "needs", ""), tuple(_described(target, parameters))
    )


def _described(target: Any, parameters: Sequence[inspect.Parameter]) -> list[ParameterDescription]:
    try:
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # an annotation that only a type checker can read is shown as written
        hints = {}
    return [
        ParameterDescription(
            each.name,
            _MODULE.sub("", inspect.formatannotation(hints.get(each.name, each.annotation)))
            if each.annotation is not each.empty
            else "any",
            None if each.default is each.empty else json.dumps(each.default, default=str),
        )
        for each in parameters
    ]


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.4g}"
    return str(value)
