"""The head 768-1024-128-64-16-1, all linear, that LAION's predictor and ImageReward share."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ddpo.rewards.models.pretrained import check_tensors


def build_head(what: str, width: int, tensors: Mapping[str, Tensor]) -> nn.Sequential:
    """Build the head.

    Dropout follows the first three layers in training; what scores has nothing in its places, but
    its layers keep their published numbers 0, 2, 4, 6, 7.

    Args:
        what: Whose it is, for messages.
        width: Of the features that it scores.
        tensors: Its weights under their published names, ``layers.0.weight`` and so on.

    Returns:
        From features [b, width] to scores [b, 1], float32.

    Raises:
        RewardError: Names or shapes do not fit.
    """
    layers = nn.Sequential(
        *(nn.Linear(width, 1024), nn.Identity()),
        *(nn.Linear(1024, 128), nn.Identity()),
        *(nn.Linear(128, 64), nn.Identity()),
        *(nn.Linear(64, 16), nn.Linear(16, 1)),
    )
    head = nn.ModuleDict({"layers": layers})
    check_tensors(what, tensors, {n: t.shape for n, t in head.state_dict().items()})
    head.load_state_dict(dict(tensors))  # copies into float32 whatever they are stored in
    return layers
