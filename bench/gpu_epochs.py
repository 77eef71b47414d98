"""Epochs of random models, timed and counted: what `bench.gpu` measures, one case after another."""

from __future__ import annotations

import multiprocessing
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ddpo.basics.digests import tensors_digest
from ddpo.config import RunConfig
from ddpo.config.files import parse_config
from ddpo.diffusion.sampling import sample
from ddpo.errors import DdpoError
from ddpo.models import Policy, load_policy
from ddpo.models.numerics import resolve_numerics
from ddpo.training.loop import initial_state, update
from ddpo.training.samples import Rollouts
from ddpo.training.state import TrainState

BATCHES_PER_EPOCH = 2


@dataclass(frozen=True)
class Case:
    """What is measured once."""

    family: str
    """One of `bench.random_models.FAMILIES`."""
    batch: int
    """Images per forward in sampling, and pairs in the update."""
    dtype: str
    """Of the denoising network's arithmetic."""
    compile: bool
    """`numerics.compile`."""
    checkpointing: bool
    """`numerics.gradient_checkpointing`."""
    offloading: bool
    """`numerics.offload_activations`."""
    tf32: bool
    """`numerics.tf32`."""


@dataclass(frozen=True)
class Model:
    """The model of a family on this machine's disk, and how it is sampled."""

    folder: Path
    """Of the pipeline."""
    family: str
    """One of `bench.random_models.FAMILIES`."""
    device: str
    """`cuda` or `cpu`."""
    tiny: bool
    """Whether its parts are tiny."""
    resolution: int | None
    """Pixels along a side; None for the model's own."""
    steps: int
    """Denoising steps."""

    def config(self, case: Case, samples: int | None = None) -> RunConfig:
        """Return the run of a case.

        Args:
            case: Batch, dtype and options.
            samples: Of an epoch; by default some batches.
        """
        flow = self.family in ("sd3", "flux")
        resolution = self.resolution or (16 if self.tiny else None)
        model: dict[str, Any] = {"path": str(self.folder)}
        model |= {"resolution": resolution} if resolution else {}
        model |= {"text_tokens": 6} if flow and self.tiny else {}
        count = samples or BATCHES_PER_EPOCH * case.batch
        return parse_config(
            {
                "model": model,
                "prompts": {"name": "simple_animals"},
                "reward": {"name": "jpeg_compressibility"},
                "rollouts": {"samples_per_epoch": count, "shard_size": count},
                "sampler": {
                    "type": "flow_sde" if flow else "ddim",
                    "steps": self.steps,
                    "guidance_scale": 3.5 if flow else 5.0,
                },
                "algorithm": {"type": "ddpo_is", "updates_per_epoch": 1},
                "numerics": {
                    "device": self.device,
                    "dtype": case.dtype,
                    "compile": case.compile,
                    "gradient_checkpointing": case.checkpointing,
                    "offload_activations": case.offloading,
                    "tf32": case.tf32,
                    "sample_batch_size": case.batch,
                    "micro_batch_size": case.batch,
                },
            },
            "bench.gpu",
        )


@dataclass(frozen=True)
class Epoch:
    """One epoch of sampling and updates."""

    state: TrainState
    """After it."""
    sampling_s: float
    """Wall seconds of sampling, decoding included."""
    update_s: float
    """Wall seconds of the update."""
    sampling_peak_bytes: int
    """Most memory that tensors had on the GPU while sampling; 0 on a CPU."""
    update_peak_bytes: int
    """The same in the update."""
    metrics: dict[str, Any]
    """Of the update."""

    @property
    def digest(self) -> str:
        """Of the trained weights and the optimizer after it."""
        return tensors_digest({**self.state.weights, **self.state.optimizer})


def load(config: RunConfig) -> Policy:
    """Load a run's model."""
    numerics = resolve_numerics(config.numerics)
    return load_policy(config.model, config.trainable, numerics, seed=config.seed)


def run_epoch(policy: Policy, state: TrainState, config: RunConfig) -> Epoch:
    """Run epoch ``state.epoch``, whose prompts, noise and rewards depend on nothing else."""
    count = config.rollouts.samples_per_epoch
    prompts = [("a cat", "a dog")[i % 2] for i in range(count)]
    seeds = [count * state.epoch + i for i in range(count)]
    drawn, sampling_s, sampling_peak = _measured(
        policy, lambda: sample(policy, prompts, seeds, config.sampler)
    )
    credit = {"reward": torch.zeros(count), "advantage": torch.linspace(-2, 2, count)}
    rollouts = Rollouts(prompts, drawn.latents, drawn.log_probs)
    (after, metrics), update_s, update_peak = _measured(
        policy, lambda: update(policy, state, rollouts, credit, {}, config)
    )
    return Epoch(after, sampling_s, update_s, sampling_peak, update_peak, metrics)


def _measured(policy: Policy, work: Callable[[], Any]) -> tuple[Any, float, int]:
    """Return what some work returns, its seconds, and its peak of memory in bytes."""
    on_gpu = policy.device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    result = work()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    return result, seconds, torch.cuda.max_memory_allocated() if on_gpu else 0


def count_flops(model: Model) -> tuple[float, float]:
    """Count the floating-point operations of matrix products, convolutions and attention.

    Without those that checkpointing or recomputed log-probs repeat: they are no progress.

    Args:
        model: Loaded for this, without any option.

    Returns:
        Those of an image's sampling and of its update, in units of 10^12.
    """
    plain = Case(
        model.family,
        batch=1,
        dtype="float32" if model.device == "cpu" else "bfloat16",
        compile=False,
        checkpointing=False,
        offloading=False,
        tf32=True,
    )
    config = model.config(plain, samples=1)
    changed = config.algorithm.model_copy(update={"old_log_probs": "stored"})
    config = config.model_copy(update={"algorithm": changed})
    policy = load(config)
    counted = []

    def counting(work: Callable[[], Any]) -> Any:
        # Attention in matrix products, since not all of its kernels are known to the counter.
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            result = work()
        counted.append(counter.get_total_flops() / 1e12)
        return result

    policy.prepare_prompts(["a cat"])
    drawn = counting(lambda: sample(policy, ["a cat"], [0], config.sampler))
    rollouts = Rollouts(["a cat"], drawn.latents, drawn.log_probs)
    credit = {"reward": torch.zeros(1), "advantage": torch.ones(1)}
    state = initial_state(policy)
    counting(lambda: update(policy, state, rollouts, credit, {}, config))
    return counted[0], counted[1]


def matrix_ceiling(device: str, dtype: str, *, tf32: bool, size: int) -> float:
    """Measure the TFLOP/s of a product of square matrices, the best of five times.

    Args:
        device: `cuda` or `cpu`.
        dtype: Of the matrices.
        tf32: Whether float32 is rounded to TF32.
        size: Rows and columns.
    """
    torch.backends.cuda.matmul.allow_tf32 = tf32
    left, right = (
        torch.randn(size, size, device=device, dtype=getattr(torch, dtype)) for _ in "ab"
    )
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        for _ in range(10):
            torch.matmul(left, right)
        if device == "cuda":
            torch.cuda.synchronize()
        best = min(best, (time.perf_counter() - began) / 10)
    return 2 * size**3 / best / 1e12


def measure(model: Model, case: Case, rounds: int, flops: tuple[float, float]) -> dict[str, Any]:
    """Measure a case: one epoch that makes whatever kernels it needs, then some more.

    Args:
        model: Of the case's family.
        case: Batch, dtype and options.
        rounds: Epochs to measure; figures are medians.
        flops: As `count_flops` returns them.

    Returns:
        The case and its figures, or the ``error`` that ended it, such as too little memory.
    """
    row = asdict(case)
    try:
        config = model.config(case)
        policy = load(config)
        first = run_epoch(policy, initial_state(policy), config)
        epochs, state = [], first.state
        for _ in range(rounds):
            epochs.append(run_epoch(policy, state, config))
            state = epochs[-1].state
    except (DdpoError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
        return {**row, "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    images = config.rollouts.samples_per_epoch
    sampling_s = statistics.median(each.sampling_s for each in epochs)
    update_s = statistics.median(each.update_s for each in epochs)
    return {
        **row,
        "first_epoch_s": first.sampling_s + first.update_s,
        "epochs_s": [each.sampling_s + each.update_s for each in epochs],
        "sampling_images_per_s": images / sampling_s,
        "update_images_per_s": images / update_s,
        "sampling_tflops": images * flops[0] / sampling_s,
        "update_tflops": images * flops[1] / update_s,
        "tflops": images * sum(flops) / (sampling_s + update_s),
        "sampling_peak_bytes": max(each.sampling_peak_bytes for each in epochs),
        "update_peak_bytes": max(each.update_peak_bytes for each in epochs),
        "initial_ratio_deviation": first.metrics["initial_ratio_deviation"],
        "recomputed_log_probs": first.metrics["recomputed_log_probs"],
    }


@contextmanager
def deterministic_kernels() -> Iterator[None]:
    """Let torch use kernels that always round alike inside the block, or raise."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def check_resume(model: Model, case: Case) -> dict[str, Any]:
    """Compare two epochs in this process with the second one in a process of its own.

    Returns:
        The case, and whether all bytes of weights and optimizer are ``equal``; or the ``error``,
        such as an operation without a deterministic kernel.
    """
    row = asdict(case)
    config = model.config(case)
    try:
        with deterministic_kernels(), tempfile.TemporaryDirectory() as scratch:
            policy = load(config)
            first = run_epoch(policy, initial_state(policy), config).state
            straight = run_epoch(policy, first, config).digest
            del policy
            tensors = {**_named("weights", first.weights), **_named("optimizer", first.optimizer)}
            save_file(tensors, Path(scratch) / "state.safetensors")
            bare = replace(first, weights={}, optimizer={})
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                given = (config.whole(), bare, scratch, torch.get_num_threads())
                resumed = pool.apply(_second_epoch, given)
    except (DdpoError, RuntimeError) as error:
        return {**row, "error": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    return {**row, "equal": resumed == straight}


def _second_epoch(raw: dict[str, Any], bare: TrainState, scratch: str, threads: int) -> str:
    torch.set_num_threads(threads)  # on the CPU, only equal threads give equal bytes
    config = parse_config(raw, "bench.gpu")
    tensors = load_file(Path(scratch) / "state.safetensors")
    weights, optimizer = (
        {n.removeprefix(f"{part}|"): t for n, t in tensors.items() if n.startswith(f"{part}|")}
        for part in ("weights", "optimizer")
    )
    with deterministic_kernels():
        policy = load(config)
        policy.weights.load(weights)
        return run_epoch(policy, replace(bare, weights=weights, optimizer=optimizer), config).digest


def _named(part: str, tensors: Any) -> dict[str, Tensor]:
    return {f"{part}|{name}": tensor.cpu().contiguous() for name, tensor in tensors.items()}
