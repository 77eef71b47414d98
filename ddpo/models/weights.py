"""Which weights of a UNet are trained, how they go in and out, and how users get them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import peft
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel  # pyright: ignore[reportPrivateImportUsage]
from diffusers.training_utils import cast_training_params
from diffusers.utils import convert_state_dict_to_diffusers
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from ddpo.config import FullConfig, LoraConfig
from ddpo.errors import ConfigError


class TrainableWeights(ABC):
    """The weights of a UNet that training changes; float32 always."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self.unet = unet

    @abstractmethod
    def state(self) -> dict[str, Tensor]:
        """Return the weights by name; views, not copies."""

    @abstractmethod
    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Put weights in, in place: optimizers keep their hold on the parameters."""

    @abstractmethod
    def export(self, pipeline: StableDiffusionPipeline, folder: Path) -> None:
        """Write what plain diffusers loads."""

    @abstractmethod
    def switched_off(self) -> AbstractContextManager[None]:
        """Let the UNet be the base model's meanwhile.

        Raises:
            ConfigError: The base model's weights are not there any more.
        """

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Return the trained parameters by their name in the UNet, in a fixed order."""
        return {name: p for name, p in self.unet.named_parameters() if p.requires_grad}


class LoraWeights(TrainableWeights):
    """Low-rank adapters (peft) on a frozen UNet."""

    def __init__(
        self, unet: UNet2DConditionModel, config: LoraConfig, *, seed: int, dtype: torch.dtype
    ) -> None:
        super().__init__(unet)
        unet.to(dtype=dtype)  # pyright: ignore[reportCallIssue]  # diffusers wraps it untyped
        adapter = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]  # peft takes floats
            init_lora_weights="gaussian",
            target_modules=list(config.target_modules),
        )
        # peft draws from the global generator; the run's seed must decide, and nobody else notice.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                unet.add_adapter(adapter)
            except ValueError as error:
                raise ConfigError(
                    f"trainable.target_modules {list(config.target_modules)} match no layer of the "
                    "UNet; the paper's are to_q, to_k, to_v, to_out.0"
                ) from error
        cast_training_params(unet, dtype=torch.float32)

    def state(self) -> dict[str, Tensor]:
        """Return the adapter by peft's names."""
        return get_peft_model_state_dict(self.unet)

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Put an adapter in, in place."""
        set_peft_model_state_dict(self.unet, dict(weights))

    def export(self, pipeline: StableDiffusionPipeline, folder: Path) -> None:
        """Write ``pytorch_lora_weights.safetensors`` for ``load_lora_weights``.

        With the adapter's metadata: without it rank and alpha are guessed on load.
        """
        metadata = self.unet.peft_config["default"].to_dict()
        pipeline.save_lora_weights(
            folder,
            unet_lora_layers=convert_state_dict_to_diffusers(self.state()),
            unet_lora_adapter_metadata=metadata,
        )

    @contextmanager
    def switched_off(self) -> Iterator[None]:
        """Let the adapter add nothing meanwhile. To be used without gradients."""
        self.unet.disable_adapters()
        try:
            yield
        finally:
            self.unet.enable_adapters()  # and requires_grad with it


class FullWeights(TrainableWeights):
    """The whole UNet, in float32 whatever it computes in."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__(unet)
        unet.requires_grad_(True)

    def state(self) -> dict[str, Tensor]:
        """Return the UNet's own state."""
        return self.unet.state_dict()

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Put a UNet's weights in, in place."""
        self.unet.load_state_dict(weights)

    def export(self, pipeline: StableDiffusionPipeline, folder: Path) -> None:
        """Write a pipeline's folder for ``from_pretrained``."""
        pipeline.save_pretrained(folder, safe_serialization=True)

    def switched_off(self) -> AbstractContextManager[None]:
        """Refuse: training the whole UNet overwrites the base model."""
        raise ConfigError(
            "with `trainable: full` there is no base model to compare with: its weights are those "
            "that are trained; use `trainable: {type: lora}`"
        )


def make_trainable(
    unet: UNet2DConditionModel,
    config: LoraConfig | FullConfig,
    *,
    seed: int,
    dtype: torch.dtype,
) -> TrainableWeights:
    """Make weights of a UNet trainable.

    Args:
        unet: Frozen, float32; changed in place.
        config: Which weights.
        seed: Of the adapter's start.
        dtype: What frozen weights are kept in.

    Returns:
        The handle on the trained weights.

    Raises:
        ConfigError: The adapter's target modules match nothing.
    """
    if isinstance(config, FullConfig):
        return FullWeights(unet)
    return LoraWeights(unet, config, seed=seed, dtype=dtype)
