"""Images into latents: what the autoencoder says, scaled as each family's, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import build_tiny_model, load_policy, tiny_config
from tests.tiny_families import FAMILIES, SETTINGS

BUILD = {"sd": build_tiny_model, **FAMILIES}


@pytest.mark.parametrize("name", BUILD)
def test_latents_are_the_mean_that_diffusers_encodes_and_decode_to_what_went_in(
    tmp_path: Path, name: str
) -> None:
    own: dict[str, Any] = SETTINGS.get(name, {})
    policy: Any = load_policy(tiny_config(BUILD[name](tmp_path / name), **own))
    width, height = policy.size
    pixels = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), np.uint8)
    images = [Image.fromarray(each) for each in pixels]
    latents = policy.encode_images(images)
    assert latents.shape == (2, *policy.latent_shape) and latents.dtype == torch.float32

    vae = policy.pipeline.vae
    values = torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 127.5 - 1
    with torch.no_grad():
        mean = vae.encode(values.float()).latent_dist.mean
    if name == "flux2":
        # Pipeline_flux2_klein: patchify, then normalise by the running moments.
        tiles = policy.pipeline._patchify_latents(mean)
        center = vae.bn.running_mean[None, :, None, None]
        spread = torch.sqrt(vae.bn.running_var + vae.config.batch_norm_eps)[None, :, None, None]
        expected = (tiles - center) / spread
    else:
        expected = (mean - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=1e-5)

    # What decode gives back is what the autoencoder makes of the same means.
    with torch.no_grad():
        decoded = vae.decode(mean).sample
    expected_pixels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().permute(0, 2, 3, 1).numpy()
    found = np.stack([np.asarray(image) for image in policy.decode(latents)]).astype(float)
    assert abs(found - expected_pixels).max() <= 1


@pytest.mark.parametrize("name", ["flux2", "sd3"])
def test_the_moments_and_the_shift_are_told_apart(tmp_path: Path, name: str) -> None:
    """Tiny models have them away from 0 and 1, so that one left out shows."""
    policy: Any = load_policy(tiny_config(FAMILIES[name](tmp_path / name), **SETTINGS[name]))
    vae = policy.pipeline.vae
    if name == "flux2":
        assert vae.bn.running_mean.abs().max() > 0 and vae.bn.running_var.std() > 0
    else:
        assert vae.config.shift_factor
