"""Stable Diffusion 1.x and 2.x: one UNet, one CLIP text encoder, one autoencoder."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffusers import StableDiffusionPipeline  # pyright: ignore[reportPrivateImportUsage]
from torch import Tensor
from transformers import CLIPTextModel, PreTrainedModel

from ddpo.config import FullConfig, LoraConfig, ModelConfig
from ddpo.models import lora_files
from ddpo.models.conditioning import Conditioning
from ddpo.models.facts import ModelFacts
from ddpo.models.files import ModelFiles
from ddpo.models.pipeline_policy import PipelinePolicy
from ddpo.models.schedule import ddim_scheduler
from ddpo.models.unet_inspection import inspect_stable_diffusion


class StableDiffusion(PipelinePolicy):
    """A Stable Diffusion 1.x or 2.x pipeline; its UNet holds the trained weights."""

    parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")
    pipeline_class = StableDiffusionPipeline
    network_part = "unet"
    text_encoders: ClassVar[Mapping[str, type[PreTrainedModel]]] = {"text_encoder": CLIPTextModel}
    trainable_text = ("text_encoder",)
    tokenizers = ("tokenizer",)
    expected = "Stable Diffusion 1.x or 2.x (or the starter)"

    @classmethod
    def inspect(
        cls, files: ModelFiles, model: ModelConfig, trainable: LoraConfig | FullConfig
    ) -> ModelFacts:
        """Check UNet, scheduler, size and files."""
        return inspect_stable_diffusion(files, model, trainable)

    def _kohya_base(self) -> str | None:
        return lora_files.kohya_base(self.pipeline.unet.config.cross_attention_dim)

    def _without(self) -> dict[str, Any]:
        return {
            "safety_checker": None,
            "feature_extractor": None,
            "requires_safety_checker": False,
        }

    def _reader(self, parts: Mapping[str, Any]) -> Any:
        return super()._reader({**parts, "requires_safety_checker": False})

    def _finish(self, pipeline: Any) -> None:
        super()._finish(pipeline)
        pipeline.scheduler = ddim_scheduler(pipeline.scheduler.config)

    def _encode(self, prompt: str) -> Conditioning:
        text, _ = self.pipeline.encode_prompt(
            prompt, self.device, 1, do_classifier_free_guidance=False
        )
        return Conditioning({"text": text})

    def _forward(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        with self.numerics.autocast():
            output: Tensor = self.weights.network(
                latents, times, conditioning["text"], return_dict=False
            )[0]
        return output.to(torch.float32) if self.numerics.low_precision else output
