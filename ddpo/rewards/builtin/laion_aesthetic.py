"""LAION's aesthetic predictor: how people would rate an image, whatever it shows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from PIL import Image

from ddpo.prompts.base import Prompt
from ddpo.rewards.base import Scores
from ddpo.rewards.models.clip import Clip, load_clip
from ddpo.rewards.models.linear_head import build_head
from ddpo.rewards.models.pinned import find_model, find_weights
from ddpo.rewards.models.pretrained import Device, LoadedOnce, in_batches, place

if TYPE_CHECKING:
    from torch import Tensor, nn

HEAD = (
    "https://raw.githubusercontent.com/christophschuhmann/improved-aesthetic-predictor/"
    "6934dd81792f086e613a121dbce43082cb8be85e/sac%2Blogos%2Bava1-l14-linearMSE.pth"
)
"""The head used by the DDPO paper's code, trained on SAC, LAION-Logos and AVA."""

HEAD_SHA256 = "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"


@dataclass(frozen=True)
class _Loaded:
    clip: Clip
    head: nn.Module


class LaionAesthetic:
    """Reward = LAION's aesthetic score, on a scale of about 1 to 10; prompts are ignored.

    CLIP's image features, divided by their L2 norm, are passed through the head in float32
    (github.com/christophschuhmann/improved-aesthetic-predictor, simple_inference.py).

    Args:
        model: OpenAI's CLIP ViT-L/14, on whose features the head was trained: a Hub id or a folder.
        revision: Commit of a Hub id; that of the default is pinned.
        head: The head's weights: an address, a path, or ``owner/name/file`` on the Hub.
        head_sha256: Digest of the head's file; by default the published one for the default
            address, and that of the file itself for a path.
        device: Where CLIP runs.
    """

    version: ClassVar[str] = "1"
    needs: ClassVar[str] = "CLIP ViT-L/14 (1.7 GB) and the head (4 MB), fetched"

    def __init__(
        self,
        model: str = "openai/clip-vit-large-patch14",
        revision: str | None = None,
        head: str = HEAD,
        head_sha256: str | None = None,
        device: Device = "auto",
    ) -> None:
        self._model = find_model(model, revision)
        sha256 = HEAD_SHA256 if head == HEAD and head_sha256 is None else head_sha256
        self._head = find_weights(head, None, sha256)
        self._device: Device = device
        self._loaded = LoadedOnce(self._load, self._model, self._head)
        self.revisions = {part.name: part.revision for part in (self._model, self._head)}

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """Score B images."""
        return Scores(in_batches(images, prompts, self._score))

    def _score(self, images: list[Image.Image], texts: list[str]) -> Tensor:
        loaded = self._loaded.get()
        return aesthetic_scores(loaded.head, loaded.clip.see(images))

    def _load(self) -> _Loaded:
        clip = load_clip(self._model, self._device)
        width = clip.model.visual_projection.out_features
        head = build_head("the aesthetic predictor's head", width, self._head.tensors())
        return _Loaded(clip, place(head, clip.model.device))


def aesthetic_scores(head: nn.Module, features: Tensor) -> Tensor:
    """Score image features [b, 768] of any length; [b]."""
    from torch import nn

    return head(nn.functional.normalize(features, dim=-1)).squeeze(-1)
