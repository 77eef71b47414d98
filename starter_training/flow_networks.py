"""The flow starter's parts: the classes of Stable Diffusion 3.5, 500 times smaller."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from ddpo.starter.text import BOS, EOS, MAX_TOKENS, build_tokenizer
from starter_training.networks import LATENT_CHANNELS, LATENT_SIZE

TEXT_WIDTHS = (128, 64)
"""Of the two text encoders; the transformer reads both side by side."""

TEXT_LAYERS = (3, 2)
"""As in Stable Diffusion 3, the last layer only makes the pooled output."""

HEADS = 4
HEAD_WIDTH = 32
LAYERS = 6


def build_transformer() -> SD3Transformer2DModel:
    """Return an untrained velocity predictor on [B, 16, 8, 8], whose tokens are single pixels.

    As in diffusion transformers at large, every block starts as the identity and the output as 0.
    """
    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE,
        patch_size=1,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=LAYERS,
        attention_head_dim=HEAD_WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=sum(TEXT_WIDTHS),
        caption_projection_dim=HEADS * HEAD_WIDTH,
        pooled_projection_dim=sum(TEXT_WIDTHS),
        pos_embed_max_size=LATENT_SIZE,
        qk_norm="rms_norm",
    )
    for name, module in transformer.named_modules():
        modulates = name.startswith("transformer_blocks.") and name.endswith(".linear")
        if modulates or name in ("norm_out.linear", "proj_out"):
            nn.init.zeros_(module.get_parameter("weight"))
            nn.init.zeros_(module.get_parameter("bias"))
    return transformer


def build_text_encoder(
    tokenizer: CLIPTokenizer, width: int, layers: int
) -> CLIPTextModelWithProjection:
    """Return an untrained text encoder for a tokenizer's vocabulary.

    Args:
        tokenizer: The tokenizer.
        width: Of its features, and of its pooled output.
        layers: How many it has.
    """
    vocab = tokenizer.get_vocab()
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=vocab[BOS],
            eos_token_id=vocab[EOS],
            pad_token_id=vocab[EOS],
        )
    )


class FlowDenoiser(nn.Module):
    """Velocity predictor and both text encoders, which are trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer()
        self.transformer = build_transformer()
        self.text_encoder, self.text_encoder_2 = (
            build_text_encoder(self.tokenizer, width, layers)
            for width, layers in zip(TEXT_WIDTHS, TEXT_LAYERS, strict=True)
        )

    def text(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Encode prompts as `StableDiffusion3Pipeline` does, without a third encoder's tokens.

        Args:
            tokens: int64 [B, 24].

        Returns:
            Features [B, 24, 192] and pooled features [B, 192].
        """
        encoded = [
            encoder(tokens, output_hidden_states=True)
            for encoder in (self.text_encoder, self.text_encoder_2)
        ]
        return (
            torch.cat([each.hidden_states[-2] for each in encoded], dim=-1),
            torch.cat([each.text_embeds for each in encoded], dim=-1),
        )


def assemble(vae: AutoencoderKL, denoiser: FlowDenoiser) -> StableDiffusion3Pipeline:
    """Assemble a pipeline without the third text encoder, T5."""
    absent: Any = None  # diffusers annotates what may be missing as required
    return StableDiffusion3Pipeline(
        transformer=denoiser.transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=denoiser.text_encoder,
        tokenizer=denoiser.tokenizer,
        text_encoder_2=denoiser.text_encoder_2,
        tokenizer_2=denoiser.tokenizer,
        text_encoder_3=absent,
        tokenizer_3=absent,
    )
