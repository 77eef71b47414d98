"""What the bytes of a result depend on beside the config: device, dtype, threads, versions."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from ddpo.config import NumericsConfig
from ddpo.errors import ConfigError

_VERSIONED = ("torch", "diffusers", "transformers", "peft", "pillow")


class Numerics(BaseModel):
    """Numerics with every ``auto`` settled; frozen in ``run.json`` at a run's first start.

    Attributes:
        device: Kind of device.
        device_name: The device's own name; equal bytes are promised on one kind of device.
        dtype: Of the UNet's arithmetic.
        sample_batch_size: Pictures a forward while sampling.
        micro_batch_size: Pairs a forward in the update.
        threads: CPU threads of torch.
        tf32: TF32 matrix products on CUDA.
        gradient_checkpointing: Activations recomputed in the backward.
        attention: Attention backend of the UNet.
        update_ranks: Processes that share an update.
        versions: Of the libraries that compute.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Literal["cpu", "cuda", "mps"]
    device_name: str
    dtype: Literal["float32", "bfloat16", "float16"]
    sample_batch_size: int
    micro_batch_size: int
    threads: int
    tf32: bool
    gradient_checkpointing: bool
    attention: str = "sdpa"
    update_ranks: int = 1
    versions: dict[str, str]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The UNet's dtype as torch names it."""
        return getattr(torch, self.dtype)

    @property
    def torch_device(self) -> torch.device:
        """The device as torch names it."""
        return torch.device(self.device)

    @property
    def low_precision(self) -> bool:
        """Whether the UNet computes in 16 bits."""
        return self.dtype != "float32"

    def apply(self) -> None:
        """Set torch's process-wide switches."""
        torch.set_num_threads(self.threads)
        torch.backends.cuda.matmul.allow_tf32 = self.tf32
        torch.backends.cudnn.allow_tf32 = self.tf32

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Compute in the 16-bit dtype inside, where one is set."""
        with torch.autocast(self.device, dtype=self.torch_dtype, enabled=self.low_precision):
            yield


def settle_numerics(config: NumericsConfig) -> Numerics:
    """Settle every ``auto`` on this machine.

    Args:
        config: The config's numerics.

    Returns:
        Numerics without ``auto``.

    Raises:
        ConfigError: The device that is asked for is not there.
    """
    device = _settle_device(config.device)
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32"
        if device == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            dtype = "bfloat16" if native else "float16"
    return Numerics(
        device=device,
        device_name=torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        dtype=dtype,
        sample_batch_size=config.sample_batch_size,
        micro_batch_size=config.micro_batch_size,
        threads=torch.get_num_threads() if config.threads == "auto" else config.threads,
        tf32=config.tf32,
        gradient_checkpointing=config.gradient_checkpointing,
        versions={name: version(name) for name in _VERSIONED},
    )


def settle_again(config: NumericsConfig, frozen: Numerics) -> Numerics:
    """Settle ``auto`` as a run's first start did.

    Args:
        config: The config's numerics at this start.
        frozen: What the first start found.

    Returns:
        The config's explicit values, and the frozen ones for every ``auto``.

    Raises:
        ConfigError: The frozen device is not there.
    """
    device = _settle_device(frozen.device if config.device == "auto" else config.device)
    explicit = {
        name: value
        for name in NumericsConfig.model_fields
        if (value := getattr(config, name)) != "auto"
    }
    return frozen.model_copy(update={**explicit, "device": device})


def changed_versions(frozen: Numerics) -> list[str]:
    """Name the libraries that are no longer of the version a run was started with.

    Args:
        frozen: The run's numerics.

    Returns:
        One text a library, such as ``torch 2.12.0, now 2.13.0``; empty if none changed.
    """
    now = {name: version(name) for name in _VERSIONED}
    return [
        f"{name} {then}, now {now[name]}"
        for name, then in frozen.versions.items()
        if now.get(name) != then
    ]


def _settle_device(asked: str) -> Literal["cpu", "cuda", "mps"]:
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "numerics.device is 'cuda', but torch finds no CUDA device here. Set it to 'cpu', or "
            "install a CUDA build of torch and check `nvidia-smi`."
        )
    if asked == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(
            "numerics.device is 'mps', but torch finds no Apple GPU here. Set it to 'cpu'."
        )
    if asked == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    return "cpu" if asked == "cpu" else "cuda" if asked == "cuda" else "mps"
