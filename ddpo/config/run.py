"""A whole run's config, and the parts of its identity."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    JsonValue,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from ddpo.algorithms import AnyAlgorithm, DdpoIs
from ddpo.algorithms.base import RunSettings
from ddpo.basics.part import Part, check_divides, is_auto, is_off, is_one
from ddpo.config.fork import ForkConfig
from ddpo.config.operation import StorageConfig, TrackingConfig


class ModelConfig(Part):
    """The diffusion pipeline that is fine-tuned: Stable Diffusion 1.x or 2.x, or the starter."""

    path: str
    """`starter`, a folder that holds `model_index.json`, or a hub id such as `owner/name`."""
    revision: str | None = None
    """Commit of a hub model. Pin it: a branch may move under a run."""
    resolution: PositiveInt | None = None
    """Pixels a side; by default the size that the model was trained at."""


class LoraConfig(Part):
    """Train low-rank adapters on the UNet's attention (peft)."""

    type: Literal["lora"] = "lora"
    rank: PositiveInt = 4
    """Rank of the adapters; 4 is the paper's code's, and its file is a few MB."""
    alpha: PositiveFloat = 4.0
    """The adapter's output is scaled by alpha / rank."""
    target_modules: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Names of the layers that get an adapter, as peft matches them."""


class FullConfig(Part):
    """Train every weight of the UNet. Wants a learning rate near 1e-5: LoRA's collapses it."""

    type: Literal["full"]


class NamedConfig(Part):
    """Something by name, with its parameters."""

    name: str
    """A registered name, or an import path `package.module:attribute` of your own."""
    parameters: dict[str, JsonValue] = Field(default_factory=dict)
    """Checked against what the named thing takes."""


class RewardConfig(NamedConfig):
    """A reward, and what becomes of samples that it cannot score."""

    tries: PositiveInt = 2
    """How often a sample is scored before it counts as failed."""
    on_failure: Literal["drop", "impute", "fail"] = "drop"
    """`drop`: failed samples stay out of all statistics and train nothing. `impute`: they count as
    their prompt's mean in the update, and stay out of all statistics; where the prompt has no
    reward yet, they are dropped. `fail`: the shard's task fails, and with it the run."""


class WindowConfig(Part):
    """Train some consecutive denoising steps only."""

    steps: PositiveInt
    """How many. An update costs steps / T of what all of them cost."""
    position: NonNegativeInt | Literal["random"] = "random"
    """The first of them, 0 being the noisiest step; or `random`, drawn anew for each epoch."""
    noise_only_there: bool = False
    """Draw with noise in the window alone, and deterministically outside: what a picture's reward
    says about noise is then about the noise of the window."""


class SamplerConfig(Part):
    """How trajectories are drawn: DDIM with eta (arXiv 2010.02502)."""

    steps: PositiveInt = 50
    """Denoising steps a picture, T."""
    eta: float = Field(default=1.0, ge=0.0, le=1.0)
    """Noise of a step: 1 is DDPM's, 0 is deterministic and leaves nothing to train on but for
    regression."""
    guidance_scale: float = Field(default=5.0, ge=1.0)
    """Classifier-free guidance, in sampling and in the update alike; 1 is none."""
    window: WindowConfig | None = Field(default=None, exclude_if=is_off)
    """Which steps are trained; by default all."""

    @model_validator(mode="after")
    def _window_fits(self) -> SamplerConfig:
        window = self.window
        if window is None:
            return self
        if window.steps > self.steps:
            raise ValueError(
                f"window.steps {window.steps} is more than the {self.steps} denoising steps; "
                f"set it to at most {self.steps}"
            )
        last = self.steps - window.steps
        if window.position != "random" and window.position > last:
            raise ValueError(
                f"a window of {window.steps} steps at position {window.position} reaches beyond "
                f"the last of {self.steps} denoising steps; set window.position to at most {last}"
            )
        return self


class RolloutsConfig(Part):
    """How many samples an epoch draws, and what is stored of them."""

    samples_per_epoch: PositiveInt = 256
    """Pictures an epoch. More make the gradient truer and the epoch longer."""
    samples_per_prompt: PositiveInt = Field(default=1, exclude_if=is_one)
    """Size of a group: this many consecutive samples share a prompt. 1 samples a prompt for each
    image."""
    shard_size: PositiveInt = 64
    """Pictures a task: what is committed, scored and redone as one."""
    store_trajectories: Literal["auto", "full", "final"] = Field(default="auto", exclude_if=is_auto)
    """`full`: all latents of a trajectory and its log-probs, which DDPO trains on. `final`: the
    last latents alone, 1 / (steps + 1) of the bytes, which is all that regression needs. `auto`
    takes what the algorithm needs."""


class OptimizerConfig(Part):
    """AdamW, as the paper's code sets it."""

    learning_rate: PositiveFloat = 3e-4
    """3e-4 for LoRA on Stable Diffusion, 1e-5 for the whole UNet."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the two moments."""
    weight_decay: NonNegativeFloat = 1e-4
    """Decoupled weight decay."""
    epsilon: PositiveFloat = 1e-8
    """Added to the root of the second moment."""
    max_grad_norm: PositiveFloat = 1.0
    """The gradient's global norm is clipped to this."""
    ema_decay: float | None = Field(default=None, gt=0.0, lt=1.0, exclude_if=is_off)
    """Keep an exponential moving average of the trained weights beside them: after each optimizer
    step ema = decay * ema + (1 - decay) * weights. Pictures are drawn with it and it is what is
    exported; rollouts are of the trained weights. By default none."""


class NumericsConfig(Part):
    """What the bytes of a result depend on. `auto` is settled at the first start and frozen."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """`auto` takes a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Of the UNet's arithmetic; trained weights stay float32. `auto`: bfloat16 on CUDA, or float16
    where the GPU lacks it; float32 elsewhere."""
    sample_batch_size: PositiveInt = 8
    """Pictures a forward while sampling (guidance doubles it inside)."""
    micro_batch_size: PositiveInt = 8
    """(sample, timestep) pairs a forward and backward in the update. Any size gives the same
    gradient; equal to sample_batch_size it repeats the sampler's forwards to the bit."""
    threads: PositiveInt | Literal["auto"] = "auto"
    """CPU threads of torch."""
    tf32: bool = True
    """TF32 matrix products on CUDA."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward: less memory, about a third more time."""


Trainable = Annotated[LoraConfig | FullConfig, Field(discriminator="type")]

OPERATION_FIELDS = frozenset({"epochs", "storage", "tracking", "outputs"})
"""The half of a config that may change under a run_id."""


class RunConfig(Part):
    """One run, whole."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """What everything random is derived from."""
    model: ModelConfig
    """A path alone (`model: starter`) is short for `model: {path: starter}`."""
    trainable: Trainable = LoraConfig()
    """`type: lora` or `type: full`."""
    prompts: NamedConfig
    """The prompts to draw from, all with equal chance."""
    rollouts: RolloutsConfig = RolloutsConfig()
    """How many samples an epoch draws, and what is stored of them."""
    sampler: SamplerConfig = SamplerConfig()
    """How pictures are drawn."""
    reward: RewardConfig
    """What is to be raised."""
    algorithm: AnyAlgorithm = DdpoIs()
    """How rewards become gradients."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """How gradients become weights."""
    numerics: NumericsConfig = NumericsConfig()
    """Batches, dtype, device."""
    fork: ForkConfig | None = Field(default=None, exclude_if=is_off)
    """Where the run branches off another; by default it starts from the base model."""
    epochs: PositiveInt = 100
    """Rounds of sampling and updating. May be raised later: the run goes on. A fork's are counted
    from the start of the run that it branches off."""
    storage: StorageConfig = StorageConfig()
    """Where the run is remembered."""
    tracking: TrackingConfig = TrackingConfig()
    """Where the run is shown."""
    outputs: str = "ddpo-data/outputs"
    """Local folder for the report and the trained weights, a folder a run."""

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
        check_divides(
            "numerics.sample_batch_size",
            self.numerics.sample_batch_size,
            "rollouts.shard_size",
            self.rollouts.shard_size,
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
        self.algorithm.check_run(
            RunSettings(
                samples_per_epoch=self.rollouts.samples_per_epoch,
                samples_per_prompt=self.rollouts.samples_per_prompt,
                stochastic=self.sampler.eta > 0,
                final_latents_only=self.rollouts.store_trajectories == "final",
                keeps_base_model=isinstance(self.trainable, LoraConfig),
                off_policy=self.fork is not None and self.fork.off_policy,
            )
        )
        return self

    @property
    def stored_trajectories(self) -> Literal["full", "final"]:
        """What a trajectory shard holds, `auto` resolved."""
        if self.rollouts.store_trajectories != "auto":
            return self.rollouts.store_trajectories
        return "final" if self.algorithm.needs.data == "final_latents" else "full"

    def identity(self) -> dict[str, JsonValue]:
        """Return the half that may not change under a run_id, numerics apart, as plain JSON."""
        return self.model_dump(mode="json", exclude=set(OPERATION_FIELDS | {"numerics"}))

    def operation(self) -> dict[str, JsonValue]:
        """Return the half that may change under a run_id, as plain JSON."""
        return self.model_dump(mode="json", include=set(OPERATION_FIELDS))
