"""Tiny, randomly initialised pipelines of the newer families' real classes.

Pictures are 16 x 16 px; latents are 8 x 8, of 4 channels for Stable Diffusion XL and 8 for flows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2TokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from ddpo.starter.text import build_tokenizer
from tests.tiny import SCHEDULE

T5_TOKENS = 6


def build_tiny_sdxl(folder: Path) -> Path:
    """Write a pipeline with two text encoders and added size embeddings, as SDXL base has them."""
    with _seeded():
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=16 + 24,
            attention_head_dim=2,
            norm_num_groups=4,
            addition_embed_type="text_time",
            addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=24 + 6 * 4,
            use_linear_projection=True,
        )
        pipeline = StableDiffusionXLPipeline(
            vae=_vae(4),
            text_encoder=CLIPTextModel(_clip(16)),
            text_encoder_2=CLIPTextModelWithProjection(_clip(24)),
            tokenizer=build_tokenizer(),
            tokenizer_2=build_tokenizer(),
            unet=unet,
            scheduler=EulerDiscreteScheduler.from_config(SCHEDULE),
        )
    return _saved(pipeline, folder)


def build_tiny_sd3(folder: Path, *, t5: bool = True, dynamic: bool = False) -> Path:
    """Write a pipeline with a joint transformer and three text encoders, as SD3.5 has them."""
    with _seeded():
        transformer = SD3Transformer2DModel(
            sample_size=8,
            patch_size=2,
            in_channels=8,
            out_channels=8,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=48,
            caption_projection_dim=16,
            pooled_projection_dim=16 + 24,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        )
        pipeline = StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic),
            vae=_vae(8, shift_factor=0.06, scaling_factor=1.5),
            text_encoder=CLIPTextModelWithProjection(_clip(16)),
            text_encoder_2=CLIPTextModelWithProjection(_clip(24)),
            text_encoder_3=_t5(48) if t5 else None,
            tokenizer=build_tokenizer(),
            tokenizer_2=build_tokenizer(),
            tokenizer_3=t5_tokenizer() if t5 else None,
        )
    return _saved(pipeline, folder)


def build_tiny_flux(folder: Path) -> Path:
    """Write a pipeline with packed latents and distilled guidance, as FLUX.1-dev has them."""
    with _seeded():
        transformer = FluxTransformer2DModel(
            patch_size=1,
            in_channels=8 * 4,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        )
        pipeline = FluxPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=_vae(8, shift_factor=0.06, scaling_factor=1.5),
            text_encoder=CLIPTextModel(_clip(16)),
            text_encoder_2=_t5(24),
            tokenizer=build_tokenizer(),
            tokenizer_2=t5_tokenizer(),
        )
    return _saved(pipeline, folder)


def build_tiny_flux2(folder: Path) -> Path:
    """Write a pipeline with a language model and normalised latents, as FLUX.2-klein-base has."""
    tokenizer = chat_tokenizer()
    with _seeded():
        transformer = Flux2Transformer2DModel(
            in_channels=8 * 4,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=3 * 16,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=False,
        )
        vae = AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            layers_per_block=1,
            latent_channels=8,
            norm_num_groups=4,
            sample_size=16,
        )
        vae.bn.running_mean.normal_(std=0.1)
        vae.bn.running_var.uniform_(0.5, 2.0)
        text_encoder = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=28,  # the pipeline reads those after the 9th, 18th and 27th
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                tie_word_embeddings=True,
            )
        )
        pipeline = Flux2KleinPipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
        )
    return _saved(pipeline, folder)


FAMILIES: Mapping[str, Callable[[Path], Path]] = {
    "sdxl": build_tiny_sdxl,
    "sd3": build_tiny_sd3,
    "flux": build_tiny_flux,
    "flux2": build_tiny_flux2,
}
"""How each family's model is written."""

SETTINGS: Mapping[str, dict[str, Any]] = {
    "sdxl": {"sampler": {"type": "ddim", "steps": 4, "guidance_scale": 3.0}},
    "sd3": {
        "model": {"text_tokens": T5_TOKENS},
        "sampler": {"type": "flow_sde", "steps": 4, "guidance_scale": 3.0},
    },
    "flux": {
        "model": {"text_tokens": T5_TOKENS, "resolution": 16},
        "sampler": {"type": "flow_sde", "steps": 4, "guidance_scale": 3.5},
    },
    "flux2": {
        "model": {"text_tokens": 24, "resolution": 16},
        "sampler": {"type": "flow_sde", "steps": 4, "guidance_scale": 3.0},
    },
}
"""What a family's config has beside `tests.tiny.tiny_config`."""


def t5_tokenizer() -> T5TokenizerFast:
    """Return a tokenizer of whole words, which needs no file."""
    words = ["<pad>", "</s>", "<unk>", "▁a", "▁cat", "▁dog", "▁two", "▁cats", "▁"]
    words += [*"abcdefghijklmnopqrstuvwxyz"]
    return T5TokenizerFast(vocab=[(word, -float(i)) for i, word in enumerate(words)], extra_ids=0)


def chat_tokenizer() -> Qwen2TokenizerFast:
    """Return a tokenizer of single bytes with a chat template, which needs no file."""
    letters = sorted(ByteLevel.alphabet())
    tokenizer = Qwen2TokenizerFast(
        vocab={letter: number for number, letter in enumerate(letters)},
        merges=[],
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    tokenizer.chat_template = (
        "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}"
    )
    return tokenizer


def _t5(width: int) -> T5EncoderModel:
    return T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer()),
            d_model=width,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            feed_forward_proj="gated-gelu",
        )
    )


def _clip(width: int) -> CLIPTextConfig:
    tokenizer = build_tokenizer()
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _vae(channels: int, **settings: float) -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=4,
        sample_size=16,
        **settings,
    )


@contextmanager
def _seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _saved(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def plain_latents(
    policy: Any, prompt: str, scheduler: Any = None, /, **arguments: Any
) -> torch.Tensor:
    """Return what the pipeline's own call makes of a prompt, by default with its own scheduler.

    Returns:
        [1, C, h, w].
    """
    pipeline = policy.pipeline  # the very weights: in memory that is aligned otherwise, they round
    width, height = policy.size
    before, pipeline.scheduler = pipeline.scheduler, scheduler or pipeline.scheduler
    seen = []

    def note(_pipeline: Any, _step: int, _time: Any, given: dict[str, Any]) -> dict[str, Any]:
        seen.append(given["latents"])
        return given

    try:
        pipeline(
            prompt=prompt,
            output_type="latent",
            callback_on_step_end=note,
            width=width,
            height=height,
            generator=torch.Generator().manual_seed(5),
            **arguments,
            **policy.pipeline_arguments,
        )
    finally:
        pipeline.scheduler = before
    latents = seen[-1]
    if policy.pipeline_name == "FluxPipeline":
        latents = pipeline._unpack_latents(latents, height, width, pipeline.vae_scale_factor)
    if policy.pipeline_name == "Flux2KleinPipeline":
        latents = latents.transpose(1, 2).reshape(1, *policy.latent_shape)
    return latents
