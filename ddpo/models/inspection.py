"""Whether a folder holds a Stable Diffusion that can be trained, without loading it.

Its small JSON files and the headers of its weights decide, so that a model which cannot be trained
is refused by name before a run takes its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import diffusers

from ddpo.config import FullConfig, LoraConfig, ModelConfig
from ddpo.errors import ConfigError, ModelError
from ddpo.models.base import ModelFacts
from ddpo.models.files import INDEX, ModelFiles
from ddpo.models.schedule import NoiseSchedule

Config = Mapping[str, Any]

SCHEDULERS = frozenset(
    f"{name}Scheduler"
    for name in (
        "DDIM",
        "DDIMParallel",
        "DDPM",
        "DDPMParallel",
        "DEISMultistep",
        "DPMSolverMultistep",
        "DPMSolverSDE",
        "DPMSolverSinglestep",
        "EulerAncestralDiscrete",
        "EulerDiscrete",
        "HeunDiscrete",
        "KDPM2AncestralDiscrete",
        "KDPM2Discrete",
        "LMSDiscrete",
        "PNDM",
        "SASolver",
        "UniPCMultistep",
    )
)
"""Schedulers of models that undo the variance-preserving diffusion of DDPM, as DDIM does."""

_BY_CHANNELS = {
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "an image-editing model such as InstructPix2Pix",
    9: "an inpainting model",
}
_EXTRA_INPUTS = {
    "addition_embed_type": "a Stable Diffusion XL model, whose UNet also reads the image's size",
    "class_embed_type": "a model whose UNet also reads a class",
    "encoder_hid_dim_type": "a model whose UNet reads another encoder's output",
    "num_class_embeds": "a model whose UNet also reads a class",
    "time_cond_proj_dim": "an LCM or another model distilled for guidance",
}


def inspect_stable_diffusion(
    files: ModelFiles, model: ModelConfig, trainable: LoraConfig | FullConfig
) -> ModelFacts:
    """Check that a Stable Diffusion 1.x or 2.x can be trained, and return what its files say of it.

    Args:
        files: The pipeline's; weights of the Hub that are not here are taken on trust.
        model: Gives the size of its images.
        trainable: Weights to train.

    Raises:
        ConfigError: Size or trainable weights do not fit the model.
        ModelError: The model is of another kind, or its files are incomplete or damaged.
    """
    parts = ("unet", "vae", "text_encoder")
    unet, vae, text = (files.json(f"{part}/config.json") for part in parts)
    _check_unet(files, unet, vae, text)
    schedule = _schedule(files)
    shapes = {part: files.shapes(part) for part in parts}
    _check_headers(files, unet, shapes["unet"])
    if isinstance(trainable, LoraConfig):
        _check_target_modules(trainable, shapes["unet"])
    scale = 2 ** (len(vae.get("block_out_channels") or (64,)) - 1)
    size = _size(files, model, unet.get("sample_size"), scale)
    width, height = (pixels // scale for pixels in size)
    return ModelFacts(schedule, size, (int(unet.get("in_channels", 4)), height, width))


def _check_unet(files: ModelFiles, unet: Config, vae: Config, text: Config) -> None:
    for part, config in (("unet", unet), ("vae", vae), ("text_encoder", text)):
        if "quantization_config" in config:
            raise _other(files, f"its {part} is quantised, and quantised weights cannot be trained")
    name = unet.get("_class_name", "UNet2DConditionModel")
    if name != "UNet2DConditionModel":
        raise _other(files, f"its unet is a {name}")
    for key, kind in _EXTRA_INPUTS.items():
        if unet.get(key) is not None:
            raise _other(files, f"it is {kind} ({key} is {unet[key]!r})")
    latents = vae.get("latent_channels", 4)
    inputs, outputs = unet.get("in_channels", 4), unet.get("out_channels", 4)
    if inputs != latents:
        kind = _BY_CHANNELS.get(inputs, "a model of another kind")
        raise _other(
            files, f"it is {kind}: its UNet takes {inputs} channels, latents have {latents}"
        )
    if outputs == 2 * latents:
        raise _other(
            files,
            f"its variance is learned: its UNet returns {outputs} channels, latents have {latents}",
        )
    if outputs != latents:
        raise _other(files, f"its UNet returns {outputs} channels, latents have {latents}")
    width, hidden = unet.get("cross_attention_dim"), text.get("hidden_size")
    if isinstance(width, int) and isinstance(hidden, int) and width != hidden:
        raise _other(
            files, f"its UNet reads embeddings of width {width}, its text encoder makes {hidden}"
        )


def _schedule(files: ModelFiles) -> NoiseSchedule:
    config = files.json("scheduler/scheduler_config.json")
    entry = files.json(INDEX).get("scheduler")
    named = str(entry[1]) if isinstance(entry, list) and len(entry) == 2 else None
    name = named or str(config.get("_class_name"))
    for each in (name, str(config.get("_class_name", name))):
        if each not in SCHEDULERS:
            raise _other_scheduler(files, f"its scheduler is {each}{_kind_of(each)}")
    flow = config.get("use_flow_sigmas") or "flow" in str(config.get("prediction_type"))
    if flow:
        raise _other_scheduler(files, "it is a flow-matching model (use_flow_sigmas)")
    if config.get("timestep_type") == "continuous":
        raise _other_scheduler(files, "its times are continuous, as in EDM (timestep_type)")
    if _is_turbo(name, config):
        raise _other_scheduler(
            files,
            f"its scheduler is that of a turbo model, distilled to a few steps ({name} with "
            "trailing timesteps on epsilon). If it is not a turbo model, set timestep_spacing to "
            "'leading' in scheduler_config.json",
        )
    try:
        # As loading does: what the file leaves out has the default of the model's own scheduler.
        return NoiseSchedule.from_scheduler(getattr(diffusers, name).from_config(config).config)
    except (ModelError, ValueError, TypeError, NotImplementedError) as error:
        raise ModelError(f"model.path {files.path!r} cannot be trained: {error}") from error


def _is_turbo(name: str, config: Config) -> bool:
    """Return whether a scheduler is SD-Turbo's: Euler, trailing, on a model that predicts noise."""
    return (
        name in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
        and config.get("timestep_spacing") == "trailing"
        and config.get("prediction_type", "epsilon") == "epsilon"
    )


def _kind_of(scheduler: str) -> str:
    if "FlowMatch" in scheduler:
        return ", of a flow-matching model"
    if scheduler in ("LCMScheduler", "TCDScheduler"):
        return ", of a model distilled to a few steps"
    return ""


def _check_headers(files: ModelFiles, unet: Config, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Check that the UNet's first and last layer are as its config says."""
    for name, axis, key in (
        ("conv_in.weight", 1, "in_channels"),
        ("conv_out.weight", 0, "out_channels"),
    ):
        if not shapes:  # on the Hub still
            return
        found = shapes.get(name)
        if found is None or found[axis] != unet.get(key, 4):
            raise files.problem(
                f"unet's {name} is {'missing' if found is None else list(found)}, where its config "
                f"says {key}: {unet.get(key, 4)}"
            )


def _check_target_modules(trainable: LoraConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    layers = {name.rpartition(".")[0] for name in shapes}
    targets = trainable.target_modules
    matched = any(layer == t or layer.endswith(f".{t}") for layer in layers for t in targets)
    if layers and not matched:
        raise ConfigError(
            f"trainable.target_modules {list(targets)} match no layer of the denoising network; "
            "the paper's are to_q, to_k, to_v, to_out.0"
        )


def _size(files: ModelFiles, model: ModelConfig, sample: Any, scale: int) -> tuple[int, int]:
    """Return width and height in pixels; ``sample`` is a side of the latents, or height, width."""
    if model.size is None and sample is None:
        raise ConfigError(
            f"the model {files.path!r} has no size of its own (sample_size in unet/config.json); "
            "set model.resolution"
        )
    height, width = sample if isinstance(sample, list | tuple) else (sample, sample)
    size = model.size or (int(width) * scale, int(height) * scale)
    if any(pixels % scale for pixels in size):
        raise ConfigError(
            f"model.resolution {model.resolution} is not a multiple of {scale}, the pixels "
            "along one side of a latent pixel"
        )
    return size


def _other(files: ModelFiles, what: str) -> ModelError:
    return ModelError(
        f"model.path {files.path!r} cannot be trained: {what}. Expected a text-to-image model like "
        "Stable Diffusion 1.x or 2.x"
    )


def _other_scheduler(files: ModelFiles, what: str) -> ModelError:
    return ModelError(
        f"model.path {files.path!r} cannot be trained: {what}. Images are sampled with DDIM, which "
        "needs a model of DDPM's diffusion, whose scheduler is DDIM, PNDM, Euler, DPM-Solver or "
        "similar; if this one was distilled from such a model, use that"
    )
