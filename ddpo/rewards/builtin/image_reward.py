"""ImageReward v1.0 (arXiv 2304.05977): how well people rate a picture for a prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ddpo.prompts.base import Prompt
from ddpo.rewards.base import Scores
from ddpo.rewards.models.linear_head import build_head
from ddpo.rewards.models.pinned import find_model, find_weights, load_part
from ddpo.rewards.models.pretrained import (
    Device,
    LoadedOnce,
    build_model,
    in_batches,
    pick_device,
    place,
)

MEAN = 0.16717362830052426
STD = 1.0333394966054072
"""Of the raw score over the authors' data: what it is standardised by."""

MAX_TOKENS = 35

# The authors' names beside transformers' (a name that ends in a dot stands for all below it).
_VISION = {
    "cls_token": "embeddings.class_embedding",
    "pos_embed": "embeddings.position_embedding",
    "patch_embed.proj.": "embeddings.patch_embedding.",
    "norm.": "post_layernorm.",
}
_IN_BLOCK = {
    "norm1.": "layer_norm1.",
    "norm2.": "layer_norm2.",
    "attn.qkv.": "self_attn.qkv.",
    "attn.proj.": "self_attn.projection.",
    "mlp.": "mlp.",
}
_BLOCK = re.compile(r"blocks\.(\d+)\.(.+)")
_UNUSED = ("blip.vision_proj.", "blip.text_proj.", "blip.text_encoder.embeddings.position_ids")
"""Parts of BLIP that no score depends on: its contrastive projections, and 0, 1, 2, ..."""


@dataclass(frozen=True)
class _Loaded:
    vision: BlipVisionModel
    text: BlipTextModel
    head: nn.Module
    tokenizer: BertTokenizer
    processor: CLIPImageProcessorPil


class ImageReward:
    """Reward = ImageReward's score; mean 0 and deviation 1 over the authors' data.

    BLIP's text encoder reads the prompt while it looks at the picture's patches (ViT-L/16); a
    linear head scores its first position (github.com/THUDM/ImageReward, ImageReward.py).

    Args:
        weights: The checkpoint: ``owner/name/file`` of the hub, a path, or an address; as
            published, or its tensors in safetensors.
        revision: Commit of a hub file; that of the default is pinned.
        sha256: The file's; needed for an address.
        tokenizer: Where BERT's tokenizer is from: a hub id or a folder.
        tokenizer_revision: Its commit; that of the default is pinned.
        device: Where the model runs.
    """

    version: ClassVar[str] = "1"
    needs: ClassVar[str] = "ImageReward v1.0 (1.8 GB) and BERT's tokenizer, fetched from the hub"

    def __init__(
        self,
        weights: str = "THUDM/ImageReward/ImageReward.pt",
        revision: str | None = None,
        sha256: str | None = None,
        tokenizer: str = "google-bert/bert-base-uncased",
        tokenizer_revision: str | None = None,
        device: Device = "auto",
    ) -> None:
        self._weights = find_weights(weights, revision, sha256)
        self._tokenizer = find_model(tokenizer, tokenizer_revision)
        self._device: Device = device
        self._loaded = LoadedOnce(self._load)
        self.revisions = {part.name: part.revision for part in (self._weights, self._tokenizer)}

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """Score B images for their prompts; what a prompt has beyond 35 tokens is cut."""
        return Scores(in_batches(images, prompts, self._score))

    def _score(self, images: list[Image.Image], texts: list[str]) -> Tensor:
        loaded = self._loaded.get()
        where = loaded.vision.device
        tokens = loaded.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        ).to(where)
        pixels = loaded.processor(images, return_tensors="pt")["pixel_values"].to(where)
        patches = loaded.vision(pixel_values=pixels).last_hidden_state
        read = loaded.text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=where),
        ).last_hidden_state
        return (loaded.head(read[:, 0]).squeeze(-1) - MEAN) / STD

    def _load(self) -> _Loaded:
        where = pick_device(self._device)
        tokenizer = load_part("the tokenizer", BertTokenizer.from_pretrained, self._tokenizer)
        parts = from_published(self._weights.tensors())
        vision, text = blip_large()
        sees = build_model("ImageReward's ViT", BlipVisionModel, vision, parts["vision"])
        reads = build_model(
            "ImageReward's text encoder",
            BlipTextModel,
            text,
            parts["text"],
            add_pooling_layer=False,
        )
        head = build_head("ImageReward's head", text.hidden_size, parts["head"])
        processor = CLIPImageProcessorPil()  # the shorter side to 224 px, the centre cut out
        return _Loaded(
            *(place(sees, where), place(reads, where), place(head, where)), tokenizer, processor
        )


def blip_large() -> tuple[BlipVisionConfig, BlipTextConfig]:
    """Return the architecture: BLIP's ViT-L/16 at 224 px, and its text encoder."""
    vision = BlipVisionConfig(
        image_size=224,
        patch_size=16,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        hidden_act="gelu",
        layer_norm_eps=1e-6,  # timm's; transformers' default is another
    )
    text = BlipTextConfig(
        vocab_size=30524,
        hidden_size=768,
        encoder_hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=12,
        num_attention_heads=12,
        max_position_embeddings=512,
        hidden_act="gelu",
        layer_norm_eps=1e-12,
        pad_token_id=0,
        is_decoder=True,  # that is, with cross-attention; a call says whether it looks back only
    )
    return vision, text


def from_published(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Sort ImageReward's tensors by part, under the names that transformers has for them.

    Args:
        tensors: As published: ``blip.visual_encoder.*``, ``blip.text_encoder.*``, ``mlp.*``, and
            parts that the score does not use, which are left out.

    Returns:
        The tensors of ``vision`` (`BlipVisionModel`), ``text`` (`BlipTextModel`) and ``head``. A
        name that is not known stays as it is, among those of the head, and is refused later.
    """
    parts: dict[str, dict[str, Tensor]] = {"vision": {}, "text": {}, "head": {}}
    for name, tensor in tensors.items():
        vision = name.removeprefix("blip.visual_encoder.")
        text = name.removeprefix("blip.text_encoder.")
        if name.startswith(_UNUSED):
            continue
        if vision != name:
            parts["vision"][_rename_vision(vision)] = tensor
        elif text != name:
            parts["text"][text] = tensor
        else:
            parts["head"][name.removeprefix("mlp.")] = tensor
    return parts


def _rename_vision(name: str) -> str:
    block = _BLOCK.fullmatch(name)
    if block is None:
        return _rename(name, _VISION)
    number, inner = block.groups()
    return f"encoder.layers.{number}.{_rename(inner, _IN_BLOCK)}"


def _rename(name: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        if name == old or (old.endswith(".") and name.startswith(old)):
            return new + name.removeprefix(old)
    return name
