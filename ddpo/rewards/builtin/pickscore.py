"""PickScore: which image people would pick for a prompt (arXiv 2305.01569)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from PIL import Image

from ddpo.prompts.base import Prompt
from ddpo.rewards.base import Scores
from ddpo.rewards.models.clip import cosines, load_clip
from ddpo.rewards.models.pinned import find_model
from ddpo.rewards.models.pretrained import Device, LoadedOnce, in_batches

if TYPE_CHECKING:
    from torch import Tensor


class PickScore:
    """Reward = exp(logit scale) * cosine of image and prompt; roughly 18 to 24.

    CLIP ViT-H/14, fine-tuned on choices between pairs of images
    (github.com/yuvalkirstain/PickScore, README). A difference d between two images of one prompt
    means that the better one is picked with probability sigmoid(d).

    Args:
        model: The model: a Hub id or a folder.
        revision: Commit of a Hub id; that of the default is pinned.
        processor: Source of tokenizer and image processor: a Hub id or a folder.
        processor_revision: Its commit; that of the default is pinned.
        device: Where the model runs.
    """

    version: ClassVar[str] = "1"
    needs: ClassVar[str] = "PickScore v1 (3.9 GB), fetched from the hub"

    def __init__(
        self,
        model: str = "yuvalkirstain/PickScore_v1",
        revision: str | None = None,
        processor: str = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
        processor_revision: str | None = None,
        device: Device = "auto",
    ) -> None:
        pinned = find_model(model, revision)
        pinned_processor = find_model(processor, processor_revision)
        self.revisions = {processor: pinned_processor.revision, model: pinned.revision}
        self._loaded = LoadedOnce(
            lambda: load_clip(pinned, device, pinned_processor), pinned, pinned_processor
        )

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """Score B images for their prompts; a prompt is cut after 77 tokens."""
        return Scores(in_batches(images, prompts, self._score))

    def _score(self, images: list[Image.Image], texts: list[str]) -> Tensor:
        clip = self._loaded.get()
        return clip.model.logit_scale.exp() * cosines(clip.see(images), clip.read(texts))
