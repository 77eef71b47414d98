"""Pipelines of published architectures with random weights, written where nothing is downloaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from bench.published import PUBLISHED
from ddpo.starter.text import build_tokenizer

FAMILIES: Mapping[str, str] = {
    "sd15": "Stable Diffusion 1.5",
    "sdxl": "Stable Diffusion XL",
    "sd3": "Stable Diffusion 3.5 Medium",
    "flux": "FLUX.1-dev",
}
"""The published model of each family, by a short name."""

_SHALLOW: Mapping[str, Mapping[str, Any]] = {
    "CLIPTextModel": {"num_hidden_layers": 2},
    "CLIPTextModelWithProjection": {"num_hidden_layers": 2},
    "T5EncoderModel": {"num_layers": 1},
}
"""Text encoders are run once a prompt and not measured: what they return has the right shape."""


def _tiny_clip(width: int) -> dict[str, int]:
    return {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "projection_dim": width,
        "num_attention_heads": 2,
    }


def _tiny_t5(width: int) -> dict[str, int]:
    return {"d_model": width, "d_kv": 8, "d_ff": 32, "num_heads": 2}


def _tiny_vae(channels: int) -> dict[str, Any]:
    return {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [8, 16],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": channels,
        "sample_size": 16,
    }


_TINY_UNET = {
    "sample_size": 8,
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
_TINY: Mapping[str, Mapping[str, Mapping[str, Any]]] = {
    "sd15": {
        "unet": {
            **_TINY_UNET,
            "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
            "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
            "cross_attention_dim": 16,
        },
        "vae": _tiny_vae(4),
        "text_encoder": _tiny_clip(16),
    },
    "sdxl": {
        "unet": {
            **_TINY_UNET,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2],
            "cross_attention_dim": 16 + 24,
            "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 24 + 6 * 4,
        },
        "vae": _tiny_vae(4),
        "text_encoder": _tiny_clip(16),
        "text_encoder_2": _tiny_clip(24),
    },
    "sd3": {
        "transformer": {
            "sample_size": 8,
            "in_channels": 8,
            "out_channels": 8,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 48,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 16 + 24,
            "pos_embed_max_size": 16,
            "dual_attention_layers": [0],
        },
        "vae": _tiny_vae(8),
        "text_encoder": _tiny_clip(16),
        "text_encoder_2": _tiny_clip(24),
        "text_encoder_3": _tiny_t5(48),
    },
    "flux": {
        "transformer": {
            "in_channels": 8 * 4,
            "num_layers": 1,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 24,
            "pooled_projection_dim": 16,
            "axes_dims_rope": [4, 6, 6],
        },
        "vae": _tiny_vae(8),
        "text_encoder": _tiny_clip(16),
        "text_encoder_2": _tiny_t5(24),
    },
}
"""What makes a family's parts tiny: images have 16 px."""


def write_random(
    family: str, folder: Path, *, tiny: bool, device: str, blocks: int | None = None
) -> Path:
    """Write a pipeline of a family's classes and shapes with random weights, in 16 bits.

    Args:
        family: One of `FAMILIES`.
        folder: Created if missing.
        tiny: Whether its parts are tiny instead of the published ones.
        device: Where the weights are drawn.
        blocks: Transformer blocks of each kind, of a transformer; by default the published ones.

    Returns:
        The folder.
    """
    pipeline, parts = PUBLISHED[FAMILIES[family]]
    made: dict[str, Any] = {}
    with torch.random.fork_rng(devices=[device] if device == "cuda" else []):
        torch.manual_seed(0)
        for part, (kind, published) in parts.items():
            changes = {**_SHALLOW.get(kind, {}), **(_TINY[family].get(part, {}) if tiny else {})}
            if blocks is not None and part == "transformer":
                changes |= {"num_layers": blocks, "num_single_layers": blocks}
            made[part] = _part(part, kind, {**published, **changes}, device, tiny=tiny)
    if pipeline == "StableDiffusionPipeline":
        made |= {"safety_checker": None, "feature_extractor": None}
        made["requires_safety_checker"] = False
    getattr(diffusers, pipeline)(**made).save_pretrained(folder, safe_serialization=True)
    return folder


def _part(part: str, kind: str, config: dict[str, Any], device: str, *, tiny: bool) -> Any:
    if part.startswith("tokenizer"):
        return _t5_tokenizer() if kind == "T5TokenizerFast" else _clip_tokenizer(tiny=tiny)
    if part == "scheduler":
        return getattr(diffusers, kind).from_config(config)
    if part.startswith("text_encoder"):
        made: Any = getattr(transformers, kind)
        vocabulary = {} if kind == "T5EncoderModel" else _vocabulary()
        with torch.device(device):
            made = made(made.config_class(**{**config, **vocabulary}))
    else:
        with torch.device(device):
            made = getattr(diffusers, kind).from_config(config)
    return made.to("cpu", torch.bfloat16)


def _vocabulary() -> dict[str, int]:
    tokenizer = build_tokenizer()
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in names}}


def _clip_tokenizer(*, tiny: bool) -> Any:
    tokenizer = build_tokenizer()
    if not tiny:
        tokenizer.model_max_length = 77
    return tokenizer


def _t5_tokenizer() -> Any:
    words = ["<pad>", "</s>", "<unk>", "▁", *"abcdefghijklmnopqrstuvwxyz"]
    untyped: Any = transformers
    return untyped.T5TokenizerFast(
        vocab=[(word, -float(i)) for i, word in enumerate(words)], extra_ids=0
    )
