"""Stable Diffusion 1.x and 2.x: one UNet, one CLIP text encoder, one autoencoder.

Shapes: B images, C latent channels, h x w latent pixels, L tokens, D text features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel  # pyright: ignore[reportPrivateImportUsage]
from diffusers.loaders.lora_base import LORA_WEIGHT_NAME_SAFE
from diffusers.utils import logging
from peft.utils import get_peft_model_state_dict
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel

from ddpo.basics.tensors import detach_from_files
from ddpo.config import FullConfig, LoraConfig, ModelConfig
from ddpo.errors import ModelError
from ddpo.models import exports, hub, lora_files
from ddpo.models.base import Conditioning, ModelFacts, Policy
from ddpo.models.files import ModelFiles
from ddpo.models.inspection import inspect_stable_diffusion
from ddpo.models.lora import LoraWeights
from ddpo.models.schedule import ddim_scheduler


class StableDiffusion(Policy):
    """A Stable Diffusion 1.x or 2.x pipeline; its UNet holds the trained weights."""

    parts = ("unet", "vae", "text_encoder", "tokenizer", "scheduler")

    @classmethod
    def inspect(
        cls, files: ModelFiles, model: ModelConfig, trainable: LoraConfig | FullConfig
    ) -> ModelFacts:
        """Check UNet, scheduler, size and files."""
        return inspect_stable_diffusion(files, model, trainable)

    @property
    def most_tokens(self) -> int:
        """How many tokens of a prompt the text encoder reads."""
        return self.pipeline.tokenizer.model_max_length

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Return how many tokens each prompt has, those included that mark its start and end."""
        tokens = self.pipeline.tokenizer(list(prompts), verbose=False).input_ids
        return [len(ids) for ids in tokens]

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
        that a reward sees. On CUDA, with ``numerics.tf32``, its convolutions round to TF32: the
        switch is the process's, and rewards that compute beside it must not see it change.
        """
        vae = self.pipeline.vae
        decoded = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        images = self.pipeline.image_processor.postprocess(decoded, output_type="pil")
        return cast(list[Image.Image], images)

    def export(self, folder: Path) -> None:
        """Write ``pytorch_lora_weights.safetensors``, or a whole pipeline (full fine-tuning)."""
        folder.mkdir(parents=True, exist_ok=True)
        if isinstance(self.weights, LoraWeights):
            self._export_adapter(folder, self.weights.folded())
        else:
            self._export_pipeline(folder)

    def _export_adapter(self, folder: Path, adapter: dict[str, Any]) -> None:
        # Under peft's names, all of them: diffusers' own conversion renames attention layers alone,
        # and its loader then drops those. Without settings in the header: some readers do not look
        # there, and older ones refuse settings that are newer than they are.
        self.pipeline.save_lora_weights(
            folder, unet_lora_layers=adapter, save_function=exports.save_tensors
        )
        self._check_adapter(folder / LORA_WEIGHT_NAME_SAFE, adapter)

    def export_lora(
        self, diffusers_file: Path, kohya_file: Path, notes: Mapping[str, str]
    ) -> str | None:
        """Write the adapter in use for diffusers, and for ComfyUI and AUTOMATIC1111."""
        weights = cast(LoraWeights, self.weights)
        adapter, config = weights.folded(), weights.config
        base = lora_files.kohya_base(self.pipeline.unet.config.cross_attention_dim)
        lora_files.write_diffusers(diffusers_file, adapter, config, notes)
        self._check_adapter(diffusers_file, adapter)
        lora_files.write_kohya(kohya_file, adapter, config, base, notes)
        return base

    def _check_adapter(self, file: Path, adapter: Mapping[str, Tensor]) -> None:
        with torch.device("meta"):
            unet = cast(
                UNet2DConditionModel, UNet2DConditionModel.from_config(self.pipeline.unet.config)
            )
        unet.to_empty(device="cpu")  # without values, which loading an adapter does not need
        absent: Any = None
        reader = StableDiffusionPipeline(
            absent, absent, absent, unet, absent, absent, absent, requires_safety_checker=False
        )
        reader.load_lora_weights(
            str(file.parent),
            weight_name=file.name,
            adapter_name="default",
            local_files_only=True,
        )
        exports.check_read_back("adapter", get_peft_model_state_dict(unet), adapter)

    def _export_pipeline(self, folder: Path) -> None:
        self.check_files()
        exports.write_pipeline(folder, self.folder, self.parts, "unet", self.weights.state())
        reader = load_pipeline(hub.local_files(folder, self.parts))
        for part in ("unet", "vae", "text_encoder"):
            written, found = (getattr(each, part).state_dict() for each in (self.pipeline, reader))
            exports.check_read_back(f"pipeline's {part}", found, written)

    def _load(self, files: ModelFiles) -> UNet2DConditionModel:
        self.pipeline = load_pipeline(files)
        return self.pipeline.unet

    def _move(self, device: torch.device) -> None:
        self.pipeline.to(device)
        for module in (self.pipeline.unet, self.pipeline.vae, self.pipeline.text_encoder):
            detach_from_files(module)

    def _encode(self, prompt: str) -> Conditioning:
        text, _ = self.pipeline.encode_prompt(
            prompt, self.device, 1, do_classifier_free_guidance=False
        )
        return Conditioning({"text": text})

    def _forward(self, latents: Tensor, times: Tensor, conditioning: Conditioning) -> Tensor:
        with self.numerics.autocast():
            output = self.pipeline.unet(latents, times, conditioning["text"], return_dict=False)[0]
        return output.float() if self.numerics.low_precision else output


def load_pipeline(files: ModelFiles) -> StableDiffusionPipeline:
    """Load a pipeline in float32, with diffusers' DDIM scheduler.

    Safetensors only, no remote code. The safety checker is left out: a black image in place of a
    sample would be scored as the model's own.

    Args:
        files: The pipeline's, all of them here.

    Returns:
        The pipeline, on the CPU, in eval mode and without gradients.

    Raises:
        ModelError: The folder does not hold such a pipeline, or its weights are not finite.
    """
    logging.disable_progress_bar()  # of loading, which no environment variable controls
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            files.folder,
            text_encoder=_load_text_encoder(files),
            variant=files.variant,
            use_safetensors=True,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            local_files_only=True,
        )
    except (OSError, ValueError, TypeError, KeyError, IndexError, RuntimeError) as error:
        raise ModelError(
            f"{files.folder} cannot be loaded as a StableDiffusionPipeline: {error}. Expected "
            "Stable Diffusion 1.x or 2.x (or the starter) in safetensors."
        ) from error
    pipeline.to(dtype=torch.float32)  # whatever the files are stored in
    pipeline.scheduler = ddim_scheduler(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    for part in ("unet", "vae", "text_encoder"):
        module: torch.nn.Module = getattr(pipeline, part)
        module.requires_grad_(False).eval()
        _check_finite(module, files.folder / part)
    return pipeline


def _load_text_encoder(files: ModelFiles) -> CLIPTextModel:
    """Load a text encoder; raise ModelError if its files lack, or name otherwise, some weights."""
    # Where diffusers fails, transformers initialises missing weights at random, with a warning.
    folder, variant = files.folder / "text_encoder", files.variant_of("text_encoder")
    loaded: Any = CLIPTextModel.from_pretrained(
        folder,
        variant=variant,
        output_loading_info=True,
        use_safetensors=True,
        local_files_only=True,
    )
    model, report = loaded
    if missing := sorted(report["missing_keys"]):
        raise ModelError(
            f"in the text encoder in {folder}, this release of transformers finds no weights for "
            f"{missing[0]} and {len(missing) - 1} others; expected a CLIPTextModel as "
            "save_pretrained writes it. Download or convert the model again"
        )
    return model


def _check_finite(module: torch.nn.Module, folder: Path) -> None:
    for name, parameter in module.named_parameters():
        if not parameter.isfinite().all():
            raise ModelError(
                f"{name} in {folder} holds NaN or infinity: the base model itself (checkpoint 0) "
                "is damaged, before any training. Download or convert it again"
            )
