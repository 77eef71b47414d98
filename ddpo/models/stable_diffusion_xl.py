"""Stable Diffusion XL: a UNet that also reads pooled text and the image's size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionXLPipeline  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel

from ddpo.config import FullConfig, LoraConfig, ModelConfig
from ddpo.models import lora_files
from ddpo.models.conditioning import Conditioning
from ddpo.models.facts import ModelFacts
from ddpo.models.files import ModelFiles
from ddpo.models.pipeline_policy import PipelinePolicy
from ddpo.models.schedule import ddim_scheduler
from ddpo.models.unet_inspection import inspect_stable_diffusion_xl


class StableDiffusionXL(PipelinePolicy):
    """A Stable Diffusion XL base pipeline; its UNet holds the trained weights."""

    parts = (
        "unet",
        "vae",
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "scheduler",
    )
    pipeline_class = StableDiffusionXLPipeline
    network_part = "unet"
    text_encoders: ClassVar[Mapping[str, type[PreTrainedModel]]] = {
        "text_encoder": CLIPTextModel,
        "text_encoder_2": CLIPTextModelWithProjection,
    }
    trainable_text = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")
    expected = "Stable Diffusion XL base"

    @classmethod
    def inspect(
        cls, files: ModelFiles, model: ModelConfig, trainable: LoraConfig | FullConfig
    ) -> ModelFacts:
        """Check UNet, scheduler, size and files."""
        return inspect_stable_diffusion_xl(files, model, trainable)

    def _kohya_base(self) -> str | None:
        return lora_files.kohya_base(self.pipeline.unet.config.cross_attention_dim)

    def _without(self) -> dict[str, Any]:
        return {"image_encoder": None, "feature_extractor": None, "add_watermarker": False}

    def _finish(self, pipeline: Any) -> None:
        super()._finish(pipeline)
        pipeline.scheduler = ddim_scheduler(pipeline.scheduler.config)

    def _unconditional(self) -> Conditioning:
        """Return zeros where the model was trained so, and the empty prompt's row elsewhere."""
        empty = self.encode([""])
        if not self.pipeline.config.force_zeros_for_empty_prompt:
            return empty
        return Conditioning({name: torch.zeros_like(row) for name, row in empty.tensors.items()})

    def _encode(self, prompt: str) -> Conditioning:
        text, _, pooled, _ = self.pipeline.encode_prompt(
            prompt, device=self.device, do_classifier_free_guidance=False
        )
        return Conditioning({"text": text, "pooled": pooled})

    def _forward(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        height, width = self.size[1], self.size[0]
        # Original size, crop and target size, as the pipeline's defaults have them: a whole image.
        numbers = [height, width, 0, 0, height, width]
        time_ids = torch.tensor([numbers], dtype=torch.float32, device=latents.device)
        added = {
            "text_embeds": conditioning["pooled"],
            "time_ids": time_ids.expand(len(latents), -1),
        }
        with self.numerics.autocast():
            output: Tensor = self.weights.network(
                latents,
                times,
                conditioning["text"],
                added_cond_kwargs=added,
                return_dict=False,
            )[0]
        return output.to(torch.float32) if self.numerics.low_precision else output
