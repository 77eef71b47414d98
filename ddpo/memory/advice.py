"""Whether a config fits into free memory, and with which settings it would."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import psutil
import torch

from ddpo.config import FullConfig, LoraConfig, RunConfig
from ddpo.memory.counting import Phase
from ddpo.memory.estimate import MemoryEstimate, estimate
from ddpo.models import family_of
from ddpo.models.numerics import Numerics

_GIB = 2**30
_NAMES: Mapping[Phase, str] = {
    "encode": "encoding prompts",
    "sample": "sampling",
    "decode": "decoding",
    "update": "update",
}


@dataclass(frozen=True)
class Fit:
    """What a config needs, beside what is free."""

    needs: MemoryEstimate
    """Of the config as it is."""
    free: int
    """Bytes."""
    settings: Mapping[str, Any]
    """Settings to change, by their place in the config; empty if it fits as it is."""
    then: MemoryEstimate
    """With those settings; larger than what is free if nothing that was tried makes it fit."""

    @property
    def fits(self) -> bool:
        """Whether the config fits as it is."""
        return self.needs.peak <= self.free

    @property
    def message(self) -> str:
        """What to tell a user."""
        peaks = sorted(self.needs.peaks.items(), key=lambda item: -item[1])
        phases = ", ".join(f"{_NAMES[phase]} {_gib(size)}" for phase, size in peaks)
        text = f"needs about {_gib(self.needs.peak)} GiB ({phases}); {_gib(self.free)} GiB free"
        if self.fits:
            return text
        change = " ".join(f"{name}={_shown(value)}" for name, value in self.settings.items())
        if self.then.peak > self.free:
            least = f"even with {change} it needs" if change else "it needs at least"
            return f"{text}. It does not fit: {least} {_gib(self.then.peak)} GiB"
        return f"{text}. It would fit with {change} ({_gib(self.then.peak)} GiB)"


def check_fit(
    config: RunConfig,
    numerics: Numerics,
    free: int,
    *,
    prompts: int | None = None,
    needs: MemoryEstimate | None = None,
) -> Fit:
    """Estimate what a config needs and, if that is not free, look for settings that need less.

    Settings that change no result but its rounding come first: smaller batches, then gradient
    checkpointing, then offloaded activations. The others are a 16-bit dtype, moments in 8 bits if
    bitsandbytes is installed, an adapter in place of all weights, and no T5.

    Args:
        config: The run's.
        numerics: Resolved.
        free: Bytes that are free on the device.
        prompts: Size of the prompt set, if it is known.
        needs: What the config needs, if it was estimated before.

    Raises:
        ConfigError: As `estimate`.
        ModelError: As `estimate`.
    """
    first = found = needs or estimate(config, numerics, prompts=prompts)
    settings: dict[str, Any] = {}
    while found.peak > free and (change := _next(config, numerics, found, free)) is not None:
        name, value = change
        settings[name] = value
        config, numerics = _with(config, numerics, name, value)
        parts = _PARTS.get(name, ("sample", "update"))
        again = estimate(config, numerics, prompts=prompts, parts=parts)
        found = replace(again, peaks={**found.peaks, **again.peaks})
    return Fit(first, free, settings, found)


def free_memory(numerics: Numerics) -> int:
    """Return the bytes that are free: of a GPU's own memory, else of this machine's.

    Args:
        numerics: Resolved here.
    """
    if numerics.device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return psutil.virtual_memory().available


_PARTS: Mapping[str, tuple[Phase, ...]] = {
    "numerics.sample_batch_size": ("sample",),
    "numerics.micro_batch_size": ("update",),
    "numerics.gradient_checkpointing": ("update",),
    "numerics.offload_activations": ("update",),
}
"""What a setting changes; any other changes all."""


def _next(
    config: RunConfig, numerics: Numerics, found: MemoryEstimate, free: int
) -> tuple[str, Any] | None:
    """Return the next setting to change, and its value; None if all have been."""
    trainable = config.trainable
    # An adapter would train the pretrained network: without pretraining, that is another run.
    whole = isinstance(trainable, FullConfig) and not trainable.from_scratch
    phase = found.largest
    if phase == "update":
        copies = 2.5 if config.optimizer.eight_bit else 4  # with gradient and moments
        fixed = int(found.frozen + copies * found.trained)
        if whole and fixed > free:
            steps = numerics.device == "cuda" and not config.splits_network
            if steps and not config.optimizer.eight_bit and find_spec("bitsandbytes"):
                return "optimizer.eight_bit", True
            return "trainable", LoraConfig()
        size = _smaller(numerics.micro_batch_size, found.peak, fixed, free)
        if size := size - size % config.algorithm.needs.samples_per_loss:
            return "numerics.micro_batch_size", size
        if not numerics.gradient_checkpointing:
            return "numerics.gradient_checkpointing", True
        offloads = numerics.device == "cuda" and not (numerics.compile or config.splits_network)
        if offloads and not numerics.offload_activations:
            return "numerics.offload_activations", True
    elif phase in ("sample", "decode"):
        size = _smaller(numerics.sample_batch_size, found.peak, found.frozen + found.trained, free)
        while size and config.rollouts.shard_size % size:
            size -= 1
        if size:
            return "numerics.sample_batch_size", size
    elif config.model.t5 and "t5" in family_of(config.model).own_settings:
        return "model.t5", False
    if not numerics.low_precision and phase != "decode" and numerics.device != "cpu":
        return "numerics.dtype", "bfloat16"
    return ("trainable", LoraConfig()) if whole else None


def _smaller(size: int, peak: int, fixed: int, free: int) -> int:
    """Return the batch size that seems to fit, at least 1; 0 if there is no smaller one."""
    each = max(peak - fixed, 1) / size
    return min(size - 1, max(int((free - fixed) / each), 1)) if size > 1 else 0


def _with(
    config: RunConfig, numerics: Numerics, name: str, value: Any
) -> tuple[RunConfig, Numerics]:
    part, _, key = name.partition(".")
    if part == "numerics":
        return config, Numerics.model_validate({**dict(numerics), key: value})
    if key:
        value = getattr(config, part).changed(**{key: value})
    return config.changed(**{part: value}), numerics


def _gib(size: int) -> str:
    return f"{size / _GIB:.1f}"


def _shown(value: Any) -> str:
    if isinstance(value, LoraConfig):
        return "{type: lora}"
    return str(value).lower()
