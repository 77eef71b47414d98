"""The leave-one-out baseline of REINFORCE (Kool, van Hoof, Welling 2019).

A sample's baseline is the mean of the others', so it does not depend on the sample itself, which
leaves the policy gradient unbiased.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def leave_one_out(
    prompts: Sequence[str], rewards: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the mean reward of each sample's others.

    The others are the scored samples of the same prompt; where there are none, those of the batch;
    where it is the only one that was scored, its own reward, so that its advantage is 0.

    Args:
        prompts: N texts.
        rewards: [N]; NaN where scoring failed. At least one is there.

    Returns:
        The means [N], and of how many rewards each was taken [N].
    """
    names = np.asarray(prompts)
    scored = np.isfinite(rewards)
    mean = np.empty(len(rewards))
    count = np.empty(len(rewards), dtype=np.int64)
    for prompt in dict.fromkeys(prompts):
        own = names == prompt
        for row in np.flatnonzero(own):
            # Taken anew for each: the sum less the own reward would lose digits.
            others = own & scored
            others[row] = False
            if not others.any():
                others = scored.copy()
                others[row] = False
            count[row] = others.sum()
            mean[row] = rewards[others if others.any() else scored].mean()
    return mean, count
