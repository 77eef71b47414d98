"""Two stages: the autoencoder, and the latents of all images."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from rich.progress import track
from safetensors.torch import save_file
from torch import Tensor

from ddpo.basics.randomness import derive_seed, generator
from starter_training.loop import console, fit, load_ema, one_core_each, replacing
from starter_training.losses import KL_WEIGHT, kl_loss, picture_loss
from starter_training.networks import build_vae, decode, encode, to_model
from starter_training.stages.pictures import read_pictures
from starter_training.work import Recipe, WorkFolder

ENCODED_AT_ONCE = 64


def train_vae(work: WorkFolder, recipe: Recipe) -> None:
    """Train the autoencoder, in bfloat16 with float32 weights."""
    torch.manual_seed(derive_seed(recipe.seed, "vae weights"))
    vae = build_vae()
    pictures = read_pictures(work.pictures)

    def loss_of_shard(step: int, shard: int) -> Tensor:
        draws = generator(derive_seed(recipe.seed, "vae", step, shard))
        chosen = torch.randint(len(pictures), (recipe.vae.shard,), generator=draws)
        real = to_model(pictures[chosen.numpy()])
        with torch.autocast("cpu", torch.bfloat16):
            posterior = encode(vae, real)
            mean, log_variance = posterior.mean.float(), posterior.logvar.float()
            noise = torch.randn(mean.shape, generator=draws)
            made = decode(vae, mean + noise * torch.exp(0.5 * log_variance)).float()
        return picture_loss(made, real) + KL_WEIGHT * kl_loss(mean, log_variance)

    fit("autoencoder", vae, loss_of_shard, recipe.vae, work.vae)


def encode_all(vae: AutoencoderKL, file: Path, dtype: torch.dtype) -> Tensor:
    """Encode all rendered images.

    Args:
        vae: The autoencoder.
        file: N images.
        dtype: Of the arithmetic. bfloat16 is a few times as fast as float32 on processors that have
            it, and 30 times slower on others.

    Returns:
        [N, 16, 8, 8] float32.
    """
    pictures = read_pictures(file)

    @torch.no_grad()
    def encode_from(start: int) -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            batch = to_model(pictures[start : start + ENCODED_AT_ONCE])
            return encode(vae, batch).mode().float()

    starts = range(0, len(pictures), ENCODED_AT_ONCE)
    with one_core_each() as pool:
        parts = track(pool.map(encode_from, starts), "latents", len(starts), console=console)
        return torch.cat(list(parts))


def encode_latents(work: WorkFolder, recipe: Recipe) -> None:
    """Encode all images once, and whiten the latents channel by channel."""
    del recipe
    if work.latents.exists():
        return
    vae = build_vae()
    load_ema(vae, work.vae)
    latents = encode_all(vae, work.pictures, torch.bfloat16)
    with one_core_each():
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
    latents = (latents - mean[:, None, None]) / std[:, None, None]
    with replacing(work.latents) as temporary:
        tensors = {"latents": latents.half().contiguous(), "mean": mean, "std": std}
        save_file(tensors, temporary)
