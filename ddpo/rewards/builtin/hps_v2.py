"""HPS v2.1: how well people like a picture for a prompt (arXiv 2306.09341)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ddpo.prompts.base import Prompt
from ddpo.rewards.base import Scores
from ddpo.rewards.models.clip import Clip, cosines, load_tokenizer
from ddpo.rewards.models.pinned import find_model, find_weights
from ddpo.rewards.models.pretrained import (
    Device,
    LoadedOnce,
    build_model,
    in_batches,
    pick_device,
    place,
)

SIDE_PX = 224
"""Of the square that the model sees."""

# open_clip's names beside transformers' (a name that ends in a dot stands for weight and bias).
_WHOLE = {
    "logit_scale": "logit_scale",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.": "text_model.final_layer_norm.",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
}
# open_clip multiplies features by these from the right, a linear layer by its weight's transpose.
_PROJECTIONS = {
    "text_projection": "text_projection.weight",
    "visual.proj": "visual_projection.weight",
}
_IN_BLOCK = {
    "ln_1.": "layer_norm1.",
    "ln_2.": "layer_norm2.",
    "attn.out_proj.": "self_attn.out_proj.",
    "mlp.c_fc.": "mlp.fc1.",
    "mlp.c_proj.": "mlp.fc2.",
}
_BLOCK = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")


class HpsV2:
    """Reward = cosine of picture and prompt by HPS v2.1; some 0.2 to 0.35.

    CLIP ViT-H/14 of open_clip, trained further on rankings of pictures
    (github.com/tgxs002/HPSv2, hpsv2/img_score.py). Pictures are fitted into 224 x 224 px and padded
    with black, not cropped. Runs in float32, where the published code has mixed precision.

    Args:
        weights: The checkpoint: ``owner/name/file`` of the hub, a path, or an address; as
            published, or its ``state_dict`` in safetensors.
        revision: Commit of a hub file; that of the default is pinned.
        sha256: The file's; needed for an address.
        tokenizer: Where CLIP's tokenizer is from: a hub id or a folder.
        tokenizer_revision: Its commit; that of the default is pinned.
        device: Where the model runs.
    """

    version: ClassVar[str] = "1"
    needs: ClassVar[str] = "HPS v2.1 (2.0 GB) and CLIP's tokenizer, fetched from the hub"

    def __init__(
        self,
        weights: str = "xswu/HPSv2/HPS_v2.1_compressed.pt",
        revision: str | None = None,
        sha256: str | None = None,
        tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        tokenizer_revision: str | None = None,
        device: Device = "auto",
    ) -> None:
        self._weights = find_weights(weights, revision, sha256)
        self._tokenizer = find_model(tokenizer, tokenizer_revision)
        self._device: Device = device
        self._loaded = LoadedOnce(self._load)
        self.revisions = {part.name: part.revision for part in (self._weights, self._tokenizer)}

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """Score B images for their prompts; what a prompt has beyond 77 tokens is cut."""
        return Scores(in_batches(images, prompts, self._score))

    def _score(self, images: list[Image.Image], texts: list[str]) -> Tensor:
        clip = self._loaded.get()
        pixels = torch.stack([fit(image) for image in images])
        return cosines(clip.see_pixels(pixels), clip.read(texts))

    def _load(self) -> Clip:
        where = pick_device(self._device)
        tokenizer = load_tokenizer(self._tokenizer)
        tensors = from_open_clip(self._weights.tensors(inside="state_dict"))
        model = build_model("HPS v2", CLIPModel, vit_h_14(), tensors)
        return Clip(place(model, where), tokenizer, CLIPImageProcessorPil())


def vit_h_14() -> CLIPConfig:
    """Return the architecture that open_clip calls ViT-H-14."""
    tokens = {"bos_token_id": 49406, "eos_token_id": 49407, "pad_token_id": 49407}
    text = {
        "vocab_size": 49408,
        "max_position_embeddings": 77,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 1024,
        **tokens,
    }
    vision = {
        "image_size": SIDE_PX,
        "patch_size": 14,
        "hidden_size": 1280,
        "intermediate_size": 5120,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 1024,
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=1024)


def from_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Give open_clip's tensors the names, and the shapes, that transformers has for them.

    Its blocks hold the weights of queries, keys and values in one tensor, stacked in this order;
    they become three. A name that is not known stays as it is, and is refused later.

    Args:
        tensors: The ``state_dict`` of an open_clip CLIP whose two towers are plain transformers.

    Returns:
        The ``state_dict`` of a `CLIPModel`.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        block = _BLOCK.fullmatch(name)
        if name in _PROJECTIONS:
            renamed[_PROJECTIONS[name]] = tensor.T
        elif block is None:
            renamed[_rename(name, _WHOLE)] = tensor
        else:
            visual, number, inner = block.groups()
            tower = "vision_model" if visual else "text_model"
            start = f"{tower}.encoder.layers.{number}."
            fused = inner.removeprefix("attn.in_proj_")
            if fused == inner:
                renamed[start + _rename(inner, _IN_BLOCK)] = tensor
            else:
                for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                    renamed[f"{start}self_attn.{letter}_proj.{fused}"] = part
    return {name: tensor.contiguous() for name, tensor in renamed.items()}


def fit(image: Image.Image) -> Tensor:
    """Prepare a picture as the published code does: the longer side fitted, the rest padded.

    It resizes the tensor and not the picture: bicubic, antialiased (torchvision's default for
    tensors since 0.17; before, it was not), values beyond 0..1 kept.

    Args:
        image: RGB, of any size.

    Returns:
        [3, 224, 224], normalised as CLIP's pictures are.
    """
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)[None]
    height, width = pixels.shape[2:]
    scale = SIDE_PX / max(height, width)
    if scale != 1:
        # A strip so thin that it rounds to nothing keeps one row.
        new = [max(1, round(height * scale)), max(1, round(width * scale))]
        pixels = torch.nn.functional.interpolate(pixels, new, mode="bicubic", antialias=True)
    down, across = SIDE_PX - pixels.shape[2], SIDE_PX - pixels.shape[3]
    padding = (across // 2, across - across // 2, down // 2, down - down // 2)
    pixels = torch.nn.functional.pad(pixels, padding)[0]
    mean, std = torch.tensor(OPENAI_CLIP_MEAN), torch.tensor(OPENAI_CLIP_STD)
    return (pixels - mean[:, None, None]) / std[:, None, None]


def _rename(name: str, table: Mapping[str, str]) -> str:
    if name in table:
        return table[name]
    start, dot, kind = name.rpartition(".")
    known = table.get(start + dot) if kind in ("weight", "bias") else None
    return name if known is None else known + kind
