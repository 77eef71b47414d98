"""The stages of the flow starter, which shares the shipped starter's autoencoder and judge."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

from ddpo.basics.randomness import derive_seed, generator
from ddpo.starter import STARTER_PATH
from starter_training.flow_networks import FlowDenoiser
from starter_training.loop import fit, replacing
from starter_training.prompt_table import PromptTable
from starter_training.stages.autoencoder import encode_all
from starter_training.stages.generator import DROPPED
from starter_training.stages.pictures import scene_numbers
from starter_training.work import FlowRecipe, WorkFolder


def shipped_vae() -> AutoencoderKL:
    """Return the autoencoder of the starter that ships."""
    return AutoencoderKL.from_pretrained(STARTER_PATH, subfolder="vae")


def encode_by_shipped(work: WorkFolder, recipe: FlowRecipe) -> None:
    """Encode all images once by the shipped autoencoder, whose latents are white."""
    del recipe
    if not work.latents.exists():
        latents = encode_all(shipped_vae(), work.pictures, torch.float32).half().contiguous()
        with replacing(work.latents) as temporary:
            save_file({"latents": latents}, temporary)


def train_flow(work: WorkFolder, recipe: FlowRecipe) -> None:
    """Train velocity predictor and text encoders on the cached latents, in float32.

    The model learns v = noise - x_0 from x_t = (1 - t) x_0 + t noise, with t from the
    logit-normal(0, 1) distribution, as Stable Diffusion 3 does (arXiv 2403.03206, section 3.1).
    """
    torch.manual_seed(derive_seed(recipe.seed, "flow weights"))
    denoiser = FlowDenoiser()
    latents = load_file(work.latents)["latents"]
    scenes = scene_numbers(recipe.seed, len(latents))
    prompts = PromptTable()
    batch = recipe.flow.shard

    def loss_of_shard(step: int, shard: int) -> Tensor:
        draws = generator(derive_seed(recipe.seed, "flow", step, shard))
        chosen = torch.randint(len(latents), (batch,), generator=draws)
        prompt = prompts.choose(scenes[chosen], DROPPED, draws)
        # Stratified: one time from each of `batch` equal slices, for less variance.
        spread = (torch.arange(batch) + torch.rand(batch, generator=draws)) / batch
        t = torch.special.ndtri(spread.clamp(1e-6, 1 - 1e-6)).sigmoid()
        x_0 = latents[chosen].float()
        noise = torch.randn(x_0.shape, generator=draws)
        at = t[:, None, None, None]
        x_t = (1 - at) * x_0 + at * noise
        used, place = prompt.unique(return_inverse=True)
        text, pooled = denoiser.text(prompts.tokens[used])
        # Not `text[place]`, whose gradient is summed in no fixed order.
        (velocity,) = denoiser.transformer(
            x_t,
            text.index_select(0, place),
            pooled.index_select(0, place),
            1000 * t,
            return_dict=False,
        )
        return torch.square(velocity - (noise - x_0)).mean()

    fit("flow generator", denoiser, loss_of_shard, recipe.flow, work.flow)
