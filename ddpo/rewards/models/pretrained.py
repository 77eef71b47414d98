"""Reward models: weights checked, loaded on first use, run on some images at a time.

Rewards import PyTorch and transformers where they use them, so that they are described without.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

import numpy as np
from PIL import Image

from ddpo.basics.tensors import detach_from_files
from ddpo.errors import RewardError
from ddpo.prompts.base import Prompt

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

Device = Literal["auto", "cpu", "cuda"]
"""Where a reward model runs; ``auto`` is CUDA if there is a GPU."""

SCORED_AT_ONCE = 16
"""Images in one forward pass."""

_SHOWN = 3  # names in a message

Loaded = TypeVar("Loaded")
Model = TypeVar("Model", bound="PreTrainedModel")
Placed = TypeVar("Placed", bound="nn.Module")


class Pinned(Protocol):
    """Files that a reward's identity names, and that are read later."""

    def check(self) -> None:
        """Check that the files are those that were pinned.

        Raises:
            RewardError: They have changed.
        """
        ...


class LoadedOnce(Generic[Loaded]):
    """A value that is loaded by whichever thread first needs it.

    Args:
        load: Loads it.
        pinned: The files that it is loaded from; checked afterwards.
    """

    def __init__(self, load: Callable[[], Loaded], *pinned: Pinned) -> None:
        self._load = load
        self._pinned = pinned
        self._lock = threading.Lock()
        self._loaded: list[Loaded] = []

    def get(self) -> Loaded:
        """Return the value; a load that failed is tried again by the next call.

        Raises:
            RewardError: The files that it is loaded from have changed.
        """
        with self._lock:
            if not self._loaded:
                loaded = self._load()
                for part in self._pinned:
                    part.check()
                self._loaded.append(loaded)
            return self._loaded[0]


def pick_device(wanted: Device) -> torch.device:
    """Return the device that a parameter means on this machine.

    Raises:
        RewardError: CUDA is requested but not available.
    """
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise RewardError(
            "the reward's `device` is 'cuda', but no GPU is available; set it to 'auto' or 'cpu'"
        )
    if wanted == "auto":
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(wanted)


def in_batches(
    images: Sequence[Image.Image],
    prompts: Sequence[Prompt],
    score: Callable[[list[Image.Image], list[str]], Tensor],
) -> np.ndarray:
    """Score B images, some at a time, without gradients.

    Args:
        images: B images of any size and mode; converted to RGB (alpha is dropped).
        prompts: B prompts.
        score: From b images and their b texts to scores [b], on any device.

    Returns:
        float32 [B].
    """
    import torch

    values = np.empty(len(images), np.float32)
    with torch.no_grad():
        for start in range(0, len(images), SCORED_AT_ONCE):
            part = slice(start, start + SCORED_AT_ONCE)
            rgb = [image.convert("RGB") for image in images[part]]
            texts = [prompt.text for prompt in prompts[part]]
            values[part] = score(rgb, texts).float().cpu().numpy()
    return values


def check_tensors(
    what: str, found: Mapping[str, Tensor], expected: Mapping[str, Sequence[int]]
) -> None:
    """Check that tensors are exactly those of a model.

    Args:
        what: What they belong to, for messages.
        found: Tensors by name.
        expected: Shapes by name.

    Raises:
        RewardError: Some are missing, unexpected, or of another shape.
    """
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    reshaped = [
        f"{name} {list(found[name].shape)} not {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name].shape) != tuple(shape)
    ]
    parts = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    wrong = "; ".join(f"{kind}: {few(names)}" for kind, names in parts.items() if names)
    if wrong:
        raise RewardError(
            f"the weights of {what} do not match its architecture ({wrong}). Check that it is the "
            "published file of this model, and not of another version"
        )


def build_model(
    what: str,
    kind: type[Model],
    config: PreTrainedConfig,
    tensors: Mapping[str, Tensor],
    **arguments: Any,
) -> Model:
    """Build a model of transformers from its tensors, in float32 on the CPU.

    Args:
        what: What the tensors belong to, for messages.
        kind: Class of the model.
        config: Its architecture.
        tensors: Exactly its weights, under its own names.
        arguments: Further arguments of the class.

    Raises:
        RewardError: Names or shapes do not match.
    """
    import torch

    with torch.device("meta"):
        shapes = {n: t.shape for n, t in kind(config, **arguments).state_dict().items()}
    check_tensors(what, tensors, shapes)
    return kind.from_pretrained(
        None,
        config=config,
        state_dict=dict(tensors),
        dtype=torch.float32,
        use_safetensors=True,
        local_files_only=True,
        **arguments,
    )


def place(model: Placed, device: torch.device) -> Placed:
    """Move a model to a device and prepare it for inference, in place."""
    module: nn.Module = model
    module.to(device).eval().requires_grad_(False)
    detach_from_files(module)
    return model


def few(names: Iterable[str]) -> str:
    """Format names for a message: the first three, and how many more there are."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(map(str, names[:_SHOWN])) + more
