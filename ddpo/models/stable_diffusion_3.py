"""Stable Diffusion 3 and 3.5: a transformer on a rectified flow, and two or three text encoders."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusion3Pipeline  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor
from transformers import CLIPTextModelWithProjection, PreTrainedModel, T5EncoderModel

from ddpo.config import FullConfig, LoraConfig, ModelConfig
from ddpo.models.conditioning import Conditioning
from ddpo.models.facts import ModelFacts
from ddpo.models.files import ModelFiles
from ddpo.models.flow_inspection import inspect_stable_diffusion_3
from ddpo.models.pipeline_policy import PipelinePolicy


class StableDiffusion3(PipelinePolicy):
    """A Stable Diffusion 3 or 3.5 pipeline; its transformer holds the trained weights."""

    parts = (
        "transformer",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "text_encoder_3",
        "tokenizer",
        "tokenizer_2",
        "tokenizer_3",
        "scheduler",
    )
    optional_parts = ("text_encoder_3", "tokenizer_3")
    pipeline_class = StableDiffusion3Pipeline
    network_part = "transformer"
    own_settings = ("t5", "text_tokens")
    text_encoders: ClassVar[Mapping[str, type[PreTrainedModel]]] = {
        "text_encoder": CLIPTextModelWithProjection,
        "text_encoder_2": CLIPTextModelWithProjection,
        "text_encoder_3": T5EncoderModel,
    }
    text_tokens = 256
    tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3")
    expected = "Stable Diffusion 3 or 3.5"

    @classmethod
    def inspect(
        cls, files: ModelFiles, model: ModelConfig, trainable: LoraConfig | FullConfig
    ) -> ModelFacts:
        """Check transformer, scheduler, size and files."""
        return inspect_stable_diffusion_3(files, model, trainable)

    @property
    def most_tokens(self) -> int:
        """How many tokens of a prompt the encoder that reads most of it reads."""
        if self.pipeline.tokenizer_3 is None:
            return super().most_tokens
        return self._text_tokens

    def _without(self) -> dict[str, Any]:
        return {"image_encoder": None, "feature_extractor": None}

    def _encode(self, prompt: str) -> Conditioning:
        text, _, pooled, _ = self.pipeline.encode_prompt(
            prompt,
            prompt,
            prompt,
            device=self.device,
            do_classifier_free_guidance=False,
            max_sequence_length=self._text_tokens,
        )
        return Conditioning({"text": text.float(), "pooled": pooled.float()})

    def _forward(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        with self.numerics.autocast():
            output: Tensor = self.weights.network(
                latents,
                conditioning["text"],
                conditioning["pooled"],
                times,
                return_dict=False,
            )[0]
        return output.to(torch.float32) if self.numerics.low_precision else output
