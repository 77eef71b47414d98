"""A CLIP model, ready to compare images with texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from PIL import Image

from ddpo.rewards.models.pinned import ModelFolder, load_part
from ddpo.rewards.models.pretrained import Device, pick_device, place

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import CLIPModel, CLIPTokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


@dataclass(frozen=True)
class Clip:
    """A CLIP model with its preprocessing. Float32, inference only.

    D is the width of the embedding space that images and texts share.
    """

    model: CLIPModel
    tokenizer: CLIPTokenizer
    processor: CLIPImageProcessorPil
    """Resizes with Pillow, as torchvision does for a PIL image."""

    def see(self, images: Sequence[Image.Image]) -> Tensor:
        """Embed b RGB images of any size; [b, D], not normalised."""
        pixels = self.processor(list(images), return_tensors="pt")["pixel_values"]
        return self.see_pixels(pixels)

    def see_pixels(self, pixels: Tensor) -> Tensor:
        """Embed b preprocessed images [b, 3, height, width]; [b, D], not normalised."""
        pooled = self.model.vision_model(pixels.to(self.model.device)).pooler_output
        return self.model.visual_projection(pooled)

    def read(self, texts: Sequence[str]) -> Tensor:
        """Embed b texts, cut where the model's context ends; [b, D], not normalised.

        Texts are always padded to the full context. Attention is causal and pooling is at the end
        of the text, before the padding, so an attention mask would change nothing.
        """
        length = self.model.text_model.config.max_position_embeddings
        tokens = self.tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=length,
            return_tensors="pt",
        )
        pooled = self.model.text_model(tokens["input_ids"].to(self.model.device)).pooler_output
        return self.model.text_projection(pooled)


def cosines(some: Tensor, others: Tensor) -> Tensor:
    """Return the cosines of features [b, D], row by row; [b] in -1..1."""
    from torch.nn.functional import normalize as unit

    return (unit(some, dim=-1) * unit(others, dim=-1)).sum(-1)


def load_clip(model: ModelFolder, device: Device, processor: ModelFolder | None = None) -> Clip:
    """Load a CLIP model with tokenizer and image processor.

    Args:
        model: The model.
        device: Where it will run.
        processor: Source of tokenizer and image processor, if they are not beside the model.

    Raises:
        RewardError: A part is missing, or the device is not available.
    """
    import torch
    from transformers import CLIPModel

    where = pick_device(device)
    tokenizer = load_tokenizer(processor or model)
    image_processor = load_processor(processor or model)
    clip = load_part(
        "the CLIP model", CLIPModel.from_pretrained, model, weights=True, dtype=torch.float32
    )
    return Clip(place(clip, where), tokenizer, image_processor)


def load_tokenizer(model: ModelFolder) -> CLIPTokenizer:
    """Load the tokenizer of a CLIP model."""
    from transformers import CLIPTokenizer

    return load_part("the tokenizer", CLIPTokenizer.from_pretrained, model)


def load_processor(model: ModelFolder) -> CLIPImageProcessorPil:
    """Load the image processor of a CLIP model, in the version that needs no torchvision."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return load_part("the image processor", CLIPImageProcessorPil.from_pretrained, model)
