"""The starter's parts: classes and noise schedule of Stable Diffusion 1.x, 100 times smaller."""

from __future__ import annotations

from typing import Any, cast

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ddpo.starter.render import SIZE_PX, Pixels
from ddpo.starter.text import BOS, EOS, MAX_TOKENS, build_tokenizer

LATENT_CHANNELS = 16
LATENT_SIZE = SIZE_PX // 8
TEXT_WIDTH = 128


def build_vae() -> AutoencoderKL:
    """Return an untrained autoencoder from [B, 3, 64, 64] in -1..1 to latents [B, 16, 8, 8]."""
    # diffusers annotates these three as tuples of one.
    blocks: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 4,
        "up_block_types": ("UpDecoderBlock2D",) * 4,
        "block_out_channels": (16, 32, 64, 96),
    }
    return AutoencoderKL(
        **blocks,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=8,
        sample_size=SIZE_PX,
        # Latents are whitened when the model is exported (see `whiten`), so no scaling remains.
        scaling_factor=1.0,
    )


def build_unet() -> UNet2DConditionModel:
    """Return an untrained noise predictor on [B, 16, 8, 8], attending to text at both levels."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * 2,
        up_block_types=("CrossAttnUpBlock2D",) * 2,
        block_out_channels=(64, 128),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # diffusers' name for the number of heads, as in Stable Diffusion 1.x
        norm_num_groups=16,
    )


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Return an untrained text encoder of width 128 for a tokenizer's vocabulary."""
    vocab = tokenizer.get_vocab()
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=vocab[BOS],
            eos_token_id=vocab[EOS],
            pad_token_id=vocab[EOS],
        )
    )


class Denoiser(nn.Module):
    """Noise predictor (on latents [B, 16, 8, 8]) and text encoder, which are trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.tokenizer = build_tokenizer()
        self.unet = build_unet()
        self.text_encoder = build_text_encoder(self.tokenizer)


def encode(vae: AutoencoderKL, pictures: Tensor) -> DiagonalGaussianDistribution:
    """Return the distribution of latents [B, 16, 8, 8] of images [B, 3, 64, 64] in -1..1."""
    (posterior,) = cast(
        tuple[DiagonalGaussianDistribution], vae.encode(pictures, return_dict=False)
    )
    return posterior


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Return the images [B, 3, 64, 64], about -1..1, of latents [B, 16, 8, 8]."""
    # diffusers annotates latents as torch.FloatTensor, which no tensor is an instance of.
    (pictures,) = cast(tuple[Tensor], vae.decode(cast(Any, latents), return_dict=False))
    return pictures


def to_model(pixels: Pixels) -> Tensor:
    """Convert uint8 [B, 64, 64, 3] into [B, 3, 64, 64] in -1..1."""
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float().contiguous() / 127.5 - 1


def to_pixels(pictures: Tensor) -> Pixels:
    """Convert [B, 3, 64, 64], clipped to -1..1, into uint8 [B, 64, 64, 3]."""
    scaled = (pictures.clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(0, 2, 3, 1).numpy()


def build_scheduler() -> DDIMScheduler:
    """Return DDIM on Stable Diffusion 1.x's noise schedule."""
    return DDIMScheduler(
        num_train_timesteps=1000,
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="epsilon",
    )


@torch.no_grad()
def whiten(vae: AutoencoderKL, mean: Tensor, std: Tensor) -> None:
    """Rescale the latent space to mean 0 and standard deviation 1 in every channel, in place.

    The 1x1 convolutions on both sides of the latent space absorb the change, so images stay the
    same. A pipeline's single `scaling_factor` cannot differ between channels.

    Args:
        vae: The autoencoder to change.
        mean: Current mean of each latent channel, [16].
        std: Current standard deviation of each latent channel, [16].
    """
    channels = len(mean)
    outward, inward = vae.get_submodule("quant_conv"), vae.get_submodule("post_quant_conv")
    encode_weight, encode_bias = outward.get_parameter("weight"), outward.get_parameter("bias")
    decode_weight, decode_bias = inward.get_parameter("weight"), inward.get_parameter("bias")
    encode_weight[:channels] /= std[:, None, None, None]
    encode_bias[:channels] = (encode_bias[:channels] - mean) / std
    encode_bias[channels:] -= 2 * std.log()  # the second half is the log variance
    decode_bias += decode_weight[:, :, 0, 0] @ mean
    decode_weight *= std[None, :, None, None]


def assemble(vae: AutoencoderKL, denoiser: Denoiser) -> StableDiffusionPipeline:
    """Assemble a pipeline without safety checker and feature extractor."""
    # diffusers annotates the scheduler as an enumeration, and these two as required.
    rest: dict[str, Any] = {
        "scheduler": build_scheduler(),
        "safety_checker": None,
        "feature_extractor": None,
    }
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=denoiser.text_encoder,
        tokenizer=denoiser.tokenizer,
        unet=denoiser.unet,
        requires_safety_checker=False,
        **rest,
    )
