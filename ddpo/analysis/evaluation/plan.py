"""What an evaluation samples: prompts, seeds and a sampler, the same for every checkpoint."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue

from ddpo.analysis.history import epoch_range
from ddpo.basics.digests import json_digest
from ddpo.basics.part import is_off
from ddpo.basics.randomness import derive_seed
from ddpo.config import AnySampler, EvaluationConfig
from ddpo.config.model import size_of
from ddpo.errors import ConfigError
from ddpo.prompts import Prompt, load_prompts
from ddpo.runs import Run
from ddpo.store.kinds import CHECKPOINT
from ddpo.store.upkeep.retention import is_retired

Evaluated = Literal["trained", "average"]
"""The weights that are evaluated: the trained ones, or their moving average."""


class EvaluationSet(BaseModel):
    """Everything that decides which images a checkpoint is evaluated on."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompts: tuple[tuple[str, dict[str, JsonValue]], ...]
    """Text and metadata of each prompt."""
    seeds: tuple[int, ...]
    """Each prompt is sampled with each; an image depends on its own seed alone."""
    sampler: AnySampler
    """The sampler, at the evaluation's settings."""
    size: tuple[int, int] | None = Field(default=None, exclude_if=is_off)
    """Width and height in pixels; None for that of the run's samples."""
    weights: Evaluated
    """The weights."""
    kl_samples: int
    """Samples over which the KL divergence from the base model is measured."""

    @property
    def set_id(self) -> str:
        """Name of this set in keys."""
        return self.digest[:8]

    @property
    def digest(self) -> str:
        """sha256 over all of it."""
        return json_digest(self.model_dump(mode="json"))

    @property
    def rows(self) -> list[tuple[Prompt, int]]:
        """A prompt and a seed per image, in the order they are sampled."""
        return [(Prompt(text, facts), seed) for text, facts in self.prompts for seed in self.seeds]


def evaluation_set(
    run: Run, config: EvaluationConfig, weights: Evaluated = "trained"
) -> EvaluationSet:
    """Resolve what an evaluation of a run samples.

    Args:
        run: The run.
        config: The evaluation's settings.
        weights: The weights to evaluate.

    Raises:
        ConfigError: There is no such prompt set.
    """
    named = config.prompts
    prompts = load_prompts(named.name, named.parameters) if named else run.prompts
    # A duplicate prompt would give the same images twice.
    distinct = list({prompt.text: prompt for prompt in prompts}.values())
    chosen = [distinct[i] for i in spread(len(distinct), config.count)]
    return EvaluationSet(
        prompts=tuple((prompt.text, dict(prompt.metadata)) for prompt in chosen),
        seeds=config.seeds,
        sampler=config.sampler_of(run.config.sampler),
        size=size_of(config.resolution),
        weights=weights,
        kl_samples=config.kl_samples if weights == "trained" else 0,
    )


def same_evaluation_set(
    run: Run, config: EvaluationConfig, weights: Evaluated, digest: str
) -> EvaluationSet:
    """Resolve the same again, in another task or for a later checkpoint.

    Args:
        run: The run.
        config: The evaluation's settings.
        weights: The weights to evaluate.
        digest: The set's digest when the evaluation began.

    Raises:
        ConfigError: Its prompts are others now, such as those of a file that was changed.
    """
    images = evaluation_set(run, config, weights)
    if images.digest != digest:
        raise ConfigError(
            "the prompts of the evaluation (evaluation.prompts) were changed while it was under "
            "way; restore them, and run the same command again"
        )
    return images


def kept_checkpoints(run: Run, selection: str | None) -> list[int]:
    """Return the checkpoints to evaluate, in order: the first one of the run, and those selected.

    Args:
        run: The run.
        selection: One checkpoint, or a range ``a:b`` that excludes b; by default all that are kept.

    Raises:
        ConfigError: The selection is neither; or none of these checkpoints exists and is kept.
    """
    selected = epoch_range(selection)
    committed = [where.epoch for where in CHECKPOINT.partitions_of(run.store, run.run_id)]
    kept = [epoch for epoch in committed if not is_retired(run.store, run.run_id, epoch)]
    chosen = [epoch for epoch in kept if epoch in selected]
    if not chosen:
        known = ", ".join(map(str, kept)) or "none"
        which = f" {selection}" if selection else ""
        raise ConfigError(f"run {run.run_id!r} has no checkpoint{which}; it keeps: {known}")
    if run.first_epoch in kept and run.first_epoch not in chosen:
        return [run.first_epoch, *chosen]
    return chosen


def spread(size: int, count: int) -> list[int]:
    """Return `count` indices spread evenly over `size` items; all of them if there are fewer."""
    if count >= size:
        return list(range(size))
    return [(2 * i + 1) * size // (2 * count) for i in range(count)]


def noise_seed(prompt: str, seed: int) -> int:
    """Return the noise seed of an image: prompts share none, so that no layout recurs."""
    return derive_seed(seed, "evaluation", prompt)


def is_due(config: EvaluationConfig, epoch: int, first: int, end: int) -> bool:
    """Return whether a run evaluates the checkpoint before an epoch.

    Args:
        config: The evaluation's settings.
        epoch: The epoch; `end` stands for the last checkpoint.
        first: The run's first epoch.
        end: The run's number of epochs.
    """
    return (epoch - first) % config.every == 0 or epoch == end
