"""The last stage: noise predictor and text encoder."""

from __future__ import annotations

import torch
from safetensors.torch import load_file
from torch import Tensor

from ddpo.basics.randomness import derive_seed, generator
from starter_training.loop import fit
from starter_training.losses import min_snr_weight, noise_loss
from starter_training.networks import Denoiser, build_scheduler
from starter_training.prompt_table import PromptTable
from starter_training.stages.pictures import scene_numbers
from starter_training.work import Recipe, WorkFolder

DROPPED = 0.1
"""Share of images trained without a prompt, for classifier-free guidance."""


def train_unet(work: WorkFolder, recipe: Recipe) -> None:
    """Train noise predictor and text encoder on the cached latents, in float32."""
    torch.manual_seed(derive_seed(recipe.seed, "unet weights"))
    denoiser = Denoiser()
    latents = load_file(work.latents)["latents"]
    scenes = scene_numbers(recipe.seed, len(latents))
    prompts = PromptTable()
    alphas_cumprod = build_scheduler().alphas_cumprod
    weights = min_snr_weight(alphas_cumprod)
    batch = recipe.unet.shard

    def loss_of_shard(step: int, shard: int) -> Tensor:
        draws = generator(derive_seed(recipe.seed, "unet", step, shard))
        chosen = torch.randint(len(latents), (batch,), generator=draws)
        prompt = prompts.choose(scenes[chosen], DROPPED, draws)
        # Stratified: one timestep from each of `batch` equal slices, for less variance.
        spread = (torch.arange(batch) + torch.rand(batch, generator=draws)) / batch
        # A sample just below 1 may round up to it.
        t = (spread * len(weights)).long().clamp(max=len(weights) - 1)
        x_0 = latents[chosen].float()
        noise = torch.randn(x_0.shape, generator=draws)
        alpha = alphas_cumprod[t][:, None, None, None]
        x_t = alpha.sqrt() * x_0 + (1 - alpha).sqrt() * noise
        used, place = prompt.unique(return_inverse=True)
        text = denoiser.text_encoder(prompts.tokens[used]).last_hidden_state
        # Not `text[place]`, whose gradient is summed in no fixed order.
        predicted = denoiser.unet(x_t, t, text.index_select(0, place)).sample
        return noise_loss(predicted, noise, weights[t])

    fit("generator", denoiser, loss_of_shard, recipe.unet, work.unet)
