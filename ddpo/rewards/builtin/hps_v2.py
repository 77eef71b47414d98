"""HPS v2.1: how much people like an image for its prompt (arXiv 2306.09341)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from PIL import Image

from ddpo.rewards.models.checkpoint import CheckpointReward
from ddpo.rewards.models.clip import Clip, cosines, load_tokenizer
from ddpo.rewards.models.pretrained import build_model, place

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import CLIPConfig

SIDE_PX = 224
"""Side of the square input of the model."""

# open_clip's names and transformers' (a trailing dot stands for both weight and bias).
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
# open_clip right-multiplies features by these; a linear layer stores the transpose.
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


@dataclass(kw_only=True, eq=False)
class HpsV2(CheckpointReward[Clip]):
    """Reward = cosine of image and prompt by HPS v2.1; roughly 0.2 to 0.35.

    open_clip's ViT-H/14, fine-tuned on rankings of images (github.com/tgxs002/HPSv2,
    hpsv2/img_score.py). Images are scaled to fit 224 x 224 px and padded with black, not cropped.
    Runs in float32, where the published code uses mixed precision.
    """

    version: ClassVar[str] = "1"
    needs: ClassVar[str] = "HPS v2.1 (2.0 GB) and CLIP's tokenizer, fetched from the hub"

    weights: str = "xswu/HPSv2/HPS_v2.1_compressed.pt"
    tokenizer: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def _load(self, device: torch.device) -> Clip:
        from transformers import CLIPModel
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

        tokenizer = load_tokenizer(self._tokenizer)
        tensors = from_open_clip(self._weights.tensors(inside="state_dict"))
        model = build_model("HPS v2", CLIPModel, vit_h_14(), tensors)
        return Clip(place(model, device), tokenizer, CLIPImageProcessorPil())

    def _score(self, loaded: Clip, images: list[Image.Image], texts: list[str]) -> Tensor:
        import torch

        pixels = torch.stack([fit(image) for image in images])
        return cosines(loaded.see_pixels(pixels), loaded.read(texts))


def vit_h_14() -> CLIPConfig:
    """Return the architecture that open_clip calls ViT-H-14."""
    from transformers import CLIPConfig

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
    """Convert the ``state_dict`` of an open_clip CLIP to that of transformers' `CLIPModel`.

    open_clip stacks the weights of queries, keys and values, in this order, in one tensor, which is
    split into three. An unknown name is kept, and rejected when the model is built.

    Args:
        tensors: Of a CLIP whose two towers are plain transformers.
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
    """Preprocess an image as the published code does: fit the longer side, pad the rest.

    The tensor is resized, not the PIL image: bicubic, antialiased (torchvision's default for
    tensors since 0.17, not before), with values outside 0..1 kept.

    Args:
        image: RGB, of any size.

    Returns:
        [3, 224, 224], normalised as CLIP's inputs are.
    """
    import torch
    from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)[None]
    height, width = pixels.shape[2:]
    scale = SIDE_PX / max(height, width)
    if scale != 1:
        # An extremely thin strip would round to no row at all; keep one.
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
