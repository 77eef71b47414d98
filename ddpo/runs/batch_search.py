"""Batch sizes that are `auto`: found by running a loaded model, at the first start of a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import psutil
import torch

from ddpo.algorithms.denoising import DenoisingAlgorithm
from ddpo.algorithms.policy_gradient import PolicyGradient
from ddpo.config import AnyEngine, LocalEngine, RayEngine, RunConfig, SamplerConfig
from ddpo.config.model import size_of
from ddpo.diffusion.sampling import sample
from ddpo.diffusion.window import process_of, sampler_of_epoch, whole_process
from ddpo.errors import ConfigError
from ddpo.memory.counting import LiveBytes
from ddpo.models import Policy
from ddpo.models.numerics import Numerics
from ddpo.runs.batch_choice import candidates, choose, no_longer_gains
from ddpo.training.dry_run import shortened
from ddpo.training.loop import initial_state, update
from ddpo.training.noising import Noiser
from ddpo.training.samples import FinalLatents, Rollouts, Samples
from ddpo.training.trajectory_gradient import TrajectoryGradient

_PROMPT = "a prompt"
_STEPS = 2
"""Denoising steps of the samples that an update is tried on; an epoch's own may be hundreds."""
_REPETITIONS = 3
"""How often a size is measured at most, after a first time that is not counted; the least time
counts, since what else the machine does only adds to it."""
_LONG_S = 3.0
"""A size is not measured again once it has been for so long."""
_BUDGET_S = 60.0
"""No larger size is tried once sampling, or the update, has been measured for so long."""
_SHARE = 0.8
"""Of the free memory, what a batch may take."""


@dataclass(frozen=True)
class BatchSizes:
    """What was found."""

    sample: int
    """`numerics.sample_batch_size`."""
    micro: int
    """`numerics.micro_batch_size`."""
    message: str
    """What to tell a user."""


@dataclass(frozen=True)
class _Cost:
    """What a batch takes, in seconds for each of its images or items."""

    whole: float
    """Of sampling an image, or of a forward and backward for an item."""
    forward: float = 0.0
    """Of one prediction alone."""


@dataclass(frozen=True)
class _Items:
    """How many items an epoch's update has."""

    largest_step: int
    """Of the largest optimizer step."""
    per_image: float
    """Of all steps, for each image of the epoch."""
    per_pass: int
    """Of an image in one pass over the samples."""


class BatchSearch:
    """Measures a loaded policy; configs that differ in nothing that matters are measured once.

    Args:
        policy: On its device, not compiled. Its trained weights and numerics change.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self._found: dict[str, BatchSizes] = {}

    def sizes(self, config: RunConfig) -> BatchSizes:
        """Return the batch sizes of a run.

        Args:
            config: The run's; one of its batch sizes or both are `auto`.

        Raises:
            ConfigError: The number of workers is not known.
            NonFiniteError: The model's samples or losses are NaN or infinite.
        """
        parts = {"trainable", "rollouts", "sampler", "algorithm", "optimizer", "numerics"}
        key = config.model_dump_json(include={*parts, "engine", "evaluation"})
        if key not in self._found:
            self._found[key] = self._search(config)
        return self._found[key]

    def _search(self, config: RunConfig) -> BatchSizes:
        policy, shard_size = self.policy, config.rollouts.shard_size
        together = config.algorithm.needs.samples_per_loss
        items = _items_of(policy, config)
        policy.prepare_prompts([_PROMPT])
        sampling: dict[int, _Cost] = {}
        training: dict[int, _Cost] = {}
        smallest, numerics = config.smallest_batches, config.numerics
        workers = _workers(config.engine, policy.numerics.device)
        room = _Room(policy, workers)
        if numerics.sample_batch_size == "auto":
            measure = partial(_sampling, policy, sampler_of_epoch(policy, config, 0))
            sizes = candidates(shard_size, shard_size, given=numerics.micro_batch_size)
            evaluate = partial(_evaluating, policy, config)
            sampling = _measured(sizes, measure, room, evaluate)
        if numerics.micro_batch_size == "auto":
            most = -(-items.largest_step // workers)
            sizes = candidates(shard_size, most, together, given=numerics.sample_batch_size)
            training = _measured(sizes, _Updates(policy, config).measure, room)
        images = {size: cost.whole for size, cost in sampling.items()}
        trained = {size: cost.whole for size, cost in training.items()}
        sample_size, micro_size = choose(
            images or {cast(int, smallest.sample_batch_size): 0.0},
            {size: seconds * items.per_image for size, seconds in trained.items()}
            or {cast(int, smallest.micro_batch_size): 0.0},
            _cost_of_difference(config, policy.numerics, items.per_pass * _forward(sampling)),
        )
        message = (
            f"numerics.sample_batch_size {sample_size}{_shown(images, 'image')}, "
            f"numerics.micro_batch_size {micro_size}{_shown(trained, 'item')}"
        )
        if (numerics.sample_batch_size == "auto" and not sampling) or (
            numerics.micro_batch_size == "auto" and not training
        ):
            message += "; not even the smallest seems to fit into memory"
        if config.algorithm.needs.data == "trajectories" and sample_size != micro_size:
            message += "; as they differ, importance ratios start at 1 up to rounding only"
        return BatchSizes(sample_size, micro_size, message)


class _Updates:
    """Updates of one policy, from the same weights each time, with AdamW's moments.

    Args:
        policy: Its weights and numerics change.
        config: The run's.
    """

    def __init__(self, policy: Policy, config: RunConfig) -> None:
        self.policy, self.config = policy, shortened(config, _STEPS)
        needs, ema = config.algorithm.needs, config.optimizer.ema_decay is not None
        self.together = needs.samples_per_loss
        self.per_image = _items_of(policy, self.config).per_pass
        self.state = initial_state(policy, ema=ema, old=needs.keeps_old)
        self.weights = self.state.weights
        policy.numerics = policy.numerics.batched(1, self.together, compiled=False)
        # No item is its neighbour's, which would be predicted with it.
        number = max(self.together, 2)
        self.drawn = sample(policy, [_PROMPT] * number, range(number), self.config.sampler)

    def measure(self, size: int) -> _Cost:
        """Run an update of about two micro-batches."""
        self.policy.numerics = self.policy.numerics.batched(size, size, compiled=False)
        count = self.together * -(-2 * size // (self.together * self.per_image))
        credit = self.config.algorithm.credit_of_all(count)
        samples = self._samples(count)
        self.policy.weights.load(self.weights)
        ended = began = _clock_s(self.policy)

        def note(_: float) -> None:
            nonlocal ended
            _wait_for(self.policy)
            ended = _clock_s(self.policy)  # the optimizer's step, which comes after, is no item's

        state, _ = update(
            *(self.policy, self.state, samples, credit, {}, self.config), on_progress=note
        )
        self.state = replace(state, weights=self.weights, epoch=0)
        return _Cost((ended - began) / (count * self.per_image))

    def _samples(self, count: int) -> Samples:
        rows = torch.arange(count) % len(self.drawn.latents)
        latents, prompts = self.drawn.latents[rows], [_PROMPT] * count
        if self.config.algorithm.needs.data == "final_latents":
            return FinalLatents(prompts, latents[:, -1])
        return Rollouts(prompts, latents, self.drawn.log_probs[rows])


class _Room:
    """Whether batches fit into a device's memory.

    Args:
        policy: On its device.
        workers: Processes that run such batches at once, each on a GPU of its own.
    """

    def __init__(self, policy: Policy, workers: int) -> None:
        self.policy = policy
        self.on_cuda = policy.numerics.device == "cuda"
        if self.on_cuda:
            torch.cuda.empty_cache()
            self.limit = torch.cuda.memory_allocated() + _SHARE * torch.cuda.mem_get_info()[0]
        else:
            self.limit = _SHARE * psutil.virtual_memory().available / workers
        self._each = 0.0

    def clear(self) -> None:
        """Forget what batches of another kind took."""
        self._each = 0.0

    def may_fit(self, size: int) -> bool:
        """Return whether a size is worth a try: where memory cannot be probed, it is foreseen."""
        return self._each * size <= self.limit

    def fits(self, size: int, run: Callable[[int], object]) -> bool:
        """Run a batch for the first time, and return whether it fits."""
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats()
        try:
            with nullcontext() if self.on_cuda else LiveBytes() as counter:
                run(size)
        except torch.OutOfMemoryError:
            return False
        if counter is None:
            return torch.cuda.max_memory_allocated() <= self.limit
        self._each = counter.peak / size
        return True


def _evaluating(policy: Policy, config: RunConfig, size: int) -> None:
    """Predict and decode a batch of an evaluation, if the run has any."""
    if config.evaluation:
        sampler = config.evaluation.sampler_of(config.sampler).changed(window=None)
        with policy.sized(size_of(config.evaluation.resolution)):
            _sampling(policy, sampler, size)


def _sampling(policy: Policy, sampler: SamplerConfig, size: int) -> _Cost:
    """Predict and decode a batch once."""
    process = process_of(policy, sampler)
    conditioning = policy.encode([_PROMPT] * size)
    noise = torch.randn((size, *policy.latent_shape), device=policy.device)
    latents, times = noise * process.initial_noise_scale, process.times[0].expand(size)
    _wait_for(policy)
    began = _clock_s(policy)
    with torch.no_grad():
        policy.predict(latents, times, conditioning, sampler.guidance_scale)
    _wait_for(policy)
    predicted = _clock_s(policy)
    policy.decode(latents)
    forward, decoding = predicted - began, _clock_s(policy) - predicted
    return _Cost((process.steps * forward + decoding) / size, forward / size)


def _measured(
    sizes: Sequence[int],
    measure: Callable[[int], _Cost],
    room: _Room,
    beside: Callable[[int], object] = lambda size: None,
) -> dict[int, _Cost]:
    """Return what sizes take, up to where larger ones gain nothing or do not fit into memory.

    Args:
        sizes: From the smallest.
        measure: Runs a batch.
        room: Of the device.
        beside: Runs what has to fit as well, and is not measured.
    """

    def run(size: int) -> None:
        beside(size)
        measure(size)

    found: dict[int, _Cost] = {}
    room.clear()
    policy = room.policy
    began = _clock_s(policy)
    for size in sizes:
        if found and _clock_s(policy) - began > _BUDGET_S:
            break
        if not room.may_fit(size) or not room.fits(size, run):
            break
        found[size] = min(_repeated(partial(measure, size), policy), key=lambda cost: cost.whole)
        if no_longer_gains([cost.whole for cost in found.values()]):
            break
    return found


def _repeated(measure: Callable[[], _Cost], policy: Policy) -> list[_Cost]:
    began = _clock_s(policy)
    costs = [measure()]
    while len(costs) < _REPETITIONS and _clock_s(policy) - began < _LONG_S:
        costs.append(measure())
    return costs


def _items_of(policy: Policy, config: RunConfig) -> _Items:
    algorithm, images = config.algorithm, config.rollouts.samples_per_epoch
    if algorithm.needs.data == "trajectories":
        sampler = sampler_of_epoch(policy, config, 0)
        gradient = TrajectoryGradient(policy, sampler, cast(PolicyGradient, algorithm))
        per_pass = len(gradient.trained_steps())
    else:
        process, times = whole_process(policy, config.sampler), cast(DenoisingAlgorithm, algorithm)
        per_pass = Noiser(policy, process, times.times, config.seed, 0).times_per_sample
    credit = algorithm.credit_of_all(images)
    steps = [len(u.samples) for u in algorithm.updates(credit, run_seed=config.seed, epoch=0)]
    return _Items(max(steps) * per_pass, sum(steps) * per_pass / images, per_pass)


def _cost_of_difference(config: RunConfig, numerics: Numerics, forwards: float) -> float | None:
    """Return the seconds per image that unequal sizes cost; None if they need not be equal.

    Args:
        config: The run's.
        numerics: Of the device.
        forwards: Seconds to compute an image's log-probs once more.
    """
    algorithm = config.algorithm
    if algorithm.needs.data != "trajectories" or config.rollouts.sample_ahead:
        return None
    if cast(PolicyGradient, algorithm).tolerated_deviation in (0.0, float("inf")):
        return None  # they are always computed again, or never
    return 0.0 if numerics.exact else forwards


def _forward(costs: Mapping[int, _Cost]) -> float:
    return min((cost.forward for cost in costs.values()), default=0.0)


def _workers(engine: AnyEngine, device: str) -> int:
    """Return how many processes share the micro-batches of an update.

    Raises:
        ConfigError: Nobody knows before Ray has started them.
    """
    if isinstance(engine, LocalEngine):
        return 1
    if isinstance(engine, RayEngine) and not engine.workers:
        raise ConfigError(
            "numerics: batch sizes that are `auto` depend on the number of workers; set "
            "engine.workers, or numbers for both sizes"
        )
    return engine.workers or (torch.cuda.device_count() if device == "cuda" else 1)


def _clock_s(policy: Policy) -> float:
    """Return the time in seconds that batches are compared by.

    On a CPU that of this process, per thread, since other processes may keep the cores busy.
    """
    if policy.numerics.device == "cpu":
        return time.process_time() / policy.numerics.threads
    return time.perf_counter()


def _wait_for(policy: Policy) -> None:
    if policy.numerics.device == "cuda":
        torch.cuda.synchronize()
    elif policy.numerics.device == "mps":
        torch.mps.synchronize()


def _shown(seconds: Mapping[int, float], unit: str) -> str:
    """Return what was measured, in milliseconds by size; nothing if nothing was."""
    if not seconds:
        return ""
    each = ", ".join(f"{size}: {1000 * value:.3g}" for size, value in seconds.items())
    return f" (ms per {unit} by size: {each})"
