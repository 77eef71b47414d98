"""What a model's small files say of it, before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from ddpo.errors import ConfigError
from ddpo.models.schedule import Schedule


@dataclass(frozen=True)
class ModelFacts:
    """What a model's small files say of it, before it is loaded."""

    schedule: Schedule
    """How its training mixed images with noise; all that a denoising process knows of it."""
    size: tuple[int, int]
    """Width and height of an image in pixels."""
    latent_shape: tuple[int, ...]
    """Shape of one image's latents, [C, h, w]."""


def resized(
    own: tuple[int, int], latent_shape: tuple[int, ...], size: tuple[int, int], patch: int
) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Return another size of a model's images, and the shape of their latents.

    Args:
        own: The model's own width and height in pixels.
        latent_shape: Shape of the latents of such an image, [C, h, w].
        size: Width and height in pixels.
        patch: Latent pixels along one side of what the network takes together.

    Raises:
        ConfigError: The network does not take such images.
    """
    channels, height, _ = latent_shape
    scale = own[1] // height
    if any(pixels % (scale * patch) for pixels in size):
        raise ConfigError(
            f"resolution {size[0]}x{size[1]} is not a multiple of {scale * patch}, the pixels "
            "along one side of what the network takes together"
        )
    return size, (channels, size[1] // scale, size[0] // scale)
