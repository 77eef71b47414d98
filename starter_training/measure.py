"""Evaluate autoencoder and judge on images that neither has seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from ddpo.basics.randomness import derive_seed
from ddpo.starter.judge import Judge
from ddpo.starter.render import BACKGROUNDS, Picture, Pixels, draw
from ddpo.starter.scenes import Kind, Scene
from starter_training.networks import decode, encode, to_model, to_pixels

FRESH_PICTURES = 2048
RECONSTRUCTED_AT_ONCE = 64


def fresh_pictures(seed: int, count: int) -> list[Picture]:
    """Render images of all kinds, including held-out pairs, that are in no training set.

    Args:
        seed: Seed of the training.
        count: Number of images.
    """
    return [draw(derive_seed(seed, "fresh"), index, all_pairs=True) for index in range(count)]


@torch.no_grad()
def reconstruct(vae: AutoencoderKL, pixels: Pixels) -> Pixels:
    """Encode and decode images, uint8 [B, 64, 64, 3]."""
    parts = []
    for start in range(0, len(pixels), RECONSTRUCTED_AT_ONCE):
        real = to_model(pixels[start : start + RECONSTRUCTED_AT_ONCE])
        made = decode(vae, encode(vae, real).mode())
        parts.append(to_pixels(made))
    return np.concatenate(parts)


def psnr_db(images: Sequence[Picture], made: Pixels) -> dict[str, float]:
    """Return the PSNR of reconstructions in dB, from the mean squared error.

    Args:
        images: B images.
        made: Their reconstructions, uint8 [B, 64, 64, 3].

    Returns:
        The PSNR of all images ('all') and of each background's.
    """
    real = np.stack([image.pixels for image in images])
    errors = np.square((made.astype(float) - real) / 255).mean((1, 2, 3))
    groups = {"all": np.full(len(images), True)}
    for name in BACKGROUNDS:
        groups[name] = np.array([image.background == name for image in images])
    return {name: float(-10 * np.log10(errors[chosen].mean())) for name, chosen in groups.items()}


def accuracy(
    judge: Judge, images: Sequence[Image.Image], scenes: Sequence[Scene]
) -> dict[str, float]:
    """Return the judge's share of right answers (`Verdicts.right`) about B images, in 0..1.

    Args:
        judge: The judge.
        images: B images.
        scenes: What each should show.

    Returns:
        The share over all images ('all') and over each `Kind` that occurs.
    """
    right = judge.look(images).right(scenes)
    kinds = np.array([scene.kind for scene in scenes])
    shares = {"all": float(right.mean())}
    for kind in Kind:
        if (kinds == kind).any():
            shares[kind] = float(right[kinds == kind].mean())
    return shares


def measure(vae: AutoencoderKL, judge: Judge, seed: int) -> dict[str, Any]:
    """Evaluate autoencoder and judge on fresh images.

    Args:
        vae: The autoencoder.
        judge: The judge.
        seed: Seed of the training.

    Returns:
        `psnr_db` of reconstructions, and the `judge`'s shares of right answers on `renders` and on
        their `reconstructions`.
    """
    pictures = fresh_pictures(seed, FRESH_PICTURES)
    scenes = [picture.scene for picture in pictures]
    pixels = np.stack([picture.pixels for picture in pictures])
    made = reconstruct(vae, pixels)
    return {
        "psnr_db": psnr_db(pictures, made),
        "judge": {
            name: accuracy(judge, [Image.fromarray(picture) for picture in shown], scenes)
            for name, shown in (("renders", pixels), ("reconstructions", made))
        },
    }
