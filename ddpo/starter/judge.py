"""The judge: a small CLIP with heads that classify what an image shows.

It is trained on rendered images alone, separately from the generator, and never sees a sample.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from ddpo.basics.tensors import detach_from_files
from ddpo.starter.glyphs import ACTIVITIES, ANIMALS, OTHERS
from ddpo.starter.render import SIZE_PX
from ddpo.starter.scenes import COUNTS, Kind, Scene
from ddpo.starter.text import BOS, EOS, MAX_TOKENS, build_tokenizer

WIDTH = 128
PATCH_PX = 8
HEADS_FILE = "heads.safetensors"
LABELS_FILE = "labels.json"
JUDGED_AT_ONCE = 64

NAME_LABELS = (*ANIMALS, *OTHERS)
"""Classes of the first head."""

ACTIVITY_LABELS = ("", *ACTIVITIES)
"""Classes of the second head; '' is no activity."""

COUNT_LABELS = (1, *COUNTS)
"""Classes of the third head."""


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Return an untrained CLIP for 64x64 images and a tokenizer's vocabulary."""
    vocab = tokenizer.get_vocab()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        bos_token_id=vocab[BOS],
        eos_token_id=vocab[EOS],
        pad_token_id=vocab[EOS],
    )
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=SIZE_PX,
        patch_size=PATCH_PX,
    )
    return CLIPModel(
        CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH)
    )


class JudgeNetwork(nn.Module):
    """CLIP and its heads, which are trained together."""

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip
        """Embeds images [B, 3, 64, 64] in -1..1 and prompts [P, 24] in one space."""
        self.heads = nn.ModuleDict(
            {
                "name": nn.Linear(WIDTH, len(NAME_LABELS)),
                "activity": nn.Linear(WIDTH, len(ACTIVITY_LABELS)),
                "count": nn.Linear(WIDTH, len(COUNT_LABELS)),
            }
        )
        """From an image's pooled features [B, 128] to logits of the labels above."""

    def see(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Embed and classify images [B, 3, 64, 64] in -1..1.

        Returns:
            Unit vectors [B, 128], and each head's logits.
        """
        pooled = self.clip.vision_model(images).pooler_output
        logits = {name: head(pooled) for name, head in self.heads.items()}
        return nn.functional.normalize(self.clip.visual_projection(pooled), dim=-1), logits

    def read(self, tokens: Tensor) -> Tensor:
        """Embed tokenized prompts [P, 24] as unit vectors [P, 128]."""
        pooled = self.clip.text_model(tokens).pooler_output
        return nn.functional.normalize(self.clip.text_projection(pooled), dim=-1)


@dataclass(frozen=True)
class Verdicts:
    """A judge's answers about B images."""

    probabilities: dict[str, NDArray[np.float32]]
    """Of every answer to 'name' [B, 69], 'activity' [B, 4] and 'count' [B, 4]."""

    @property
    def names(self) -> list[str]:
        """The most likely name for each image."""
        return [NAME_LABELS[index] for index in self.probabilities["name"].argmax(1)]

    @property
    def activities(self) -> list[str | None]:
        """The most likely activity for each image; None for no activity."""
        return [
            ACTIVITY_LABELS[index] or None for index in self.probabilities["activity"].argmax(1)
        ]

    @property
    def counts(self) -> list[int]:
        """The most likely number of animals for each image."""
        return [COUNT_LABELS[index] for index in self.probabilities["count"].argmax(1)]

    def right(self, scenes: Sequence[Scene]) -> NDArray[np.bool_]:
        """Return which images show the scenes that they should, bool [B].

        A single or another word is right by its name, an activity by name and activity, a count by
        its number.
        """
        answers = zip(scenes, self.names, self.activities, self.counts, strict=True)
        return np.array(
            [
                count == scene.count
                if scene.kind is Kind.COUNT
                else name == scene.name
                and (scene.kind is not Kind.ACTIVITY or activity == scene.activity)
                for scene, name, activity, count in answers
            ]
        )


class Judge:
    """A trained judge, for inference only."""

    def __init__(
        self,
        network: JudgeNetwork,
        tokenizer: CLIPTokenizer | None = None,
        processor: CLIPImageProcessorPil | None = None,
    ) -> None:
        self.network = network.eval().requires_grad_(False)
        self._tokenizer = tokenizer or build_tokenizer()
        self._processor = processor or _image_processor()

    @classmethod
    def load(cls, folder: Path) -> Self:
        """Load a judge from a folder written by `save`.

        Raises:
            FileNotFoundError: There is no judge in the folder.
            ValueError: Its labels are not those of this version of the code.
        """
        if json.loads((folder / LABELS_FILE).read_text()) != _labels():
            raise ValueError(
                f"the judge in {folder} has other labels than this version; "
                "train it again with python -m starter_training.train"
            )
        network = JudgeNetwork(CLIPModel.from_pretrained(folder))
        network.heads.load_state_dict(load_file(folder / HEADS_FILE))
        detach_from_files(network)
        return cls(
            network,
            CLIPTokenizer.from_pretrained(folder),
            CLIPImageProcessorPil.from_pretrained(folder),
        )

    def save(self, folder: Path) -> None:
        """Write CLIP, tokenizer and image processor as transformers does, and the heads."""
        self.network.clip.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)
        self._processor.save_pretrained(folder)
        heads = {
            name: value.contiguous() for name, value in self.network.heads.state_dict().items()
        }
        save_file(heads, folder / HEADS_FILE)
        (folder / LABELS_FILE).write_text(json.dumps(_labels(), indent=2) + "\n")

    @torch.no_grad()
    def look(self, images: Sequence[Image.Image]) -> Verdicts:
        """Say what B images of any size show; they are resized to 64x64."""
        logits: dict[str, list[Tensor]] = {name: [] for name in self.network.heads}
        for start in range(0, len(images), JUDGED_AT_ONCE):
            batch = [image.convert("RGB") for image in images[start : start + JUDGED_AT_ONCE]]
            pixels = self._processor(batch, return_tensors="pt")["pixel_values"]
            for name, values in self.network.see(pixels)[1].items():
                logits[name].append(values)
        return Verdicts(
            {name: torch.cat(values).softmax(-1).numpy() for name, values in logits.items()}
        )


def _labels() -> dict[str, list[str] | list[int]]:
    return {
        "name": list(NAME_LABELS),
        "activity": list(ACTIVITY_LABELS),
        "count": list(COUNT_LABELS),
    }


def _image_processor() -> CLIPImageProcessorPil:
    return CLIPImageProcessorPil(
        size={"height": SIZE_PX, "width": SIZE_PX},
        do_center_crop=False,
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
