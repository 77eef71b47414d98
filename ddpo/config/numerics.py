"""Settings that the bytes of a result depend on."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from ddpo.basics.limits import THREAD_LIMIT
from ddpo.basics.part import Part, is_off

ThreadCount = Annotated[int, Field(gt=0, le=THREAD_LIMIT)]
BatchSize = PositiveInt | Literal["auto"]


class NumericsConfig(Part):
    """Device, dtype and batch sizes. `auto` is resolved at the first start, then frozen."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """`auto` uses a GPU if there is one."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Dtype of the denoising network's arithmetic; trained weights stay float32. `auto` is bfloat16
    on CUDA (float16 on GPUs without it) and float32 elsewhere."""
    sample_batch_size: BatchSize = 8
    """Images per forward while sampling; guidance doubles the batch internally. `auto` measures the
    model on the device of the run's first start, and takes the smallest size that is about as fast
    as any that fits into memory."""
    micro_batch_size: BatchSize = 8
    """(sample, timestep) pairs per forward and backward in the update. Any size gives the same
    gradient; if equal to sample_batch_size, the update repeats the sampler's forwards exactly. Even
    for `dpo`, whose pairs stay in one forward. `auto` measures, and prefers equal sizes where the
    ratio to the sampler's log-probs matters."""
    threads: ThreadCount | Literal["auto"] = "auto"
    """CPU threads of torch."""
    tf32: bool = True
    """Let float32 compute in TF32 on CUDA: faster, and rounded to 11 bits, also in the autoencoder
    and in rewards of this process."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward: less memory for about a third more time."""
    compile: bool = Field(default=False, exclude_if=is_off)
    """Compile the denoising network's blocks with torch.compile: faster, after the first forwards,
    which need a C++ compiler (Triton on a GPU). Rounds otherwise than without it."""
    offload_activations: bool = Field(default=False, exclude_if=is_off)
    """On a GPU: keep activations in this machine's memory until the backward. Less memory of the
    GPU for the time of the copies, of which gradient checkpointing leaves few."""

    @property
    def searches(self) -> bool:
        """Whether a batch size is still to be found by measuring."""
        return "auto" in (self.sample_batch_size, self.micro_batch_size)
