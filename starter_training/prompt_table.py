"""All prompts used in training, as tokens, and the choice of one for an image."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpo.starter.glyphs import ANIMALS, OTHERS
from ddpo.starter.scenes import SCENES, Kind
from ddpo.starter.text import build_tokenizer

BARE = 0.3
"""Share of images of a single thing whose prompt is 'cat' instead of 'a cat'."""


class PromptTable:
    """The prompts of all scenes, the bare names, and the empty prompt, in this order.

    `texts` are the P prompts, `tokens` are int64 [P, 24].
    """

    def __init__(self) -> None:
        names = [*ANIMALS, *OTHERS]
        self.texts = [*(scene.prompt for scene in SCENES), *names, ""]
        tokens = build_tokenizer()(
            self.texts, padding="max_length", truncation=True, return_tensors="pt"
        )
        self.tokens: Tensor = tokens["input_ids"]
        alone = (Kind.SINGLE, Kind.OTHER)
        self._bare = torch.tensor(
            [
                len(SCENES) + names.index(scene.name) if scene.kind in alone else number
                for number, scene in enumerate(SCENES)
            ]
        )

    def choose(self, scenes: Tensor, dropped: float, draws: torch.Generator) -> Tensor:
        """Sample prompts for images.

        Args:
            scenes: What the images show: indices into `SCENES`, int64 [B].
            dropped: Probability of the empty prompt.
            draws: Source of randomness.

        Returns:
            Indices into `texts`, int64 [B].
        """
        bare = torch.rand(len(scenes), generator=draws) < BARE
        chosen = torch.where(bare, self._bare[scenes], scenes)
        empty = torch.rand(len(scenes), generator=draws) < dropped
        return chosen.masked_fill(empty, len(self.texts) - 1)
