"""CLIP's similarity by the starter's judge: the oracle of `clip_score`."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from ddpo.starter.judge import Judge


def similarity(judge: Judge, images: Sequence[Image.Image], prompts: Sequence[str]) -> np.ndarray:
    """Return the cosine of each image and its prompt, float32 [B] in -1..1."""
    rgb = [image.convert("RGB") for image in images]
    pixels = judge._processor(rgb, return_tensors="pt")["pixel_values"]
    tokens = judge._tokenizer(
        list(prompts), padding="max_length", truncation=True, return_tensors="pt"
    )
    assert len(images) == len(prompts)
    with torch.no_grad():
        seen, _ = judge.network.see(pixels)
        read = judge.network.read(tokens["input_ids"])
    return (seen * read).sum(-1).numpy()
