"""Rewards that one published checkpoint computes, from images and tokenized prompts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from PIL import Image

from ddpo.prompts.base import Prompt
from ddpo.rewards.base import Scores
from ddpo.rewards.models.pinned import find_model, find_weights
from ddpo.rewards.models.pretrained import Device, LoadedOnce, in_batches, pick_device

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Loaded = TypeVar("Loaded")


@dataclass(kw_only=True, eq=False)
class CheckpointReward(ABC, Generic[Loaded]):
    """A reward made of a checkpoint and a tokenizer; its fields are the reward's parameters.

    Both are pinned when the reward is built, and loaded when it first scores. A subclass gives the
    defaults of `weights` and `tokenizer`, and says how its model is loaded and what it computes.
    """

    weights: str
    """The checkpoint: ``owner/name/file`` on the Hub, a path, or an https address. Either as
    published, or its tensors as safetensors."""
    revision: str | None = None
    """Commit of a Hub file; that of the default is pinned."""
    sha256: str | None = None
    """Digest of the file; required for an address."""
    tokenizer: str
    """Where the tokenizer comes from: a Hub id or a folder."""
    tokenizer_revision: str | None = None
    """Commit of the tokenizer; that of the default is pinned."""
    device: Device = "auto"
    """Where the model runs."""
    revisions: dict[str, str] = field(init=False, repr=False)
    """What was pinned, by name."""

    def __post_init__(self) -> None:
        self._weights = find_weights(self.weights, self.revision, self.sha256)
        self._tokenizer = find_model(self.tokenizer, self.tokenizer_revision)
        self._loaded = LoadedOnce(
            lambda: self._load(pick_device(self.device)), self._weights, self._tokenizer
        )
        self.revisions = {part.name: part.revision for part in (self._weights, self._tokenizer)}

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """Score B images for their prompts; a prompt is cut where the model's context ends."""
        return Scores(
            in_batches(images, prompts, lambda *some: self._score(self._loaded.get(), *some))
        )

    @abstractmethod
    def _load(self, device: torch.device) -> Loaded:
        """Load `_weights` onto a device, with `_tokenizer` beside it."""

    @abstractmethod
    def _score(self, loaded: Loaded, images: list[Image.Image], texts: list[str]) -> Tensor:
        """Score b RGB images for their b texts; [b]."""
