"""Settings of the model and of the weights that are trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveFloat, PositiveInt

from ddpo.basics.part import Part, is_off, is_on, is_unset

Size = tuple[PositiveInt, PositiveInt]
"""Width and height in pixels."""


def _square_is_one_number(value: int | Size | None) -> int | Size | None:
    # Two ways to write one size must not make two runs.
    return value[0] if isinstance(value, tuple) and value[0] == value[1] else value


Resolution = Annotated[PositiveInt | Size | None, AfterValidator(_square_is_one_number)]
"""One number for a square, or width and height; None for the size that goes without saying."""


def size_of(resolution: int | Size | None) -> Size | None:
    """Return width and height in pixels; None where none is given."""
    return (resolution, resolution) if isinstance(resolution, int) else resolution


class ModelConfig(Part):
    """The pipeline to fine-tune: Stable Diffusion 1.x, 2.x, XL, 3.x, FLUX, or the starter."""

    path: str
    """`starter`, `starter_flow`, a folder that contains `model_index.json`, a Hub id such as
    `owner/name`, or a single `.safetensors` file, which is converted to such a folder once."""
    revision: str | None = None
    """Commit of a Hub model. Pin it: a branch may move while a run is going on."""
    resolution: Resolution = None
    """Image size in pixels: one number for a square, or `[width, height]`. The model's own size by
    default."""

    vae: str | None = Field(default=None, exclude_if=is_off)
    """Another autoencoder: a folder or Hub id as `AutoencoderKL.save_pretrained` writes it."""
    vae_revision: str | None = Field(default=None, exclude_if=is_off)
    """Commit of an autoencoder on the Hub. Pin it."""
    t5: bool = Field(default=True, exclude_if=is_on)
    """Load T5, the third and largest text encoder of Stable Diffusion 3.x. Without it, its part of
    every prompt is zeros, as in diffusers."""
    text_tokens: NonNegativeInt | None = Field(default=None, exclude_if=is_unset)
    """How many tokens of a prompt the large text encoder (T5, Qwen3) reads, padding included; by
    default as many as the pipeline does: 256 for Stable Diffusion 3.x, 512 for FLUX."""

    @property
    def size(self) -> Size | None:
        """Width and height in pixels; None for the model's own size."""
        return size_of(self.resolution)


class LoraConfig(Part):
    """Train low-rank adapters (peft) on the denoising network's attention."""

    type: Literal["lora"] = "lora"
    rank: PositiveInt = 4
    """Rank of the adapters. The paper's code uses 4, which makes a file of a few MB."""
    alpha: PositiveFloat = 4.0
    """The adapter's output is scaled by alpha / rank."""
    target_modules: tuple[str, ...] = Field(
        default=("to_q", "to_k", "to_v", "to_out.0"), min_length=1
    )
    """Names of the layers that get an adapter, as peft matches them."""
    text_encoders: bool = Field(default=False, exclude_if=is_off)
    """Train adapters on the attention of the CLIP text encoders too: Stable Diffusion 1.x, 2.x and
    XL. Every batch of an update then encodes its prompts again."""

    @property
    def labels(self) -> dict[str, bool]:
        """What is worth showing of a run at a glance, beside the type."""
        return {}


class FullConfig(Part):
    """Train every weight of the denoising network.

    A pretrained one needs a learning rate near 1e-5: LoRA's makes it collapse.
    """

    type: Literal["full"]
    from_scratch: bool = Field(default=False, exclude_if=is_off)
    """Start from random weights of the denoising network, derived from `seed`, in place of the
    model's. Text encoders and autoencoder stay the model's."""

    @property
    def labels(self) -> dict[str, bool]:
        """What is worth showing of a run at a glance, beside the type."""
        return {"from_scratch": True} if self.from_scratch else {}


Trainable = Annotated[LoraConfig | FullConfig, Field(discriminator="type")]
