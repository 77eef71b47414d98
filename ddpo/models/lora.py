"""Low-rank adapters on frozen networks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import peft
import torch
from diffusers.training_utils import cast_training_params
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedModel

from ddpo.config import LoraConfig
from ddpo.errors import ConfigError
from ddpo.models.weights import Weights

if TYPE_CHECKING:
    from ddpo.models.weights import Network

TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The layers of a CLIP that get an adapter, as in diffusers' own training scripts."""

_CLIP_PREFIX = "text_model."
"""In files, before the names of a CLIP's layers. Some releases of transformers leave it out."""


class LoraWeights(Weights):
    """A trained adapter (peft) on a network, and on text encoders, whose own weights are frozen.

    Names of the network's weights are as they are in the network; those of a text encoder follow
    its part's name and a dot.

    Args:
        network: Frozen; gets the adapter, and is cast to ``dtype``.
        config: Rank, alpha and layers of the adapter.
        seed: Seed of the adapter's initial weights.
        dtype: What the frozen weights of the network are kept in.
        text_encoders: Frozen CLIPs that get an adapter of that rank too, by part.

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
        text_encoders: Mapping[str, PreTrainedModel],
    ) -> None:
        super().__init__(network)
        self.config = config
        self.text_encoders = text_encoders
        if network.dtype != dtype:
            network.to(dtype=dtype)  # pyright: ignore[reportCallIssue]  # diffusers wraps it untyped
        # peft draws from the global generator: seed it from the run, and leave it as it was.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                network.add_adapter(_adapter(config, config.target_modules))
            except ValueError as error:
                raise ConfigError(
                    f"trainable.target_modules {list(config.target_modules)} match no layer of the "
                    "denoising network; the paper's are to_q, to_k, to_v, to_out.0"
                ) from error
            for text_encoder in text_encoders.values():
                text_encoder.add_adapter(_adapter(config, TEXT_TARGETS))
        for module in (network, *text_encoders.values()):
            cast_training_params(module, dtype=torch.float32)

    @property
    def train_text(self) -> bool:
        """Whether what prompts are encoded to changes with the weights."""
        return bool(self.text_encoders)

    def parameters(self) -> dict[str, torch.nn.Parameter]:
        """Return the trained parameters by their name, in a fixed order."""
        found = super().parameters()
        for part, text_encoder in self.text_encoders.items():
            found |= {
                f"{part}.{name}": p
                for name, p in text_encoder.named_parameters()
                if p.requires_grad
            }
        return found

    def state(self) -> dict[str, Tensor]:
        """Return the adapter by peft's names."""
        found = get_peft_model_state_dict(self.network)
        for part, text_encoder in self.text_encoders.items():
            found |= {f"{part}.{name}": value for name, value in text_state(text_encoder).items()}
        return found

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
        parts = by_part(weights, self.text_encoders)
        for part, text_encoder in self.text_encoders.items():
            prefix = _CLIP_PREFIX if hasattr(text_encoder, "text_model") else ""
            own = {
                prefix + name.removeprefix(_CLIP_PREFIX): value
                for name, value in parts.pop(part).items()
            }
            set_peft_model_state_dict(text_encoder, own)
        set_peft_model_state_dict(self.network, parts.pop(""))

    @contextmanager
    def _use_base(self) -> Iterator[None]:
        """Disable the adapters inside the block."""
        modules = (self.network, *self.text_encoders.values())
        for module in modules:
            module.disable_adapters()
        try:
            yield
        finally:
            for module in modules:
                module.enable_adapters()  # and requires_grad with it


def text_state(text_encoder: PreTrainedModel) -> dict[str, Tensor]:
    """Return a CLIP's adapter by the names that it has in files."""
    return {
        _CLIP_PREFIX + name.removeprefix(_CLIP_PREFIX): value
        for name, value in get_peft_model_state_dict(text_encoder).items()
    }


def by_part(
    weights: Mapping[str, Tensor], texts: Mapping[str, object]
) -> dict[str, dict[str, Tensor]]:
    """Split an adapter into that of the network, whose part is called "", and those of its texts.

    Args:
        weights: By the names of :class:`LoraWeights`.
        texts: The text encoders that have an adapter, by part.
    """
    parts: dict[str, dict[str, Tensor]] = {"": {}, **{part: {} for part in texts}}
    for name, value in weights.items():
        part, _, rest = name.partition(".")
        if part in texts:
            parts[part][rest] = value
        else:
            parts[""][name] = value
    return parts


def _adapter(config: LoraConfig, targets: tuple[str, ...]) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]  # peft takes floats
        init_lora_weights="gaussian",
        target_modules=list(targets),
    )
