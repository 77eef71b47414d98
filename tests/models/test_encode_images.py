"""Images into latents: what the autoencoder says, scaled as each family's, and back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ddpo.models import pipeline_policy
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


@pytest.mark.parametrize(("device", "parts"), [("cpu", [2, 2, 1]), ("cuda", [5])])
def test_a_cpu_decodes_a_large_batch_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str, parts: list[int]
) -> None:
    policy: Any = load_policy(tiny_config(build_tiny_model(tmp_path / "sd")))
    latents = torch.randn(5, *policy.latent_shape, generator=torch.Generator().manual_seed(0))
    alone = [policy.decode(each[None])[0] for each in latents]
    width, height = policy.size
    monkeypatch.setattr(pipeline_policy, "PIXELS_AT_ONCE_ON_CPU", 2 * width * height + 1)
    # What the decoder runs on stays this CPU: only the batches are looked at.
    monkeypatch.setattr(policy, "numerics", policy.numerics.model_copy(update={"device": device}))
    seen: list[int] = []
    policy.pipeline.vae.decoder.register_forward_pre_hook(
        lambda _, given: seen.append(len(given[0]))
    )
    images = policy.decode(latents)
    assert seen == parts
    for image, expected in zip(images, alone, strict=True):  # all of them, in order
        assert abs(np.asarray(image, float) - np.asarray(expected, float)).max() <= 1


def test_an_image_larger_than_a_part_is_decoded_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy: Any = load_policy(tiny_config(build_tiny_model(tmp_path / "sd")))
    monkeypatch.setattr(pipeline_policy, "PIXELS_AT_ONCE_ON_CPU", 1)
    assert len(policy.decode(torch.zeros(2, *policy.latent_shape))) == 2
