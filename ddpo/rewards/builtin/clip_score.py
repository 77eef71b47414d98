"""CLIPScore: how well an image matches its prompt according to CLIP (arXiv 2104.08718)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from PIL import Image

from ddpo.prompts.base import Prompt
from ddpo.rewards.base import Scores
from ddpo.rewards.models.clip import cosines, load_clip
from ddpo.rewards.models.pinned import find_model
from ddpo.rewards.models.pretrained import Device, LoadedOnce, in_batches
from ddpo.starter import JUDGE_PATH

if TYPE_CHECKING:
    from torch import Tensor

STARTER_JUDGE = "starter-judge"
"""Short name for the judge that ships with the package."""

WEIGHT = 2.5


class ClipScore:
    """Reward = 2.5 * max(cosine, 0) of image and prompt; the column ``cosine`` is the cosine.

    As published (github.com/jmhessel/clipscore), except for two defaults: there the model is
    ViT-B/32, and every text starts with ``A photo depicts ``.

    Args:
        model: A CLIP model: a Hub id, a folder, or ``starter-judge``.
        revision: Commit of a Hub id; that of the default is pinned.
        formula: ``clipscore`` as above, or ``cosine``: the cosine itself, which distinguishes
            images below 0 too.
        prefix: Put before every prompt, including its trailing space.
        device: Where the model runs.
    """

    version: ClassVar[str] = "1"
    needs: ClassVar[str] = (
        "CLIP ViT-L/14 (1.7 GB), fetched from the hub; the starter's judge ships with the project"
    )

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        revision: str | None = None,
        formula: Literal["clipscore", "cosine"] = "clipscore",
        prefix: str = "",
        device: Device = "auto",
    ) -> None:
        folder = str(JUDGE_PATH) if model == STARTER_JUDGE else model
        pinned = find_model(folder, revision)
        self.revisions = {model: pinned.revision}
        self._formula = formula
        self._prefix = prefix
        self._loaded = LoadedOnce(lambda: load_clip(pinned, device), pinned)

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """Score B images against their prompts; a prompt is cut where the context ends."""
        cosine = in_batches(images, prompts, self._compare)
        values = cosine if self._formula == "cosine" else WEIGHT * np.maximum(cosine, 0)
        return Scores(values, columns={"cosine": cosine.tolist()})

    def _compare(self, images: list[Image.Image], texts: list[str]) -> Tensor:
        clip = self._loaded.get()
        return cosines(clip.see(images), clip.read([self._prefix + text for text in texts]))
