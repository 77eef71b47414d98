"""Tiny, randomly initialised models of the real classes for the model rewards, and pictures."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import BertTokenizer, CLIPConfig, CLIPModel, CLIPTokenizer
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ddpo.prompts import Prompt
from ddpo.starter.text import build_tokenizer

PROMPTS = [Prompt("a cat"), Prompt("two dogs riding a bike"), Prompt("a horse"), Prompt("a bee")]

_noise = np.random.default_rng(0)


def picture(width: int, height: int, mode: str = "RGB") -> Image.Image:
    """Return a picture of a colour, some blocks and some noise, no two alike."""
    blocks = _noise.integers(0, 200, (5, 5, 3), dtype=np.uint8)
    coarse = np.asarray(Image.fromarray(blocks).resize((width, height), Image.Resampling.BILINEAR))
    fine = _noise.integers(0, 55, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(coarse + fine).convert(mode)


PICTURES = [picture(64, 64), picture(90, 41), picture(33, 120), picture(300, 260)]
"""Square and not, smaller and larger than what the models see."""


def tiny_clip_config(*, projection_dim: int = 16, image_size: int = 32) -> CLIPConfig:
    tokenizer = build_tokenizer()
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 24,
        "intermediate_size": 40,
        "projection_dim": projection_dim,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": tokenizer.model_max_length,
        "hidden_act": "gelu",
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "projection_dim": projection_dim,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": image_size,
        "patch_size": image_size // 4,
        "hidden_act": "gelu",
    }
    return CLIPConfig(text_config=text, vision_config=vision, projection_dim=projection_dim)


def draw(shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, torch.Tensor]:
    """Draw every tensor at random, biases and norms too, so that none can be mixed up unseen."""
    noise = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        drawn = torch.randn(tuple(shape), generator=noise)
        is_norm = re.search(r"(ln_\w+|norm\d?)\.weight$", name, re.IGNORECASE)
        tensors[name] = 1 + 0.2 * drawn if is_norm else 0.4 * drawn
    return tensors


def stir(model: torch.nn.Module, seed: int = 0) -> None:
    """Give a model drawn weights; CLIP's logit scale stays what it is."""
    shapes = {name: p.shape for name, p in model.named_parameters() if p.ndim}
    model.load_state_dict(draw(shapes, seed), strict=False)


def save_clip(folder: Path, config: CLIPConfig | None = None, seed: int = 0) -> CLIPModel:
    """Write a CLIP model, its tokenizer and its image processor into one folder."""
    config = config or tiny_clip_config()
    model = CLIPModel(config).eval()
    stir(model, seed)
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    size = model.vision_model.config.image_size
    CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size={"height": size, "width": size}
    ).save_pretrained(folder)
    return model


def clip_parts(folder: Path) -> tuple[CLIPTokenizer, CLIPImageProcessorPil]:
    return CLIPTokenizer.from_pretrained(folder), CLIPImageProcessorPil.from_pretrained(folder)


def save_bert_tokenizer(folder: Path) -> int:
    """Write a word-piece tokenizer; return the size of its vocabulary."""
    words = "a an the cat dog dogs horse bee two riding bike ##s ##ing on of"
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words.split()]
    tokenizer = BertTokenizer(vocab={word: place for place, word in enumerate(vocabulary)})
    tokenizer.save_pretrained(folder)
    return len(vocabulary)


def head_tensors(width: int, seed: int = 3) -> dict[str, torch.Tensor]:
    """Return random weights of the head under its published names."""
    noise = torch.Generator().manual_seed(seed)
    sizes = {0: (1024, width), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    tensors = {}
    for layer, (out, into) in sizes.items():
        tensors[f"layers.{layer}.weight"] = torch.randn(out, into, generator=noise) / into**0.5
        tensors[f"layers.{layer}.bias"] = torch.randn(out, generator=noise)
    return tensors


def by_head(tensors: dict[str, torch.Tensor], features: torch.Tensor) -> torch.Tensor:
    """Score features [b, width] in float64; the head is a chain of products."""
    found = features.double()
    for layer in (0, 2, 4, 6, 7):
        weight, bias = tensors[f"layers.{layer}.weight"], tensors[f"layers.{layer}.bias"]
        found = found @ weight.double().T + bias.double()
    return found[:, 0]


def save_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return str(path)
