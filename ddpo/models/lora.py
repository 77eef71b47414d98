"""Low-rank adapters on a frozen network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import peft
import torch
from diffusers.training_utils import cast_training_params
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor

from ddpo.config import LoraConfig
from ddpo.errors import ConfigError
from ddpo.models.weights import Network, Weights


class LoraWeights(Weights):
    """A trained adapter (peft) on a network whose own weights are frozen.

    Args:
        network: Frozen; gets the adapter, and is cast to ``dtype``.
        config: Rank, alpha and layers of the adapter.
        seed: Seed of the adapter's initial weights.
        dtype: What the frozen weights are kept in.

    Raises:
        ConfigError: The target modules match no layer.
    """

    def __init__(
        self,
        network: Network,
        config: LoraConfig,
        *,
        seed: int,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(network)
        self.config = config
        if network.dtype != dtype:
            network.to(dtype=dtype)  # pyright: ignore[reportCallIssue]  # diffusers wraps it untyped
        adapter = peft.LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]  # peft takes floats
            init_lora_weights="gaussian",
            target_modules=list(config.target_modules),
        )
        # peft draws from the global generator: seed it from the run, and leave it as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                network.add_adapter(adapter)
            except ValueError as error:
                raise ConfigError(
                    f"trainable.target_modules {list(config.target_modules)} match no layer of the "
                    "denoising network; the paper's are to_q, to_k, to_v, to_out.0"
                ) from error
        cast_training_params(network, dtype=torch.float32)

    def state(self) -> dict[str, Tensor]:
        """Return the adapter by peft's names."""
        return get_peft_model_state_dict(self.network)

    def folded(self) -> dict[str, Tensor]:
        """Return the adapter by peft's names, on the CPU, with alpha / rank multiplied into lora_B.

        A loader without an alpha assumes that it equals the rank, which is right for these weights.
        """
        scale = self.config.alpha / self.config.rank
        return {
            name: (scale * value if ".lora_B." in name else value).cpu().contiguous()
            for name, value in self.state().items()
        }

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Load an adapter in place."""
        set_peft_model_state_dict(self.network, dict(weights))

    @contextmanager
    def _use_base(self) -> Iterator[None]:
        """Disable the adapter inside the block."""
        self.network.disable_adapters()
        try:
            yield
        finally:
            self.network.enable_adapters()  # and requires_grad with it
