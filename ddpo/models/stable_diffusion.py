"""Stable Diffusion 1.x and 2.x: one UNet, one CLIP text encoder, one autoencoder.

Shapes: B images, C latent channels, h x w latent pixels, L tokens, D text features.
"""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel  # pyright: ignore[reportPrivateImportUsage]
from diffusers.utils import convert_state_dict_to_diffusers
from PIL import Image
from torch import Tensor

from ddpo.config import ModelConfig
from ddpo.errors import ConfigError, ModelError
from ddpo.models.base import Conditioning, Policy
from ddpo.models.lora import LoraWeights
from ddpo.models.schedule import NoiseSchedule, ddim_scheduler


class StableDiffusion(Policy):
    """A Stable Diffusion 1.x or 2.x pipeline; its UNet holds the trained weights."""

    parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Shape of one image's latents, [C, h, w]."""
        width, height = (pixels // self.pipeline.vae_scale_factor for pixels in self.size)
        return (self.pipeline.unet.config.in_channels, height, width)

    def predict(
        self, latents: Tensor, times: Tensor, conditioning: Conditioning, guidance_scale: float
    ) -> Tensor:
        """Predict epsilon or v; with guidance, both predictions share one forward."""
        if guidance_scale == 1.0:
            return self._forward(latents, times, conditioning)
        empty = self.encode([""]).expand(len(conditioning))
        output = self._forward(
            torch.cat([latents, latents]),
            torch.cat([times, times]),
            Conditioning.cat([empty, conditioning]),
        )
        unconditional, conditional = output.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Turn clean latents into images.

        In float32 whatever the UNet computes in: 16-bit rounding in the autoencoder would be noise
        that a reward sees.
        """
        vae = self.pipeline.vae
        decoded = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        images = self.pipeline.image_processor.postprocess(decoded, output_type="pil")
        return cast(list[Image.Image], images)

    def export(self, folder: Path) -> None:
        """Write ``pytorch_lora_weights.safetensors``, or a whole pipeline (full fine-tuning)."""
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.weights, LoraWeights):
            self.pipeline.save_lora_weights(
                folder,
                unet_lora_layers=convert_state_dict_to_diffusers(self.weights.state()),
                unet_lora_adapter_metadata=self.weights.metadata,
            )
        else:
            self.pipeline.save_pretrained(folder, safe_serialization=True)

    def _load(self, model: ModelConfig) -> UNet2DConditionModel:
        self.pipeline = load_pipeline(self.folder)
        self.schedule = NoiseSchedule.from_scheduler(self.pipeline.scheduler.config)
        unet, scale = self.pipeline.unet, self.pipeline.vae_scale_factor
        side = unet.config.sample_size * scale
        self.size = model.size or (side, side)
        if any(pixels % scale for pixels in self.size):
            raise ConfigError(
                f"model.resolution {model.resolution} is not a multiple of {scale}, the pixels "
                "along one side of a latent pixel"
            )
        return unet

    def _move(self, device: torch.device) -> None:
        self.pipeline.to(device)

    def _encode(self, prompt: str) -> Conditioning:
        text, _ = self.pipeline.encode_prompt(
            prompt, self.device, 1, do_classifier_free_guidance=False
        )
        return Conditioning({"text": text})

    def _forward(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        with self.numerics.autocast():
            output = self.pipeline.unet(latents, times, conditioning["text"], return_dict=False)[0]
        return output.float() if self.numerics.low_precision else output


def load_pipeline(folder: Path) -> StableDiffusionPipeline:
    """Load a pipeline in float32, with diffusers' DDIM scheduler.

    Safetensors only, no remote code. The safety checker is left out: a black image in place of a
    sample would be scored as the model's own.

    Args:
        folder: A pipeline's folder.

    Returns:
        The pipeline, on the CPU, in eval mode and without gradients.

    Raises:
        ModelError: The folder does not hold such a pipeline.
    """
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder,
            use_safetensors=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            local_files_only=True,
        )
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(
            f"{folder} cannot be loaded as a StableDiffusionPipeline: {error}. Expected Stable "
            "Diffusion 1.x or 2.x (or the starter) in safetensors."
        ) from error
    pipeline.to(dtype=torch.float32)  # whatever the files are stored in
    pipeline.scheduler = ddim_scheduler(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    for module in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        module.requires_grad_(False).eval()
    return pipeline
