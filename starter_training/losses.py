"""Losses of the autoencoder, the noise predictor and the judge."""

import torch
from torch import Tensor
from torch.nn import functional as F

KL_WEIGHT = 3e-4
"""Keeps the posterior's standard deviation near a tenth of the latents', no more."""

MIN_SNR_GAMMA = 5.0


def _edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences between neighbours: [B, C, h, w-1] across and [B, C, h-1, w] down."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def picture_loss(made: Tensor, real: Tensor) -> Tensor:
    """Compares pictures by pixels, by edges at three scales, and by amount of texture.

    Edges keep outlines sharp where an error on pixels alone is content with a blur. The amount
    of texture (mean height of edges in 8x8 pixels) is what remains of noise that no latent could
    remember: without it noise becomes plain grey, and all backgrounds compress alike.

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
    """KL divergence of Normal(mean, exp(log_variance)) from Normal(0, 1), in nats a dimension."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()


def min_snr_weight(alphas_cumprod: Tensor) -> Tensor:
    """Weights of the squared error on the noise, a timestep: min(SNR, 5) / SNR.

    Hang et al. 2023, 'Efficient Diffusion Training via Min-SNR Weighting Strategy'.

    Args:
        alphas_cumprod: [1000], the share of the signal's variance at each timestep.

    Returns:
        [1000].
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=MIN_SNR_GAMMA) / snr


def noise_loss(predicted: Tensor, noise: Tensor, weight: Tensor) -> Tensor:
    """Squared error on the noise [B, C, h, w], weighted a sample by `weight` [B]."""
    return (torch.square(predicted - noise).mean((1, 2, 3)) * weight).mean()


def clip_loss(pictures: Tensor, prompts: Tensor, place: Tensor, scale: Tensor) -> Tensor:
    """Contrasts pictures and prompts both ways (Radford et al. 2021).

    A batch holds several pictures of one prompt: a prompt's target is spread over all of its own.
    'a cat' and 'cat' are two prompts, so a picture of one counts as a negative of the other.

    Args:
        pictures: unit vectors [B, D].
        prompts: unit vectors [P, D] of the batch's different prompts, each used at least once.
        place: each picture's prompt, int64 [B].
        scale: factor of the cosines, a scalar.

    Returns:
        A scalar.
    """
    logits = scale * pictures @ prompts.T
    own = F.one_hot(place, len(prompts)).to(logits.dtype)
    of_prompts = -(own / own.sum(0) * logits.log_softmax(0)).sum(0).mean()
    return (F.cross_entropy(logits, place) + of_prompts) / 2
