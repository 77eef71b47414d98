"""Typed artefacts of an epoch, which read and verify their objects on demand.

`kinds` says where each is stored; `checkpoints` and `statistics` have the remaining two.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from ddpo.store.checkpoints import Checkpoint
from ddpo.store.manifests import Artefact, Ref
from ddpo.store.statistics import statistics_from
from ddpo.store.tables import (
    AdvantageRow,
    EvaluationRow,
    RewardRow,
    RolloutRow,
    SampleRow,
    decode_advantage_rewards,
    decode_advantages,
    decode_evaluation,
    decode_rewards,
    decode_rollouts,
    decode_samples,
)
from ddpo.store.tensors import tensors_in
from ddpo.training.state import PromptStatistics

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RolloutShard(Artefact):
    """One shard of an epoch's samples and their trajectories."""

    def samples(self) -> list[SampleRow]:
        """Return the samples without their images, in the order of `sample_id`."""
        return decode_samples(self.store.get(self.objects["samples"]))

    def rows(self) -> list[RolloutRow]:
        """Return the samples with their images, in the order of `sample_id`."""
        return decode_rollouts(self.store.get(self.objects["rollouts"]))

    def trajectories(self) -> dict[str, Tensor]:
        """Return the tensors of B samples in T steps, on the CPU, in the order of `sample_id`.

        Full: ``latents`` [B, T+1, C, h, w] from noise to clean, ``log_probs`` [B, T] and
        ``timesteps`` [T]. Final only: ``latents`` [B, 1, C, h, w], the clean ones. They share
        memory, which is free again when none of them is left: drop those of one shard before the
        next one is read.
        """
        return tensors_in(self.store.load(self.objects["trajectories"]))


@dataclass(frozen=True)
class Scores(Artefact):
    """One shard's scores under one reward."""

    @property
    def rollouts(self) -> Ref[RolloutShard]:
        """The shard that was scored."""
        return Ref.model_validate(self.inputs["rollouts"])

    def rows(self) -> list[RewardRow]:
        """Return the scores, in the order of `sample_id`."""
        return decode_rewards(self.store.get(self.objects["rewards"]))


@dataclass(frozen=True)
class AdvantageTable(Artefact):
    """An epoch's advantages or weights under one reward, and the prompt statistics after it."""

    def rows(self) -> list[AdvantageRow]:
        """Return a row per sample, in the order of `sample_id`."""
        return decode_advantages(self.store.get(self.objects["advantages"]))

    def rewards(self) -> list[float | None]:
        """Return the rewards, in the order of `sample_id`, without reading the other columns."""
        return decode_advantage_rewards(self.store.get(self.objects["advantages"]))

    def statistics(self) -> PromptStatistics:
        """Return the last rewards of each prompt after the epoch, the oldest first."""
        return statistics_from(self.document("statistics"))


@dataclass(frozen=True)
class CheckpointImages(Artefact):
    """A checkpoint's images of fixed prompts and seeds."""

    def rows(self) -> list[RolloutRow]:
        """Return the images with their prompts, in the order they were generated."""
        return decode_rollouts(self.store.get(self.objects["pictures"]))


@dataclass(frozen=True)
class EvaluationShard(Artefact):
    """A part of the images that a checkpoint is evaluated on."""

    def rows(self) -> list[RolloutRow]:
        """Return the images with their prompts, in the order they were sampled."""
        return decode_rollouts(self.store.get(self.objects["samples"]))

    @property
    def kl_to_base(self) -> list[float | None]:
        """KL divergence of each step from the base model's; None where a step is deterministic.

        Empty unless it was measured, with the first shard.
        """
        document = self.document("divergence") if "divergence" in self.objects else {}
        return document.get("kl_to_base", [])


@dataclass(frozen=True)
class EvaluationScores(Artefact):
    """The scores of such a part under one reward."""

    def rows(self) -> list[RewardRow]:
        """Return the scores, in the order of `sample_id`."""
        return decode_rewards(self.store.get(self.objects["rewards"]))


@dataclass(frozen=True)
class Evaluation(Artefact):
    """A checkpoint's evaluation: a row per image, and a summary."""

    @cached_property
    def metrics(self) -> dict[str, float]:
        """The summary's values by name."""
        return self.document("metrics")

    def rows(self) -> list[EvaluationRow]:
        """Return a row per image, in the order of `sample_id`."""
        return decode_evaluation(self.store.get(self.objects["images"]))


@dataclass(frozen=True)
class GateDecision(Artefact):
    """The decision of a run's gate to end training, after a checkpoint's evaluation."""

    @property
    def reasons(self) -> list[str]:
        """The limits that the checkpoint has passed, a clause each."""
        return self.document("decision")["reasons"]

    @property
    def then(self) -> str:
        """What the gate was set to do: 'stop' or 'roll_back'."""
        return self.document("decision")["then"]


@dataclass(frozen=True)
class Champion(Artefact):
    """The best of the checkpoints that a run has evaluated so far, drawn by plain diffusers."""

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What it was chosen from, by which rule, and how its images were drawn again."""
        return self.document("champion")

    @property
    def epoch(self) -> int:
        """The champion's epoch."""
        return self.facts["epoch"]


@dataclass(frozen=True)
class EpochCommit(Artefact):
    """The commit that closes an epoch: it lists everything that the epoch made."""

    @cached_property
    def rollouts(self) -> tuple[Ref[RolloutShard], ...]:
        """The epoch's shards, in order."""
        return tuple(Ref.model_validate(ref) for ref in self.inputs["rollouts"])

    @cached_property
    def scores(self) -> tuple[Ref[Scores], ...]:
        """Their scores under the run's reward, in order."""
        return tuple(Ref.model_validate(ref) for ref in self.inputs["rewards"])

    @cached_property
    def advantages(self) -> Ref[AdvantageTable]:
        """The epoch's advantages under the run's reward."""
        return Ref.model_validate(self.inputs["advantages"])

    @cached_property
    def next_checkpoint(self) -> Ref[Checkpoint]:
        """The checkpoint after the epoch."""
        return Ref.model_validate(self.inputs["checkpoint"])
