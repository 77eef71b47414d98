"""The judge: a small CLIP with heads that name what a picture shows.

It is trained on rendered pictures alone, apart from the generator, and never sees a sample.
"""

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
"""What the first head tells apart."""

ACTIVITY_LABELS = ("", *ACTIVITIES)
"""What the second head tells apart; '' is no activity."""

COUNT_LABELS = (1, *COUNTS)
"""What the third head tells apart."""


def build_clip(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Returns an untrained CLIP for 64x64 pictures and a tokenizer's vocabulary."""
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
    """CLIP and heads, which train together.

    Attributes:
        clip: pictures [B, 3, 64, 64] in -1..1 and prompts [P, 24] into one space.
        heads: from a picture's pooled features [B, 128] to scores of `NAME_LABELS`,
            `ACTIVITY_LABELS` and `COUNT_LABELS`.
    """

    def __init__(self, clip: CLIPModel) -> None:
        super().__init__()
        self.clip = clip
        self.heads = nn.ModuleDict(
            {
                "name": nn.Linear(WIDTH, len(NAME_LABELS)),
                "activity": nn.Linear(WIDTH, len(ACTIVITY_LABELS)),
                "count": nn.Linear(WIDTH, len(COUNT_LABELS)),
            }
        )

    def see(self, pictures: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Looks at pictures.

        Args:
            pictures: [B, 3, 64, 64] in -1..1.

        Returns:
            Unit vectors [B, 128], and each head's logits.
        """
        pooled = self.clip.vision_model(pictures).pooler_output
        logits = {name: head(pooled) for name, head in self.heads.items()}
        return nn.functional.normalize(self.clip.visual_projection(pooled), dim=-1), logits

    def read(self, tokens: Tensor) -> Tensor:
        """Turns prompts [P, 24] into unit vectors [P, 128]."""
        pooled = self.clip.text_model(tokens).pooler_output
        return nn.functional.normalize(self.clip.text_projection(pooled), dim=-1)


@dataclass(frozen=True)
class Verdicts:
    """What a judge sees in B pictures.

    Attributes:
        probabilities: of every answer to 'name' [B, 69], 'activity' [B, 4], 'count' [B, 4].
    """

    probabilities: dict[str, NDArray[np.float32]]

    @property
    def names(self) -> list[str]:
        """The likeliest name, a picture."""
        return [NAME_LABELS[place] for place in self.probabilities["name"].argmax(1)]

    @property
    def activities(self) -> list[str | None]:
        """The likeliest activity, a picture; None for none."""
        return [
            ACTIVITY_LABELS[place] or None for place in self.probabilities["activity"].argmax(1)
        ]

    @property
    def counts(self) -> list[int]:
        """The likeliest number of animals, a picture."""
        return [COUNT_LABELS[place] for place in self.probabilities["count"].argmax(1)]

    def right(self, scenes: Sequence[Scene]) -> NDArray[np.bool_]:
        """Tells which pictures show what they should.

        Args:
            scenes: what each picture should show.

        Returns:
            bool [B]: the name of a single or another word; name and activity of an activity; the
            number of a count.
        """
        found = zip(scenes, self.names, self.activities, self.counts, strict=True)
        return np.array(
            [
                count == scene.count
                if scene.kind is Kind.COUNT
                else name == scene.name
                and (scene.kind is not Kind.ACTIVITY or activity == scene.activity)
                for scene, name, activity, count in found
            ]
        )


class Judge:
    """A trained judge.

    Attributes:
        network: its weights, float32, not to be trained further.
    """

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
        """Loads a judge from a folder that `save` wrote.

        Raises:
            FileNotFoundError: no judge lies there.
            ValueError: its heads tell other things apart than this version of the code.
        """
        if json.loads((folder / LABELS_FILE).read_text()) != _labels():
            raise ValueError(
                f"the judge in {folder} knows other names than this version; "
                "train it again with python -m starter_training.train"
            )
        network = JudgeNetwork(CLIPModel.from_pretrained(folder))
        network.heads.load_state_dict(load_file(folder / HEADS_FILE))
        return cls(
            network,
            CLIPTokenizer.from_pretrained(folder),
            CLIPImageProcessorPil.from_pretrained(folder),
        )

    def save(self, folder: Path) -> None:
        """Writes CLIP as transformers does, with tokenizer and image processor, and the heads."""
        self.network.clip.save_pretrained(folder)
        self._tokenizer.save_pretrained(folder)
        self._processor.save_pretrained(folder)
        heads = {
            name: value.contiguous() for name, value in self.network.heads.state_dict().items()
        }
        save_file(heads, folder / HEADS_FILE)
        (folder / LABELS_FILE).write_text(json.dumps(_labels(), indent=2) + "\n")

    def look(self, images: Sequence[Image.Image]) -> Verdicts:
        """Names what pictures show.

        Args:
            images: B pictures of any size; resized to 64x64.

        Returns:
            Probabilities and the likeliest answers.
        """
        return self._see(images)[1]

    def similarity(
        self, images: Sequence[Image.Image], prompts: Sequence[str]
    ) -> NDArray[np.float32]:
        """Compares each picture with its prompt, as CLIP does.

        Args:
            images: B pictures.
            prompts: B texts.

        Returns:
            Cosines, float32 [B] in -1..1.

        Raises:
            ValueError: not as many prompts as pictures.
        """
        if len(images) != len(prompts):
            raise ValueError(f"{len(images)} pictures and {len(prompts)} prompts; give one each")
        tokens = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, return_tensors="pt"
        )
        with torch.no_grad():
            texts = self.network.read(tokens["input_ids"])
        return (self._see(images)[0] * texts).sum(-1).numpy()

    @torch.no_grad()
    def _see(self, images: Sequence[Image.Image]) -> tuple[Tensor, Verdicts]:
        vectors: list[Tensor] = []
        logits: dict[str, list[Tensor]] = {name: [] for name in self.network.heads}
        for start in range(0, len(images), JUDGED_AT_ONCE):
            batch = [image.convert("RGB") for image in images[start : start + JUDGED_AT_ONCE]]
            pixels = self._processor(batch, return_tensors="pt")["pixel_values"]
            vector, found = self.network.see(pixels)
            vectors.append(vector)
            for name, values in found.items():
                logits[name].append(values)
        joined = {name: torch.cat(values).softmax(-1).numpy() for name, values in logits.items()}
        return torch.cat(vectors), Verdicts(joined)


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
