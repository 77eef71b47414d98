"""Checks that all families share, by a model's small JSON files and the headers of its weights.

They run before a run takes its name, so that a model which cannot be trained is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ddpo.config import LoraConfig, ModelConfig
from ddpo.errors import ConfigError, ModelError
from ddpo.models.files import ModelFiles

Config = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]


def other_model(files: ModelFiles, what: str) -> ModelError:
    """Return the error of a model that is of another kind."""
    return ModelError(
        f"model.path {files.path!r} cannot be trained: {what}. Expected a text-to-image model like "
        "Stable Diffusion 1.x, 2.x, XL base or 3.x, FLUX.1-dev, or FLUX.2-klein-base"
    )


def check_not_quantised(files: ModelFiles, configs: Mapping[str, Config]) -> None:
    """Check that no part is quantised.

    Args:
        files: The pipeline's.
        configs: Those of its parts, by name.

    Raises:
        ModelError: One is.
    """
    for part, config in configs.items():
        if "quantization_config" in config:
            raise other_model(
                files, f"its {part} is quantised, and quantised weights cannot be trained"
            )


def check_headers(
    files: ModelFiles,
    part: str,
    shapes: Shapes,
    expected: Iterable[tuple[str, int, str, int]],
) -> None:
    """Check that some tensors are as a part's config says.

    Args:
        files: The pipeline's.
        part: The part.
        shapes: Those of its tensors; empty where they are on the Hub still.
        expected: Name of a tensor, an axis, the setting in the config, and its value.

    Raises:
        ModelError: One is missing or of another shape.
    """
    if not shapes:
        return
    for name, axis, key, value in expected:
        found = shapes.get(name)
        if found is None or found[axis] != value:
            raise files.problem(
                f"{part}'s {name} is {'missing' if found is None else list(found)}, where its "
                f"config says {key}: {value}"
            )


def check_target_modules(trainable: LoraConfig, shapes: Shapes) -> None:
    """Check that an adapter finds layers.

    Args:
        trainable: The adapter's settings.
        shapes: Of the denoising network's tensors; empty where they are on the Hub still.

    Raises:
        ConfigError: It finds none.
    """
    layers = {name.rpartition(".")[0] for name in shapes}
    targets = trainable.target_modules
    matched = any(layer == t or layer.endswith(f".{t}") for layer in layers for t in targets)
    if layers and not matched:
        raise ConfigError(
            f"trainable.target_modules {list(targets)} match no layer of the denoising network; "
            "the paper's are to_q, to_k, to_v, to_out.0"
        )


def pixels_per_latent(vae: Config) -> int:
    """Return the pixels along one side of a latent pixel.

    Args:
        vae: The autoencoder's config.
    """
    return 2 ** (len(vae.get("block_out_channels") or (64,)) - 1)


def size_of_model(
    files: ModelFiles, model: ModelConfig, part: str, sample: Any, scale: int, multiple: int = 1
) -> tuple[int, int]:
    """Return width and height of a model's images in pixels.

    Args:
        files: The pipeline's.
        model: Gives another size than the model's own.
        part: The part whose config has the model's own.
        sample: A side of the latents, or height and width; None if the config has none.
        scale: Pixels along one side of a latent pixel.
        multiple: Latent pixels along one side of what the network takes together.

    Raises:
        ConfigError: There is no size, or it is not a multiple of what the model takes.
    """
    if model.size is None and sample is None:
        raise ConfigError(
            f"the model {files.path!r} has no size of its own (sample_size in {part}/config.json); "
            "set model.resolution"
        )
    height, width = sample if isinstance(sample, list | tuple) else (sample, sample)
    size = model.size or (int(width) * scale, int(height) * scale)
    step = scale * multiple
    if any(pixels % step for pixels in size):
        sides = "a latent pixel" if multiple == 1 else f"a token of {multiple} latent pixels"
        raise ConfigError(
            f"model.resolution {model.resolution} is not a multiple of {step}, the pixels "
            f"along one side of {sides}"
        )
    return size
