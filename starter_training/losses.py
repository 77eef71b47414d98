"""Losses of the autoencoder, the noise predictor and the judge."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

KL_WEIGHT = 3e-4
"""Just enough to keep the posterior's standard deviation near a tenth of the latents'."""

MIN_SNR_GAMMA = 5.0


def _edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return differences of neighbors: horizontal [B, C, h, w-1] and vertical [B, C, h-1, w]."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def picture_loss(made: Tensor, real: Tensor) -> Tensor:
    """Compare images by pixels, by edges at three scales, and by amount of texture.

    Edges keep outlines sharp where a loss on pixels alone accepts a blur. The amount of texture
    (mean edge magnitude in 8x8 pixels) represents noise that latents cannot encode; without it,
    noise becomes plain grey and all backgrounds compress equally well.

    Args:
        made: [B, 3, H, W] in -1..1.
        real: [B, 3, H, W] in -1..1.

    Returns:
        A scalar.
    """
    loss = F.l1_loss(made, real) + F.mse_loss(made, real)
    for ours, theirs in zip(_edges(made), _edges(real), strict=True):
        texture = F.l1_loss(F.avg_pool2d(ours.abs(), 8), F.avg_pool2d(theirs.abs(), 8))
        loss = loss + 0.15 * texture + 0.3 * F.l1_loss(ours, theirs)
    for scale in (2, 4):
        small = F.avg_pool2d(made, scale), F.avg_pool2d(real, scale)
        for ours, theirs in zip(_edges(small[0]), _edges(small[1]), strict=True):
            loss = loss + 0.3 * F.l1_loss(ours, theirs)
    return loss


def kl_loss(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return KL(Normal(mean, exp(log_variance)) || Normal(0, 1)), in nats per dimension."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


def min_snr_weight(alphas_cumprod: Tensor) -> Tensor:
    """Return the weight of the squared noise error at each timestep: min(SNR, 5) / SNR.

    Hang et al. 2023, 'Efficient Diffusion Training via Min-SNR Weighting Strategy'.

    Args:
        alphas_cumprod: [1000], the signal's share of the variance at each timestep.

    Returns:
        [1000].
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=MIN_SNR_GAMMA) / snr


def noise_loss(predicted: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
    """Return the squared error on the noise [B, C, h, w], weighted per sample by `weight` [B]."""
    return (torch.square(predicted - noise).mean((1, 2, 3)) * weight).mean()


def clip_loss(images: Tensor, prompts: Tensor, prompt_of: Tensor, scale: Tensor) -> Tensor:
    """Return the contrastive loss of images and prompts in both directions (Radford et al. 2021).

    A batch may have several images per prompt; a prompt's target is spread evenly over them. 'a
    cat' and 'cat' are two prompts, so an image of one is a negative of the other.

    Args:
        images: Unit vectors [B, D].
        prompts: Unit vectors [P, D] of the distinct prompts in the batch.
        prompt_of: Index of each image's prompt, int64 [B].
        scale: Factor of the cosines, a scalar.

    Returns:
        A scalar.
    """
    logits = scale * images @ prompts.T
    pairs = F.one_hot(prompt_of, len(prompts)).to(logits.dtype)
    of_prompts = -(pairs / pairs.sum(0) * logits.log_softmax(0)).sum(0).mean()
    return (F.cross_entropy(logits, prompt_of) + of_prompts) / 2
