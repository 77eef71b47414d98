"""A text-to-image diffusion pipeline seen as a policy: p_theta(x_{t-1} | x_t, prompt).

Shapes: B pictures, C latent channels, h x w latent pixels, L tokens, D text features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
from PIL import Image
from torch import Tensor

from ddpo.basics.digests import json_digest, tensors_digest
from ddpo.basics.randomness import derive_seed
from ddpo.config import FullConfig, LoraConfig, ModelConfig
from ddpo.errors import ConfigError
from ddpo.models.hub import base_digest, fetch_model, load_pipeline
from ddpo.models.numerics import Numerics
from ddpo.models.weights import make_trainable


class Policy:
    """A loaded pipeline with trainable weights. Loaded once a process; weights are swapped.

    Attributes:
        pipeline: The diffusers pipeline; its UNet holds the trained weights.
        weights: The trained weights, in and out.
        folder: Where the base model was loaded from.
        base_digest: sha256 of the base model's files.
        resolution: Pixels a side.
    """

    def __init__(
        self,
        model: ModelConfig,
        trainable: LoraConfig | FullConfig,
        numerics: Numerics,
        *,
        seed: int,
    ) -> None:
        numerics.apply()
        self.numerics = numerics
        self.folder = fetch_model(model)
        self.base_digest = base_digest(self.folder)
        self.pipeline = load_pipeline(self.folder)
        self.weights = make_trainable(
            self.pipeline.unet,
            trainable,
            seed=derive_seed(seed, "adapter"),
            dtype=numerics.torch_dtype,
        )
        if numerics.gradient_checkpointing:
            self.pipeline.unet.enable_gradient_checkpointing()
        self.pipeline.to(numerics.torch_device)
        scale = self.pipeline.vae_scale_factor
        self.resolution = model.resolution or self.pipeline.unet.config.sample_size * scale
        if self.resolution % scale:
            raise ConfigError(
                f"model.resolution {self.resolution} is not a multiple of {scale}, the pixels that "
                "one latent pixel stands for"
            )
        self._embeddings: dict[str, Tensor] = {}

    @property
    def device(self) -> torch.device:
        """Where the policy computes."""
        return self.numerics.torch_device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """[C, h, w] of one picture's latents."""
        side = self.resolution // self.pipeline.vae_scale_factor
        return (self.pipeline.unet.config.in_channels, side, side)

    @property
    def digest(self) -> str:
        """``policy_digest``: base model and trained weights as they are now."""
        return policy_digest(self.base_digest, self.weights.state())

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Encode prompts, each distinct one once and by itself.

        Args:
            texts: B prompts.

        Returns:
            [B, L, D] float32 on the device.
        """
        for text in dict.fromkeys(texts):
            if text not in self._embeddings:
                with torch.no_grad():
                    self._embeddings[text], _ = self.pipeline.encode_prompt(
                        text, self.device, 1, do_classifier_free_guidance=False
                    )
        return torch.cat([self._embeddings[text] for text in texts])

    def predict(
        self, latents: Tensor, timesteps: Tensor, embeddings: Tensor, guidance_scale: float
    ) -> Tensor:
        """Predict with classifier-free guidance, unconditional and conditional in one forward.

        Args:
            latents: [B, C, h, w] float32.
            timesteps: [B] int64.
            embeddings: [B, L, D].
            guidance_scale: 1 is none, and costs half.

        Returns:
            [B, C, h, w], at least float32: epsilon or v, as the model's scheduler says.
        """
        if guidance_scale == 1.0:
            return self._forward(latents, timesteps, embeddings)
        empty = self.embed([""]).expand_as(embeddings)
        output = self._forward(
            torch.cat([latents, latents]),
            torch.cat([timesteps, timesteps]),
            torch.cat([empty, embeddings]),
        )
        unconditional, conditional = output.chunk(2)
        return unconditional + guidance_scale * (conditional - unconditional)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Turn clean latents into pictures.

        In float32 whatever the UNet computes in: 16-bit rounding in the autoencoder is noise that
        a reward would see.

        Args:
            latents: [B, C, h, w] float32.

        Returns:
            B RGB pictures.
        """
        vae = self.pipeline.vae
        decoded = vae.decode(latents / vae.config.scaling_factor, return_dict=False)[0]
        pictures = self.pipeline.image_processor.postprocess(decoded, output_type="pil")
        return cast(list[Image.Image], pictures)

    def export(self, folder: Path) -> None:
        """Write the trained weights as plain diffusers loads them.

        Args:
            folder: Receives ``pytorch_lora_weights.safetensors``, or a whole pipeline.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.weights.export(self.pipeline, folder)

    def _forward(self, latents: Tensor, timesteps: Tensor, embeddings: Tensor) -> Tensor:
        with self.numerics.autocast():
            output = self.pipeline.unet(latents, timesteps, embeddings, return_dict=False)[0]
        return output.float() if self.numerics.low_precision else output


def policy_digest(base: str, weights: Mapping[str, Tensor]) -> str:
    """Return ``policy_digest``: what a base model and trained weights are together.

    Args:
        base: ``base_digest`` of the model.
        weights: The trained weights by name.

    Returns:
        sha256, hexadecimal.
    """
    return json_digest({"base": base, "weights": tensors_digest(weights)})
