"""A whole run's config, and the parts of its identity."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    JsonValue,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from ddpo.algorithms import AnyAlgorithm, DdpoIs
from ddpo.algorithms.base import RunSettings
from ddpo.basics.limits import EPOCH_LIMIT, INDEX_LIMIT, LARGEST_RATE, Seed
from ddpo.basics.part import Part, check_divides, is_auto, is_off, is_one
from ddpo.config.engine import AnyEngine, LocalEngine, is_local
from ddpo.config.evaluation import EvaluationConfig
from ddpo.config.fork import ForkConfig
from ddpo.config.model import FullConfig, LoraConfig, ModelConfig, Trainable
from ddpo.config.numerics import NumericsConfig
from ddpo.config.operation import StorageConfig, TrackingConfig
from ddpo.config.plugins import NamedConfig, RewardConfig
from ddpo.config.preferences import PreferencesConfig
from ddpo.config.sampler import AnySampler, DdimSampler


class RolloutsConfig(Part):
    """How many samples an epoch has, and what is stored of them."""

    samples_per_epoch: int = Field(default=256, gt=0, le=INDEX_LIMIT)
    """Images per epoch. More of them reduce the gradient's variance and lengthen the epoch."""
    samples_per_prompt: PositiveInt = Field(default=1, exclude_if=is_one)
    """Size of a group: this many consecutive samples share a prompt. By default each image has a
    prompt of its own."""
    shared_start: bool = Field(default=False, exclude_if=is_off)
    """Start all samples of a group from the same noise (DanceGRPO, arXiv 2505.07818), so that their
    rewards differ by the noise of their steps alone, which is what log-probs are of."""
    sample_ahead: bool = Field(default=False, exclude_if=is_off)
    """Sample an epoch before the one before it is trained on, so that a slow reward scores it while
    the model is trained. Its samples are then from weights that are one epoch older: `ddpo_is`
    needs a small `clip_range` for that, and other algorithms do not correct for it. Retention keeps
    one checkpoint more."""
    shard_size: PositiveInt = 64
    """Images per task: the unit that is committed, scored and retried."""
    store_trajectories: Literal["auto", "full", "final"] = Field(default="auto", exclude_if=is_auto)
    """`full`: all latents of a trajectory and its log-probs, which DDPO trains on. `final`: only
    the last latents, 1 / (steps + 1) of the bytes, which is all that training on final latents
    needs. `auto` stores what the algorithm needs."""


DecayRate = Annotated[float, Field(ge=0.0, lt=1.0)]


class OptimizerConfig(Part):
    """AdamW, with the defaults of the paper's code."""

    learning_rate: float = Field(default=3e-4, gt=0.0, le=LARGEST_RATE)
    """3e-4 for LoRA on Stable Diffusion, 1e-5 for full fine-tuning."""
    betas: tuple[DecayRate, DecayRate] = (0.9, 0.999)
    """Decay rates of the two moments, each from 0 to below 1."""
    weight_decay: float = Field(default=1e-4, ge=0.0, le=LARGEST_RATE)
    """Decoupled weight decay."""
    epsilon: PositiveFloat = 1e-8
    """Added to the square root of the second moment."""
    max_grad_norm: PositiveFloat | None = 1.0
    """The gradient's global norm is clipped to this; null turns clipping off."""
    ema_decay: float | None = Field(default=None, gt=0.0, lt=1.0, exclude_if=is_off)
    """Keep an exponential moving average of the trained weights: after each optimizer step ema =
    decay * ema + (1 - decay) * weights. Images of fixed prompts and exports use the average;
    rollouts use the trained weights. By default there is none."""
    eight_bit: bool = Field(default=False, exclude_if=is_off)
    """Keep AdamW's moments in 8 bits, a scale for each 256 of them (arXiv 2110.02861): 2 bytes a
    trained weight in place of 8, for full fine-tuning. Needs the package bitsandbytes, the extra
    `eight-bit`."""


OPERATION_FIELDS = frozenset({"engine", "epochs", "evaluation", "storage", "tracking", "outputs"})
"""The half of a config that may change under a run_id."""


class RunConfig(Part):
    """The config of a run."""

    seed: Seed = 0
    """All randomness is derived from it."""
    model: ModelConfig
    """A path alone (`model: starter`) is short for `model: {path: starter}`."""
    trainable: Trainable = LoraConfig()
    """`type: lora` or `type: full`."""
    prompts: NamedConfig
    """The prompt set, sampled uniformly."""
    rollouts: RolloutsConfig = RolloutsConfig()
    """How many samples an epoch has, and what is stored of them."""
    preferences: PreferencesConfig | None = Field(default=None, exclude_if=is_off)
    """Preference pairs that people made, to train on in place of the policy's own samples. By
    default the policy samples."""
    sampler: AnySampler = DdimSampler()
    """How images are sampled."""
    reward: RewardConfig
    """The reward to maximize."""
    algorithm: AnyAlgorithm = DdpoIs()
    """How rewards become a loss."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How gradients become weights."""
    numerics: NumericsConfig = NumericsConfig()
    """Batches, dtype, device."""
    fork: ForkConfig | None = Field(default=None, exclude_if=is_off)
    """The run and epoch that this run is a fork of; by default it starts from the base model."""
    epochs: int = Field(default=100, gt=0, lt=EPOCH_LIMIT)
    """Rounds of sampling and updating. May be increased later, and the run resumes. A fork's epochs
    are counted from its parent's start."""
    evaluation: EvaluationConfig | None = Field(default=None, exclude_if=is_off)
    """Evaluate checkpoints during the run. By default, only `ddpo evaluate` does."""
    engine: AnyEngine = Field(default=LocalEngine(), exclude_if=is_local)
    """Where the run's tasks compute: `local`, `processes` or `ray`. The results are the same."""
    storage: StorageConfig = StorageConfig()
    """Where the run is stored."""
    tracking: TrackingConfig = TrackingConfig()
    """Where the run is shown."""
    outputs: str = "ddpo-data/outputs"
    """Local folder for reports and trained weights, with a subfolder for each run."""

    @field_validator("model", mode="before")
    @classmethod
    def _path_alone(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _batches_divide(self) -> RunConfig:
        samples = self.rollouts.samples_per_epoch
        check_divides(
            "rollouts.samples_per_prompt",
            self.rollouts.samples_per_prompt,
            "samples_per_epoch",
            samples,
        )
        check_divides("rollouts.shard_size", self.rollouts.shard_size, "samples_per_epoch", samples)
        if (shards := samples // self.rollouts.shard_size) > EPOCH_LIMIT:
            raise ValueError(
                f"rollouts.shard_size {self.rollouts.shard_size} makes {shards} shards per epoch; "
                f"set it to at least {math.ceil(samples / EPOCH_LIMIT)}"
            )
        if self.numerics.sample_batch_size != "auto":
            check_divides(
                "numerics.sample_batch_size",
                self.numerics.sample_batch_size,
                "rollouts.shard_size",
                self.rollouts.shard_size,
            )
        return self

    @model_validator(mode="after")
    def _shared_start_fits(self) -> RunConfig:
        if not self.rollouts.shared_start:
            return self
        if self.rollouts.samples_per_prompt == 1:
            raise ValueError(
                "rollouts.shared_start: groups share it, and rollouts.samples_per_prompt is 1; set "
                "it to 2 or more"
            )
        if not self.sampler.stochastic:
            raise ValueError(
                "rollouts.shared_start: a sampler without noise makes the same image of the same "
                "start; remove it"
            )
        return self

    @model_validator(mode="after")
    def _samples_ahead(self) -> RunConfig:
        if self.rollouts.sample_ahead and self.preferences is not None:
            raise ValueError(
                "rollouts.sample_ahead: with preferences, the run draws no samples; leave it out"
            )
        return self

    @model_validator(mode="after")
    def _fork_has_epochs(self) -> RunConfig:
        if self.fork and self.epochs <= self.fork.epoch:
            raise ValueError(
                f"epochs {self.epochs}: the fork's first epoch is {self.fork.epoch}, and they are "
                f"counted from 0; expected at least {self.fork.epoch + 1}"
            )
        return self

    @model_validator(mode="after")
    def _algorithm_fits(self) -> RunConfig:
        together, size = self.algorithm.needs.samples_per_loss, self.numerics.micro_batch_size
        if size != "auto" and size % together:
            raise ValueError(
                f"numerics.micro_batch_size {size} is not a multiple of {together}: "
                f"algorithm.type {self.algorithm.type} compares {together} samples in one forward; "
                f"set it to {size + together - size % together}"
            )
        self.algorithm.check_reward(normalises_by_group=self.reward.normalises_by_group)
        self.algorithm.check_run(
            RunSettings(
                samples_per_epoch=self.rollouts.samples_per_epoch,
                samples_per_prompt=self.rollouts.samples_per_prompt,
                deterministic_because=self.sampler.deterministic_because,
                final_latents_only=self.rollouts.store_trajectories == "final",
                keeps_base_model=isinstance(self.trainable, LoraConfig),
                off_policy=self._off_policy_setting,
                samples_ahead=self.rollouts.sample_ahead,
                log_probs_are_densities=self.sampler.log_probs_are_densities,
            )
        )
        return self

    @model_validator(mode="after")
    def _compiles(self) -> RunConfig:
        if self.numerics.compile and self.splits_network:
            raise ValueError(
                f"numerics.compile: engine.type {self.engine.type} splits the network in full "
                "fine-tuning, layer by layer, and compiled blocks cannot be split; leave it out, "
                "or set engine.type to local"
            )
        return self

    @model_validator(mode="after")
    def _offloads(self) -> RunConfig:
        numerics = self.numerics
        if not numerics.offload_activations:
            return self
        if numerics.compile or self.splits_network:
            cause = (
                "compiled blocks, with numerics.compile: true"
                if numerics.compile
                else f"layers that processes split, with engine.type {self.engine.type}"
            )
            raise ValueError(
                f"numerics.offload_activations: it has not been tried on {cause}; use "
                "numerics.gradient_checkpointing instead"
            )
        if numerics.micro_batch_size == "auto":
            raise ValueError(
                "numerics.offload_activations: micro_batch_size: auto would fill this machine's "
                "memory, since the GPU's hardly grows with the batch; set a number"
            )
        return self

    @model_validator(mode="after")
    def _keeps_whole_moments(self) -> RunConfig:
        if self.optimizer.eight_bit and self.splits_network:
            raise ValueError(
                f"optimizer.eight_bit: engine.type {self.engine.type} splits moments in full "
                "fine-tuning, and bitsandbytes keeps them whole; leave it out, or set engine.type "
                "to local"
            )
        return self

    @property
    def _off_policy_setting(self) -> str | None:
        """The setting by which samples may come from another policy; None if none does."""
        if self.rollouts.sample_ahead:
            return "rollouts.sample_ahead"
        return "fork.off_policy" if self.fork and self.fork.off_policy else None

    def is_off_policy(self, epoch: int) -> bool:
        """Return whether an epoch's samples may come from another policy than the one trained."""
        inherits = self.fork is not None and self.fork.off_policy and self.fork.inherits(epoch)
        return inherits or self.rollouts.sample_ahead

    @property
    def splits_network(self) -> bool:
        """Whether several processes split the network between them."""
        full = isinstance(self.trainable, FullConfig)
        return full and not isinstance(self.engine, LocalEngine)

    @model_validator(mode="after")
    def _preferences_fit(self) -> RunConfig:
        if self.preferences is None:
            return self
        if self.algorithm.needs.data != "final_latents":
            raise ValueError(
                f"preferences: algorithm.type {self.algorithm.type} trains on trajectories, and "
                "the images of preference pairs have none; set algorithm.type to dpo"
            )
        if self.stored_trajectories == "full":
            raise ValueError(
                "preferences: the images of preference pairs have no trajectories, and "
                "rollouts.store_trajectories is full; leave it out"
            )
        if self.rollouts.samples_per_prompt != 2:
            raise ValueError(
                "preferences: both images of a pair are a group, and rollouts.samples_per_prompt "
                f"is {self.rollouts.samples_per_prompt}; set it to 2"
            )
        return self

    @property
    def stored_trajectories(self) -> Literal["full", "final"]:
        """What a trajectory shard holds, `auto` resolved."""
        if self.rollouts.store_trajectories != "auto":
            return self.rollouts.store_trajectories
        return "final" if self.algorithm.needs.data == "final_latents" else "full"

    @property
    def smallest_batches(self) -> NumericsConfig:
        """The numerics, with the smallest batch that is allowed in place of each `auto`."""
        smallest = {
            "sample_batch_size": 1,
            "micro_batch_size": self.algorithm.needs.samples_per_loss,
        }
        sought = {n: size for n, size in smallest.items() if getattr(self.numerics, n) == "auto"}
        return self.numerics.changed(**sought)

    def whole(self) -> dict[str, JsonValue]:
        """Return all settings as plain JSON, from which the config can be read again."""
        return self.model_dump(mode="json")

    def identity(self) -> dict[str, JsonValue]:
        """Return the half that may not change under a run_id, numerics apart, as plain JSON."""
        return self.model_dump(mode="json", exclude=set(OPERATION_FIELDS | {"numerics"}))

    def operation(self) -> dict[str, JsonValue]:
        """Return the half that may change under a run_id, as plain JSON."""
        return self.model_dump(mode="json", include=set(OPERATION_FIELDS))
