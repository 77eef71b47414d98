"""Whether a folder holds a Stable Diffusion with a UNet that can be trained, without loading it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import diffusers

from ddpo.config import FullConfig, LoraConfig, ModelConfig
from ddpo.errors import ModelError
from ddpo.models.facts import ModelFacts
from ddpo.models.files import INDEX, ModelFiles
from ddpo.models.inspection import (
    Config,
    check_headers,
    check_not_quantised,
    check_target_modules,
    other_model,
    pixels_per_latent,
    size_of_model,
)
from ddpo.models.schedule import NoiseSchedule

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

_PARTS = ("unet", "vae", "text_encoder")

_BY_CHANNELS = {
    5: "a depth-to-image model",
    7: "an upscaler",
    8: "an image-editing model such as InstructPix2Pix",
    9: "an inpainting model",
}
_EXTRA_INPUTS = {
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
    configs = {part: files.json(f"{part}/config.json") for part in _PARTS}
    unet = configs["unet"]
    if unet.get("addition_embed_type") is not None:
        raise other_model(
            files,
            "it is a model whose UNet also reads the image's size, like Stable Diffusion XL's "
            f"(addition_embed_type is {unet['addition_embed_type']!r}), in a pipeline without it",
        )
    return _inspected(files, configs, model, trainable, [configs["text_encoder"]])


def inspect_stable_diffusion_xl(
    files: ModelFiles, model: ModelConfig, trainable: LoraConfig | FullConfig
) -> ModelFacts:
    """Check that a Stable Diffusion XL can be trained, and return what its files say of it.

    Args:
        files: The pipeline's; weights of the Hub that are not here are taken on trust.
        model: Gives the size of its images.
        trainable: Weights to train.

    Raises:
        ConfigError: Size or trainable weights do not fit the model.
        ModelError: The model is of another kind, or its files are incomplete or damaged.
    """
    configs = {part: files.json(f"{part}/config.json") for part in (*_PARTS, "text_encoder_2")}
    unet = configs["unet"]
    if unet.get("addition_embed_type") != "text_time":
        raise other_model(files, "its UNet does not read pooled text and the image's size")
    second = configs["text_encoder_2"].get("projection_dim", 512)
    numbers, inputs = (
        unet.get(name)
        for name in ("addition_time_embed_dim", "projection_class_embeddings_input_dim")
    )
    if numbers is None or inputs != second + 6 * numbers:
        raise other_model(
            files,
            f"its UNet reads {inputs} added features, where pooled text of width {second} and six "
            f"numbers of width {numbers} are Stable Diffusion XL base's (the refiner reads five)",
        )
    texts = [configs["text_encoder"], configs["text_encoder_2"]]
    return _inspected(files, configs, model, trainable, texts)


def _inspected(
    files: ModelFiles,
    configs: Mapping[str, Config],
    model: ModelConfig,
    trainable: LoraConfig | FullConfig,
    texts: Sequence[Config],
) -> ModelFacts:
    check_not_quantised(files, configs)
    unet, vae = configs["unet"], configs["vae"]
    _check_unet(files, unet, vae, texts)
    schedule = _schedule(files)
    shapes = {part: files.shapes(part) for part in configs}
    channels = (("conv_in.weight", 1, "in_channels"), ("conv_out.weight", 0, "out_channels"))
    check_headers(
        files,
        "unet",
        shapes["unet"],
        [(name, axis, key, unet.get(key, 4)) for name, axis, key in channels],
    )
    if isinstance(trainable, LoraConfig):
        check_target_modules(trainable, shapes["unet"])
    scale = pixels_per_latent(vae)
    size = size_of_model(files, model, "unet", unet.get("sample_size"), scale)
    width, height = (pixels // scale for pixels in size)
    return ModelFacts(schedule, size, (int(unet.get("in_channels", 4)), height, width))


def _check_unet(files: ModelFiles, unet: Config, vae: Config, texts: Sequence[Config]) -> None:
    name = unet.get("_class_name", "UNet2DConditionModel")
    if name != "UNet2DConditionModel":
        raise other_model(files, f"its unet is a {name}")
    for key, kind in _EXTRA_INPUTS.items():
        if unet.get(key) is not None:
            raise other_model(files, f"it is {kind} ({key} is {unet[key]!r})")
    latents = vae.get("latent_channels", 4)
    inputs, outputs = unet.get("in_channels", 4), unet.get("out_channels", 4)
    if inputs != latents:
        kind = _BY_CHANNELS.get(inputs, "a model of another kind")
        raise other_model(
            files, f"it is {kind}: its UNet takes {inputs} channels, latents have {latents}"
        )
    if outputs == 2 * latents:
        raise other_model(
            files,
            f"its variance is learned: its UNet returns {outputs} channels, latents have {latents}",
        )
    if outputs != latents:
        raise other_model(files, f"its UNet returns {outputs} channels, latents have {latents}")
    width, widths = unet.get("cross_attention_dim"), [text.get("hidden_size") for text in texts]
    hidden = sum(each for each in widths if isinstance(each, int))
    known = all(isinstance(each, int) for each in [width, *widths])
    if known and width != hidden:
        raise other_model(
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


def _other_scheduler(files: ModelFiles, what: str) -> ModelError:
    return ModelError(
        f"model.path {files.path!r} cannot be trained: {what}. Images are sampled with DDIM, which "
        "needs a model of DDPM's diffusion, whose scheduler is DDIM, PNDM, Euler, DPM-Solver or "
        "similar; if this one was distilled from such a model, use that"
    )
