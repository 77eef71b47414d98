"""The linear head 768-1024-128-64-16-1 that LAION's predictor and ImageReward share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from ddpo.rewards.models.pretrained import check_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn


def build_head(what: str, width: int, tensors: Mapping[str, Tensor]) -> nn.Sequential:
    """Build the head, a module from features [b, width] to scores [b, 1] in float32.

    In training, dropout follows the first three layers. Identities stand in for it, so that the
    layers keep their published numbers 0, 2, 4, 6, 7.

    Args:
        what: What the head belongs to, for messages.
        width: Width of the features.
        tensors: Its weights under their published names, ``layers.0.weight`` and so on.

    Raises:
        RewardError: Names or shapes do not match.
    """
    from torch import nn

    layers = nn.Sequential(
        *(nn.Linear(width, 1024), nn.Identity()),
        *(nn.Linear(1024, 128), nn.Identity()),
        *(nn.Linear(128, 64), nn.Identity()),
        *(nn.Linear(64, 16), nn.Linear(16, 1)),
    )
    head = nn.ModuleDict({"layers": layers})
    check_tensors(what, tensors, {n: t.shape for n, t in head.state_dict().items()})
    head.load_state_dict(dict(tensors))  # copies into float32, whatever the stored dtype
    return layers
