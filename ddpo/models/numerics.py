"""What the bytes of a result depend on besides the config: device, dtype, threads, versions.

torch is imported where it is used: a stored run is listed without it.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import version
from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field

from ddpo.basics.part import is_off
from ddpo.config import NumericsConfig
from ddpo.errors import ConfigError

if TYPE_CHECKING:
    import torch

_VERSIONED = ("torch", "diffusers", "transformers", "peft", "pillow")


class Numerics(BaseModel):
    """Numerics without any ``auto``; frozen in ``run.json`` at a run's first start."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    device: Literal["cpu", "cuda", "mps"]
    """Kind of device."""
    device_name: str
    """The device's own name; equal bytes are promised on one kind of device only."""
    dtype: Literal["float32", "bfloat16", "float16"]
    """Dtype of the denoising network's arithmetic."""
    sample_batch_size: int
    """Images per forward while sampling."""
    micro_batch_size: int
    """Items per forward in the update."""
    threads: int
    """CPU threads of torch."""
    tf32: bool
    """Whether CUDA uses TF32 matrix products."""
    gradient_checkpointing: bool
    """Whether activations are recomputed in the backward."""
    compile: bool = Field(default=False, exclude_if=is_off)
    """Whether the denoising network's blocks are compiled."""
    offload_activations: bool = Field(default=False, exclude_if=is_off)
    """Whether activations wait for the backward in the host's memory."""
    versions: dict[str, str]
    """Versions of the libraries that compute."""

    def batched(self, sample: int, micro: int, *, compiled: bool) -> Numerics:
        """Return the same with other batches.

        Args:
            sample: Images per forward while sampling.
            micro: Items per forward in the update.
            compiled: Whether the denoising network's blocks are compiled.
        """
        sizes = {"sample_batch_size": sample, "micro_batch_size": micro, "compile": compiled}
        return Numerics.model_validate({**dict(self), **sizes})

    @property
    def torch_dtype(self) -> torch.dtype:
        """The denoising network's dtype as a torch dtype."""
        import torch

        return getattr(torch, self.dtype)

    @property
    def torch_device(self) -> torch.device:
        """The device as a torch device."""
        import torch

        return torch.device(self.device)

    @property
    def low_precision(self) -> bool:
        """Whether the denoising network computes in 16 bits."""
        return self.dtype != "float32"

    @property
    def exact(self) -> bool:
        """Whether the network computes in float32 and nothing less, on a device that rounds alike.

        A GPU does not: TF32 rounds to 11 bits, and its libraries choose another algorithm for
        another batch.
        """
        return self.device == "cpu" and not self.low_precision

    @property
    def advice(self) -> str:
        """What to change after weights have diverged, for messages; a run's identity is fixed."""
        advice = (
            "Fork the run at an earlier epoch (`ddpo fork`) or start a new one, with a lower "
            "optimizer.learning_rate"
        )
        if self.low_precision:
            wider = "bfloat16 or float32" if self.dtype == "float16" else "float32"
            advice += (
                f", or with numerics.dtype {wider} (a fork then also needs --set fork.rollouts=0 "
                "because samples of another dtype cannot be inherited)"
            )
        return advice

    def apply(self) -> None:
        """Set torch's switches: the number of threads in this thread, the others everywhere."""
        import torch

        _default_threads()  # asked before the number is changed
        torch.set_num_threads(self.threads)
        torch.backends.cuda.matmul.allow_tf32 = self.tf32
        torch.backends.cudnn.allow_tf32 = self.tf32

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Compute in the 16-bit dtype inside the block, if one is set."""
        import torch

        with torch.autocast(self.device, dtype=self.torch_dtype, enabled=self.low_precision):
            yield


def resolve_numerics(config: NumericsConfig) -> Numerics:
    """Resolve every ``auto`` on this machine, except batch sizes, which are measured.

    Raises:
        ConfigError: The configured device is missing, or has no memory of its own to offload
            activations from; or a batch size is ``auto``.
    """
    import torch

    if config.sample_batch_size == "auto" or config.micro_batch_size == "auto":
        raise ConfigError(
            "numerics.sample_batch_size or numerics.micro_batch_size is `auto`, which the first "
            "start of a run resolves by measuring; outside of a run, set a number"
        )

    device = resolve_device(config.device)
    if config.offload_activations and device != "cuda":
        raise ConfigError(
            "numerics.offload_activations moves activations from a GPU into this machine's memory, "
            f"where on {device!r} they are already; leave it out"
        )
    threads = _default_threads()
    dtype = config.dtype
    if dtype == "auto":
        dtype = "float32"
        if device == "cuda":
            native = torch.cuda.is_bf16_supported(including_emulation=False)
            dtype = "bfloat16" if native else "float16"
    return Numerics(
        device=device,
        device_name=_device_name(device),
        dtype=dtype,
        sample_batch_size=config.sample_batch_size,
        micro_batch_size=config.micro_batch_size,
        threads=threads if config.threads == "auto" else config.threads,
        tf32=config.tf32,
        gradient_checkpointing=config.gradient_checkpointing,
        compile=config.compile,
        offload_activations=config.offload_activations,
        versions={name: version(name) for name in _VERSIONED},
    )


@cache
def _default_threads() -> int:
    """Return torch's number of threads as it was before any run of this process set its own."""
    import torch

    return torch.get_num_threads()


def resolve_again(config: NumericsConfig, frozen: Numerics) -> Numerics:
    """Resolve ``auto`` as a run's first start did.

    Args:
        config: The config's numerics at this start.
        frozen: The numerics of the first start.

    Returns:
        The config's explicit values, and the frozen ones for every ``auto``.

    Raises:
        ConfigError: The frozen device is missing.
    """
    device = resolve_device(frozen.device if config.device == "auto" else config.device)
    explicit = {
        name: value
        for name in NumericsConfig.model_fields
        if (value := getattr(config, name)) != "auto"
    }
    return Numerics.model_validate({**dict(frozen), **explicit, "device": device})


def resolve_elsewhere(frozen: Numerics, device: str | None) -> Numerics:
    """Return the numerics of a run for use on this machine, which may lack the run's device.

    Args:
        frozen: The numerics of the first start.
        device: As in a config; None for the run's own. On another kind of device than the run's,
            the arithmetic is float32, and nothing is compiled or offloaded.

    Raises:
        ConfigError: This machine has no such device.
    """
    if device is None:
        try:
            resolve_device(frozen.device)
        except ConfigError as error:
            raise ConfigError(
                f"the run was trained on {frozen.device!r}, which torch does not find here; choose "
                "a device of this machine, such as --device cpu"
            ) from error
        return frozen
    resolved = resolve_device(device, "--device")
    if resolved == frozen.device:
        return frozen
    settings = {name: getattr(frozen, name) for name in NumericsConfig.model_fields}
    settings |= {"device": resolved, "dtype": "float32"}
    settings |= {"compile": False, "offload_activations": False}
    return resolve_numerics(NumericsConfig.model_validate(settings))


def changes_since(frozen: Numerics) -> list[str]:
    """List the device and the libraries that have changed since a run's first start.

    Args:
        frozen: The run's numerics; this machine has such a kind of device.

    Returns:
        One text for each, such as ``torch 2.12.0, now 2.13.0``.
    """
    device = _device_name(frozen.device)
    changes = [] if device == frozen.device_name else [f"{frozen.device_name}, now {device}"]
    now = {name: version(name) for name in _VERSIONED}
    return changes + [
        f"{name} {then}, now {now[name]}"
        for name, then in frozen.versions.items()
        if now.get(name) != then
    ]


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else platform.machine()


def resolve_device(
    requested: str, setting: str = "numerics.device"
) -> Literal["cpu", "cuda", "mps"]:
    """Return the kind of device that a setting stands for here.

    Args:
        requested: `auto`, `cpu`, `cuda` or `mps`.
        setting: The setting, for the message.

    Raises:
        ConfigError: This machine has no such device.
    """
    import torch

    if requested == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"{setting} is 'cuda', but torch finds no CUDA device here. Set it to 'cpu', or "
            "install a CUDA build of torch and check `nvidia-smi`."
        )
    if requested == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(
            f"{setting} is 'mps', but torch finds no Apple GPU here. Set it to 'cpu'."
        )
    if requested == "auto":
        if torch.cuda.is_available():
            return "cuda"
        return "mps" if torch.backends.mps.is_available() else "cpu"
    return "cpu" if requested == "cpu" else "cuda" if requested == "cuda" else "mps"
