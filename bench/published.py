"""The shapes of published models, as their JSON files on the Hub say: no weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}
_CLIP = {"vocab_size": 49408, "max_position_embeddings": 77}
_CLIP_L = {
    **_CLIP,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
_CLIP_G = {
    **_CLIP,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
    "hidden_act": "gelu",
}
_T5 = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
_VAE = {
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 4,
}
_VAE_16 = {**_VAE, "latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
_TOKENS = {"model_max_length": 77}
_T5_TOKENS = {"model_max_length": 512}

Parts = Mapping[str, tuple[str, Mapping[str, Any]]]
"""Class and config of each part."""

PUBLISHED: Mapping[str, tuple[str, Parts]] = {
    "Stable Diffusion 1.5": (
        "StableDiffusionPipeline",
        {
            "unet": (
                "UNet2DConditionModel",
                {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
            ),
            "vae": ("AutoencoderKL", {**_VAE, "sample_size": 512}),
            "text_encoder": ("CLIPTextModel", _CLIP_L),
            "tokenizer": ("CLIPTokenizer", _TOKENS),
            "scheduler": ("PNDMScheduler", {**_SCHEDULE, "skip_prk_steps": True}),
        },
    ),
    "Stable Diffusion XL": (
        "StableDiffusionXLPipeline",
        {
            "unet": (
                "UNet2DConditionModel",
                {
                    "sample_size": 128,
                    "block_out_channels": [320, 640, 1280],
                    "down_block_types": [
                        "DownBlock2D",
                        "CrossAttnDownBlock2D",
                        "CrossAttnDownBlock2D",
                    ],
                    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
                    "transformer_layers_per_block": [1, 2, 10],
                    "attention_head_dim": [5, 10, 20],
                    "cross_attention_dim": 2048,
                    "use_linear_projection": True,
                    "addition_embed_type": "text_time",
                    "addition_time_embed_dim": 256,
                    "projection_class_embeddings_input_dim": 2816,
                },
            ),
            "vae": ("AutoencoderKL", {**_VAE, "sample_size": 1024, "force_upcast": True}),
            "text_encoder": ("CLIPTextModel", _CLIP_L),
            "text_encoder_2": ("CLIPTextModelWithProjection", _CLIP_G),
            "tokenizer": ("CLIPTokenizer", _TOKENS),
            "tokenizer_2": ("CLIPTokenizer", _TOKENS),
            "scheduler": ("EulerDiscreteScheduler", _SCHEDULE),
        },
    ),
    "Stable Diffusion 3.5 Medium": (
        "StableDiffusion3Pipeline",
        {
            "transformer": (
                "SD3Transformer2DModel",
                {
                    "sample_size": 128,
                    "patch_size": 2,
                    "in_channels": 16,
                    "out_channels": 16,
                    "num_layers": 24,
                    "attention_head_dim": 64,
                    "num_attention_heads": 24,
                    "joint_attention_dim": 4096,
                    "caption_projection_dim": 1536,
                    "pooled_projection_dim": 2048,
                    "pos_embed_max_size": 384,
                    "dual_attention_layers": [*range(13)],
                    "qk_norm": "rms_norm",
                },
            ),
            "vae": ("AutoencoderKL", {**_VAE_16, "shift_factor": 0.0609}),
            "text_encoder": ("CLIPTextModelWithProjection", _CLIP_L),
            "text_encoder_2": ("CLIPTextModelWithProjection", _CLIP_G),
            "text_encoder_3": ("T5EncoderModel", _T5),
            "tokenizer": ("CLIPTokenizer", _TOKENS),
            "tokenizer_2": ("CLIPTokenizer", _TOKENS),
            "tokenizer_3": ("T5TokenizerFast", _T5_TOKENS),
            "scheduler": ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0}),
        },
    ),
    "FLUX.1-dev": (
        "FluxPipeline",
        {
            "transformer": ("FluxTransformer2DModel", {"guidance_embeds": True}),
            "vae": ("AutoencoderKL", {**_VAE_16, "shift_factor": 0.1159}),
            "text_encoder": ("CLIPTextModel", _CLIP_L),
            "text_encoder_2": ("T5EncoderModel", _T5),
            "tokenizer": ("CLIPTokenizer", _TOKENS),
            "tokenizer_2": ("T5TokenizerFast", _T5_TOKENS),
            "scheduler": (
                "FlowMatchEulerDiscreteScheduler",
                {"shift": 3.0, "use_dynamic_shifting": True},
            ),
        },
    ),
}
"""Pipeline class and parts of each model."""


def write_outline(name: str, folder: Path) -> Path:
    """Write the JSON files of a published model, as far as they decide its shapes.

    Args:
        name: One of `PUBLISHED`.
        folder: Created if missing.

    Returns:
        The folder, a pipeline without weights.
    """
    pipeline, parts = PUBLISHED[name]
    index: dict[str, Any] = {"_class_name": pipeline}
    if pipeline == "StableDiffusionXLPipeline":
        index["force_zeros_for_empty_prompt"] = True
    for part, (kind, config) in parts.items():
        library = "transformers" if part.startswith(("text_encoder", "tokenizer")) else "diffusers"
        index[part] = [library, kind]
        files = {"scheduler": "scheduler_config.json"}
        file = "tokenizer_config.json" if part.startswith("tokenizer") else "config.json"
        (folder / part).mkdir(parents=True, exist_ok=True)
        path = folder / part / files.get(part, file)
        path.write_text(json.dumps({"_class_name": kind, **config}))
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder
