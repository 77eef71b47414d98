"""FLUX.2 klein: a transformer on a rectified flow that reads a language model's hidden states.

Shapes: B images, C = 128 latent channels, h x w latent pixels, each of which is a token: the
autoencoder's 32 channels of 2 x 2 pixels, normalised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers import (
    AutoencoderKLFlux2,
    Flux2KleinPipeline,  # pyright: ignore[reportPrivateImportUsage]
)
from torch import Tensor
from transformers import PreTrainedModel, Qwen3ForCausalLM

from ddpo.config import FullConfig, LoraConfig, ModelConfig
from ddpo.models.conditioning import Conditioning
from ddpo.models.facts import ModelFacts
from ddpo.models.files import ModelFiles
from ddpo.models.flow_inspection import inspect_flux_2
from ddpo.models.pipeline_policy import PipelinePolicy


class Flux2(PipelinePolicy):
    """A FLUX.2-klein-base pipeline; its transformer holds the trained weights."""

    parts = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    pipeline_class = Flux2KleinPipeline
    autoencoder_class = AutoencoderKLFlux2
    network_part = "transformer"
    own_settings = ("text_tokens",)
    text_encoders: ClassVar[Mapping[str, type[PreTrainedModel]]] = {
        "text_encoder": Qwen3ForCausalLM
    }
    text_tokens = 512
    tokenizers = ("tokenizer",)
    expected = "FLUX.2-klein-base"

    @classmethod
    def inspect(
        cls, files: ModelFiles, model: ModelConfig, trainable: LoraConfig | FullConfig
    ) -> ModelFacts:
        """Check transformer, scheduler, size and files."""
        return inspect_flux_2(files, model, trainable)

    @property
    def most_tokens(self) -> int:
        """How many tokens of a prompt, as one turn of a chat, the text encoder reads."""
        return self._text_tokens

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Return how many tokens each prompt has as one turn of a chat."""
        chats = [
            self._tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}],
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=False,
            )
            for prompt in prompts
        ]
        return super().count_tokens(chats)

    def predict(
        self, latents: Tensor, times: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        """Predict the velocity; with guidance in two forwards, as the pipeline does."""
        conditional = self._forward(latents, times, conditioning)
        if guidance_scale == 1.0:
            return conditional
        empty = self._unconditional().expand(len(conditioning))
        unconditional = self._forward(latents, times, empty)
        return unconditional + guidance_scale * (conditional - unconditional)

    def _forward(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = latents.shape[2:]
        text = conditioning["text"]
        with self.numerics.autocast():
            output: Tensor = self.weights.network(
                hidden_states=latents.flatten(2).transpose(1, 2),
                timestep=times / self.schedule.training_timesteps,
                guidance=None,
                encoder_hidden_states=text,
                txt_ids=_positions((1, 1, text.shape[1]), text.device),
                img_ids=_positions((height, width, 1), latents.device),
                return_dict=False,
            )[0]
        output = output.to(torch.float32) if self.numerics.low_precision else output
        return output.transpose(1, 2).unflatten(2, (height, width))

    def _encode(self, prompt: str) -> Conditioning:
        text, _ = self.pipeline.encode_prompt(
            prompt, device=self.device, max_sequence_length=self._text_tokens
        )
        return Conditioning({"text": text.float()})

    def _unscaled(self, latents: Tensor) -> Tensor:
        vae: Any = self.pipeline.vae
        deviation = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
        latents = latents * deviation[:, None, None] + vae.bn.running_mean[:, None, None]
        tiles = latents.unflatten(1, (-1, 2, 2))
        return tiles.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)

    def _scaled(self, encoded: Tensor) -> Tensor:
        vae: Any = self.pipeline.vae
        tiles = encoded.unflatten(3, (-1, 2)).unflatten(2, (-1, 2))
        latents = tiles.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)
        deviation = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)
        return (latents - vae.bn.running_mean[:, None, None]) / deviation[:, None, None]


def _positions(lengths: tuple[int, int, int], device: torch.device) -> Tensor:
    """Return (0, row, column, place in the text) of every token, [tokens, 4] int64."""
    axes = [torch.arange(length, device=device) for length in (1, *lengths)]
    return torch.cartesian_prod(*axes)
