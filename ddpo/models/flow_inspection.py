"""Whether a folder holds a flow-matching transformer that can be trained, without loading it."""

from __future__ import annotations

from collections.abc import Sequence

from ddpo.config import FullConfig, LoraConfig, ModelConfig
from ddpo.errors import ModelError
from ddpo.models.facts import ModelFacts
from ddpo.models.files import INDEX, ModelFiles
from ddpo.models.flow_schedule import FlowSchedule
from ddpo.models.inspection import (
    Config,
    check_headers,
    check_not_quantised,
    check_target_modules,
    other_model,
    pixels_per_latent,
    size_of_model,
)

_FLUX_PATCH = 2
"""Latent pixels along one side of FLUX's tokens, which its pipeline packs itself."""
_FLUX_SAMPLE = 128
"""A side of FLUX's latents by default, which no config of FLUX.1 has."""


def inspect_stable_diffusion_3(
    files: ModelFiles, model: ModelConfig, trainable: LoraConfig | FullConfig
) -> ModelFacts:
    """Check that a Stable Diffusion 3.x can be trained, and return what its files say of it.

    Args:
        files: The pipeline's; weights of the Hub that are not here are taken on trust.
        model: Gives the size of its images.
        trainable: Weights to train.

    Raises:
        ConfigError: Size or trainable weights do not fit the model.
        ModelError: The model is of another kind, or its files are incomplete or damaged.
    """
    transformer = _transformer(files, "SD3Transformer2DModel")
    channels, patch = int(transformer.get("in_channels", 16)), int(transformer.get("patch_size", 2))
    texts = ["text_encoder", "text_encoder_2"]
    vae = _check_parts(files, trainable, channels, [*texts, "text_encoder_3"])
    pooled = sum(
        int(files.json(f"{part}/config.json").get("projection_dim", 512)) for part in texts
    )
    expected = transformer.get("pooled_projection_dim", 2048)
    if pooled != expected:
        raise other_model(
            files,
            f"its transformer reads pooled text of width {expected}, its text encoders make "
            f"{pooled}",
        )
    scale = pixels_per_latent(vae)
    size = size_of_model(
        files, model, "transformer", transformer.get("sample_size", 128), scale, patch
    )
    return _facts(files, size, channels, scale, patch)


def inspect_flux(
    files: ModelFiles, model: ModelConfig, trainable: LoraConfig | FullConfig
) -> ModelFacts:
    """Check that a FLUX.1 can be trained, and return what its files say of it.

    Args:
        files: The pipeline's; weights of the Hub that are not here are taken on trust.
        model: Gives the size of its images.
        trainable: Weights to train.

    Raises:
        ConfigError: Size or trainable weights do not fit the model.
        ModelError: The model is of another kind, or its files are incomplete or damaged.
    """
    transformer = _transformer(files, "FluxTransformer2DModel")
    if not transformer.get("guidance_embeds", False):
        raise other_model(
            files,
            "it is distilled to a few steps, like FLUX.1-schnell: its transformer has no guidance "
            "as an input (guidance_embeds)",
        )
    channels = int(transformer.get("in_channels", 64)) // _FLUX_PATCH**2
    vae = _check_parts(files, trainable, channels, ["text_encoder", "text_encoder_2"])
    scale = pixels_per_latent(vae)
    size = size_of_model(files, model, "transformer", _FLUX_SAMPLE, scale, _FLUX_PATCH)
    return _facts(files, size, channels, scale, _FLUX_PATCH, from_one=True)


def inspect_flux_2(
    files: ModelFiles, model: ModelConfig, trainable: LoraConfig | FullConfig
) -> ModelFacts:
    """Check that a FLUX.2 klein can be trained, and return what its files say of it.

    Args:
        files: The pipeline's; weights of the Hub that are not here are taken on trust.
        model: Gives the size of its images.
        trainable: Weights to train.

    Raises:
        ConfigError: Size or trainable weights do not fit the model.
        ModelError: The model is of another kind, or its files are incomplete or damaged.
    """
    transformer = _transformer(files, "Flux2Transformer2DModel")
    if files.json(INDEX).get("is_distilled", False):
        raise other_model(
            files,
            "it is distilled to a few steps, like FLUX.2-klein-4B: guidance means nothing to it; "
            "expected a base model, such as FLUX.2-klein-base-4B",
        )
    if transformer.get("guidance_embeds", True):
        raise other_model(files, "its transformer has guidance as an input, as in FLUX.2-dev")
    channels = int(transformer.get("in_channels", 128))
    vae = _check_parts(files, trainable, channels // _FLUX_PATCH**2, ["text_encoder"])
    scale = pixels_per_latent(vae) * _FLUX_PATCH
    size = size_of_model(files, model, "transformer", _FLUX_SAMPLE // _FLUX_PATCH, scale)
    return _facts(files, size, channels, scale, 1, from_one=True, empirical_shift=True)


def _transformer(files: ModelFiles, expected: str) -> Config:
    config = files.json("transformer/config.json")
    name = config.get("_class_name", expected)
    if name != expected:
        raise other_model(files, f"its transformer is a {name}, expected a {expected}")
    return config


def _check_parts(
    files: ModelFiles,
    trainable: LoraConfig | FullConfig,
    channels: int,
    texts: Sequence[str],
) -> Config:
    """Check what all flow-matching models share; return the autoencoder's config."""
    parts = ["transformer", "vae", *(part for part in texts if part in files.parts)]
    configs = {part: files.json(f"{part}/config.json") for part in parts}
    check_not_quantised(files, configs)
    latents = configs["vae"].get("latent_channels", 4)
    if channels != latents:
        raise other_model(
            files,
            f"its transformer takes {channels} channels, latents have {latents}, as in models for "
            "editing and inpainting",
        )
    shapes = {part: files.shapes(part) for part in parts}
    config = configs["transformer"]
    if "joint_attention_dim" in config:
        expected = [
            ("context_embedder.weight", 1, "joint_attention_dim", config["joint_attention_dim"])
        ]
        check_headers(files, "transformer", shapes["transformer"], expected)
    if isinstance(trainable, LoraConfig):
        check_target_modules(trainable, shapes["transformer"])
    return configs["vae"]


def _facts(
    files: ModelFiles,
    size: tuple[int, int],
    channels: int,
    scale: int,
    patch: int,
    *,
    from_one: bool = False,
    empirical_shift: bool = False,
) -> ModelFacts:
    width, height = (pixels // scale for pixels in size)
    shape = (channels, height, width)
    config = files.json("scheduler/scheduler_config.json")
    entry = files.json(INDEX).get("scheduler")
    named = entry[1] if isinstance(entry, list) and len(entry) == 2 else config.get("_class_name")
    if named != "FlowMatchEulerDiscreteScheduler":
        raise ModelError(
            f"model.path {files.path!r} cannot be trained: its scheduler is {named}; expected "
            "FlowMatchEulerDiscreteScheduler, which published models of this kind have"
        )
    try:
        schedule = FlowSchedule.from_scheduler(
            config, patch, shape, from_one=from_one, empirical_shift=empirical_shift
        )
    except (ModelError, ValueError, TypeError) as error:
        raise ModelError(f"model.path {files.path!r} cannot be trained: {error}") from error
    return ModelFacts(schedule, size, shape)
