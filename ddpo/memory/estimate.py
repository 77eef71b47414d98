"""What a config's sampling and update need on the device, by running both on `meta`."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ddpo.config import RunConfig, SolverSampler
from ddpo.config.model import Size, size_of
from ddpo.config.sampler import SamplerConfig
from ddpo.diffusion.sampling import sample
from ddpo.memory.counting import LiveBytes, Peaks, Phase
from ddpo.memory.kernels import GpuKernels, checkpointed
from ddpo.models.numerics import Numerics
from ddpo.models.outline import Outline, outline
from ddpo.training.dry_run import shortened
from ddpo.training.loop import initial_state, update
from ddpo.training.optimizer import make_adamw, optimizer_state
from ddpo.training.samples import FinalLatents, Rollouts, Samples
from ddpo.training.state import TrainState

_STEPS = 2
"""Denoising steps that are run: the second has the latents of the first beside it, and each further
one adds its own, which are added up."""
_PROMPT = "a prompt"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the device: what lives all the time, and the peak of each phase with it."""

    frozen: int
    """Weights that are not trained, of network and autoencoder."""
    trained: int
    """Trained weights; during an update their gradient is as large, and AdamW's moments are twice
    as large, or half as large in 8 bits."""
    text_encoders: int
    """Weights of the text encoders; on a GPU only while they encode."""
    peaks: Mapping[Phase, int]
    """The most bytes that live at once in each phase that was run."""

    @property
    def peak(self) -> int:
        """The most bytes that live at once."""
        return max(self.peaks.values())

    @property
    def largest(self) -> Phase:
        """The phase of the peak."""
        return max(self.peaks, key=lambda phase: self.peaks[phase])


def estimate(
    config: RunConfig,
    numerics: Numerics,
    *,
    prompts: int | None = None,
    parts: Collection[Phase] = ("sample", "update"),
) -> MemoryEstimate:
    """Estimate what a config needs on its device, without weights and without computing.

    The same code runs as in training, on the shapes that the model's JSON files describe. What
    kernels need while they run, the CUDA context (about half a GB) and what an allocator keeps come
    on top; so do the networks of rewards.

    Args:
        config: The run's.
        numerics: Resolved, of the run's device, which need not be here.
        prompts: Size of the prompt set; by default every sample may have a prompt of its own.
        parts: What is run after the encoding of a prompt: ``sample``, with ``decode``, and
            ``update``.

    Returns:
        Bytes. On a CPU, all memory of tensors is the device's.

    Raises:
        ConfigError: Size or trainable weights do not fit the model.
        ModelError: The model is neither on disk nor reachable, or cannot be trained.
    """
    policy = outline(config.model, config.trainable, numerics)
    if numerics.gradient_checkpointing:
        policy.network.enable_gradient_checkpointing(checkpointed)
    on_cpu = numerics.device == "cpu"
    counter = LiveBytes({"meta", "cpu"} if on_cpu else {"meta"})
    peaks = Peaks(counter)
    encoders = sum(each.nbytes for each in policy.passing)

    @contextmanager
    def in_phase(name: Phase) -> Iterator[None]:
        passing = encoders if name == "encode" and not on_cpu else 0
        with peaks.phase(name), counter.holding(passing):
            yield

    policy.in_phase = in_phase
    counter.count(policy.resident)
    counter.pass_over(policy.passing)  # which come and go: `encoders` stands for them
    with LiveBytes(()), GpuKernels():
        state = _trained_state(policy, config)
    with counter, counter.holding(encoders if on_cpu else 0), GpuKernels():
        policy.prepare_prompts([_PROMPT])
        row = sum(each.nbytes for each in policy.encode([_PROMPT]).tensors.values())
        if "sample" in parts:
            others = _others(config.rollouts.shard_size, prompts)
            with peaks.phase("sample"), counter.holding(others * row):
                _sample(policy, config, counter)
        if "update" in parts:
            beside = _others(config.rollouts.samples_per_epoch, prompts) * row
            if on_cpu:  # where the state that the epoch starts from is, too
                beside += _bytes_of(state)
            with (
                peaks.phase("update"),
                counter.holding(beside),
                warnings.catch_warnings(),
            ):
                # Other weight sets pass through the CPU, and copies onto `meta` do nothing.
                warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")
                _update(policy, config, state)
    parameters = [each for each in policy.resident if each.requires_grad]
    trained = sum(each.nbytes for each in parameters)
    return MemoryEstimate(
        frozen=sum(each.nbytes for each in policy.resident) - trained,
        trained=trained,
        text_encoders=encoders,
        peaks=peaks.found,
    )


def _others(samples: int, prompts: int | None) -> int:
    """Return how many distinct prompts some samples have at most, beside the one that is run."""
    return min(samples, prompts or samples) - 1


def _sample(policy: Outline, config: RunConfig, counter: LiveBytes) -> None:
    """Sample one batch of an epoch in fewer steps, and one of an evaluation if there are any."""
    samplers: list[tuple[SamplerConfig, Size | None]] = [(config.sampler, None)]
    if config.evaluation:
        size = size_of(config.evaluation.resolution)
        samplers.append((config.evaluation.sampler_of(config.sampler), size))
    batch = policy.numerics.sample_batch_size
    for sampler, size in samplers:
        order = sampler.order if isinstance(sampler, SolverSampler) else 1
        steps = min(sampler.steps, _STEPS + order - 1)  # until a solver remembers all it will
        with policy.sized(size):
            latents = torch.Size(policy.latent_shape).numel() * torch.float32.itemsize
            with counter.holding((sampler.steps - steps) * batch * latents):
                shorter = sampler.changed(steps=steps, window=None)
                sample(policy, [_PROMPT] * batch, [*range(batch)], shorter)


def _update(policy: Outline, config: RunConfig, state: TrainState) -> None:
    """Take one optimizer step of two micro-batches: the second has the first's gradient beside."""
    size = policy.numerics.micro_batch_size
    shorter = shortened(config, _STEPS)
    samples: Samples
    algorithm = shorter.algorithm
    if algorithm.needs.data == "trajectories":
        count = size
        # No two alike, which would be predicted once; and they take no room.
        numbers = torch.arange(float(count)).view(-1, 1, *(1 for _ in policy.latent_shape))
        latents = numbers.expand(-1, _STEPS + 1, *policy.latent_shape)
        samples = Rollouts([_PROMPT] * count, latents, torch.zeros(count, _STEPS))
    else:
        count = 2 * size
        samples = FinalLatents([_PROMPT] * count, _zeros(count, *policy.latent_shape))
    credit = algorithm.credit_of_all(count)
    update(policy, state, samples, credit, {}, shorter)


def _trained_state(policy: Outline, config: RunConfig) -> TrainState:
    """Return a state after some epoch, with AdamW's moments."""
    parameters = policy.weights.parameters()
    adamw = make_adamw(parameters, config.optimizer, {})
    for parameter in parameters.values():
        parameter.grad = torch.empty_like(parameter)
    adamw.step()
    adamw.zero_grad(set_to_none=True)
    moments = {
        name: _zeros(*value.shape, dtype=value.dtype)
        for name, value in optimizer_state(adamw, parameters).items()
    }
    start = initial_state(policy, ema=config.optimizer.ema_decay is not None)
    kept = config.algorithm.needs.keeps_old
    old = {name: _zeros(*value.shape) for name, value in start.weights.items() if kept}
    return replace(start, optimizer=moments, old=old)


def _bytes_of(state: TrainState) -> int:
    parts = (state.weights, state.optimizer, state.ema, state.old)
    tensors = {id(each): each for part in parts for each in part.values()}
    return sum(each.numel() * each.element_size() for each in tensors.values())


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return zeros that take no room."""
    return torch.zeros((), dtype=dtype).expand(shape)
