"""FLUX.1: a transformer on a rectified flow, distilled so that guidance is one of its inputs.

Shapes: B images, C latent channels, h x w latent pixels, which the model sees as h w / 4 tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import FluxPipeline  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor
from transformers import CLIPTextModel, PreTrainedModel, T5EncoderModel

from ddpo.config import FullConfig, LoraConfig, ModelConfig
from ddpo.models.conditioning import Conditioning
from ddpo.models.facts import ModelFacts
from ddpo.models.files import ModelFiles
from ddpo.models.flow_inspection import inspect_flux
from ddpo.models.pipeline_policy import PipelinePolicy


class Flux(PipelinePolicy):
    """A FLUX.1-dev pipeline; its transformer holds the trained weights."""

    parts = (
        "transformer",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "scheduler",
    )
    pipeline_class = FluxPipeline
    network_part = "transformer"
    own_settings = ("text_tokens",)
    text_encoders: ClassVar[Mapping[str, type[PreTrainedModel]]] = {
        "text_encoder": CLIPTextModel,
        "text_encoder_2": T5EncoderModel,
    }
    text_tokens = 512
    tokenizers = ("tokenizer", "tokenizer_2")
    expected = "FLUX.1-dev"

    @classmethod
    def inspect(
        cls, files: ModelFiles, model: ModelConfig, trainable: LoraConfig | FullConfig
    ) -> ModelFacts:
        """Check transformer, scheduler, size and files."""
        return inspect_flux(files, model, trainable)

    @property
    def most_tokens(self) -> int:
        """How many tokens of a prompt T5 reads."""
        return self._text_tokens

    def forwards(self, guidance_scale: float) -> int:
        """Return 1, whatever the guidance."""
        return 1

    def predict(
        self, latents: Tensor, times: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        """Predict the velocity; the guidance scale is an input of the model."""
        batch, _, height, width = latents.shape
        guidance = torch.full((batch,), guidance_scale, device=latents.device)
        with self.numerics.autocast():
            output: Tensor = self.weights.network(
                hidden_states=packed(latents),
                timestep=times / self.schedule.training_timesteps,
                guidance=guidance,
                pooled_projections=conditioning["pooled"],
                encoder_hidden_states=conditioning["text"],
                txt_ids=torch.zeros(conditioning["text"].shape[1], 3, device=latents.device),
                img_ids=_positions(height // 2, width // 2, latents.device),
                return_dict=False,
            )[0]
        output = output.to(torch.float32) if self.numerics.low_precision else output
        return unpacked(output, height, width)

    def _without(self) -> dict[str, Any]:
        return {"image_encoder": None, "feature_extractor": None}

    def _encode(self, prompt: str) -> Conditioning:
        text, pooled, _ = self.pipeline.encode_prompt(
            prompt, prompt, device=self.device, max_sequence_length=self._text_tokens
        )
        return Conditioning({"text": text.float(), "pooled": pooled.float()})

    def _forward(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        return self.predict(latents, times, conditioning, 1.0)


def packed(latents: Tensor) -> Tensor:
    """Make a token of every 2 x 2 latent pixels: [B, C, h, w] to [B, h w / 4, 4 C]."""
    batch, channels, height, width = latents.shape
    tiles = latents.view(batch, channels, height // 2, 2, width // 2, 2)
    return tiles.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // 4, 4 * channels)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """Undo `packed`: [B, h w / 4, 4 C] to [B, C, h, w]."""
    batch, _, features = tokens.shape
    tiles = tokens.view(batch, height // 2, width // 2, features // 4, 2, 2)
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(batch, features // 4, height, width)


def _positions(rows: int, columns: int, device: torch.device) -> Tensor:
    """Return row and column of every token, [rows columns, 3] float32; the first number is 0."""
    grid = torch.meshgrid(
        torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij"
    )
    places = torch.stack([torch.zeros_like(grid[0]), *grid], dim=-1)
    return places.reshape(rows * columns, 3).float()
