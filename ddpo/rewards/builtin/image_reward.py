"""ImageReward v1.0 (arXiv 2304.05977): how people rate an image for its prompt."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from PIL import Image

from ddpo.rewards.models.checkpoint import CheckpointReward
from ddpo.rewards.models.linear_head import build_head
from ddpo.rewards.models.pinned import load_part
from ddpo.rewards.models.pretrained import build_model, place

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import BertTokenizer, BlipTextConfig, BlipTextModel, BlipVisionConfig
    from transformers.models.blip.modeling_blip import BlipVisionModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

MEAN = 0.16717362830052426
STD = 1.0333394966054072
"""Mean and standard deviation of the raw score over the authors' data."""

MAX_TOKENS = 35

# The authors' names and transformers' (a trailing dot stands for everything below it).
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
"""Parts of BLIP that no score depends on: contrastive projections, and the positions 0, 1, ..."""


@dataclass(frozen=True)
class _Loaded:
    vision: BlipVisionModel
    text: BlipTextModel
    head: nn.Module
    tokenizer: BertTokenizer
    processor: CLIPImageProcessorPil


@dataclass(kw_only=True, eq=False)
class ImageReward(CheckpointReward[_Loaded]):
    """Reward = ImageReward's score; mean 0 and standard deviation 1 over the authors' data.

    BLIP's text encoder reads the prompt while cross-attending to the image's patches (ViT-L/16); a
    linear head scores its first position (github.com/THUDM/ImageReward, ImageReward.py).
    """

    version: ClassVar[str] = "1"
    needs: ClassVar[str] = "ImageReward v1.0 (1.8 GB) and BERT's tokenizer, fetched from the hub"

    weights: str = "THUDM/ImageReward/ImageReward.pt"
    tokenizer: str = "google-bert/bert-base-uncased"

    def _load(self, device: torch.device) -> _Loaded:
        from transformers import BertTokenizer, BlipTextModel
        from transformers.models.blip.modeling_blip import BlipVisionModel
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        tokenizer = load_part("the tokenizer", BertTokenizer.from_pretrained, self._tokenizer)
        parts = from_published(self._weights.tensors())
        vision_config, text_config = blip_large()
        vision = build_model("ImageReward's ViT", BlipVisionModel, vision_config, parts["vision"])
        text = build_model(
            "ImageReward's text encoder",
            BlipTextModel,
            text_config,
            parts["text"],
            add_pooling_layer=False,
        )
        head = build_head("ImageReward's head", text_config.hidden_size, parts["head"])
        return _Loaded(
            vision=place(vision, device),
            text=place(text, device),
            head=place(head, device),
            tokenizer=tokenizer,
            processor=CLIPImageProcessorPil(),  # the shorter side to 224 px, then a centre crop
        )

    def _score(self, loaded: _Loaded, images: list[Image.Image], texts: list[str]) -> Tensor:
        import torch

        device = loaded.vision.device
        tokens = loaded.tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        ).to(device)
        pixels = loaded.processor(images, return_tensors="pt")["pixel_values"].to(device)
        patches = loaded.vision(pixel_values=pixels).last_hidden_state
        states = loaded.text(
            input_ids=tokens["input_ids"],
            attention_mask=tokens["attention_mask"],
            encoder_hidden_states=patches,
            encoder_attention_mask=torch.ones(patches.shape[:2], dtype=torch.long, device=device),
        ).last_hidden_state
        return (loaded.head(states[:, 0]).squeeze(-1) - MEAN) / STD


def blip_large() -> tuple[BlipVisionConfig, BlipTextConfig]:
    """Return the configs of BLIP's ViT-L/16 at 224 px and of its text encoder."""
    from transformers import BlipTextConfig, BlipVisionConfig

    vision = BlipVisionConfig(
        image_size=224,
        patch_size=16,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        hidden_act="gelu",
        layer_norm_eps=1e-6,  # timm's; transformers' default differs
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
        is_decoder=True,  # that is, with cross-attention; causality is chosen per call
    )
    return vision, text


def from_published(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Split ImageReward's tensors by part, renamed to transformers' names.

    Args:
        tensors: As published: ``blip.visual_encoder.*``, ``blip.text_encoder.*``, ``mlp.*``, and
            parts that the score does not use, which are dropped.

    Returns:
        The tensors of ``vision`` (`BlipVisionModel`), ``text`` (`BlipTextModel`) and ``head``. An
        unknown name is kept, in ``head``, and rejected when that is built.
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
