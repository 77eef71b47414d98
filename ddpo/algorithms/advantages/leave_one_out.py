"""The leave-one-out baseline of REINFORCE (Kool, van Hoof, Welling 2019).

A sample's baseline is the mean of the other samples, so it does not depend on the sample itself,
which leaves the policy gradient unbiased.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ddpo.algorithms.advantages.base import Advantages, Moments, batch_moments
from ddpo.algorithms.base import PromptStatistics, Scored


class LeaveOneOutAdvantages(Advantages):
    """Advantage = (reward - mean of the prompt's other samples in this epoch) / std of the batch.

    Remembers nothing, and needs several samples per prompt in an epoch, as few prompts, many
    samples or `rollouts.samples_per_prompt` give. A prompt with a single sample takes the mean of
    all other samples of the epoch.
    """

    type: Literal["leave_one_out"]

    def moments(
        self, scored: Scored, statistics: PromptStatistics
    ) -> tuple[Moments, PromptStatistics]:
        """Return the mean of each sample's others, and the deviation of the batch.

        The deviation is the batch's: one of a prompt's few rewards would be mostly chance.
        """
        mean, count = leave_one_out(scored.prompts, scored.rewards)
        return Moments(mean, batch_moments(scored.rewards).std, count), statistics


def leave_one_out(
    prompts: Sequence[str], rewards: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return the mean reward of each sample's others.

    The others are the scored samples of the same prompt; failing these, those of the batch; and
    where a sample is the only scored one, its own reward, so that its advantage is 0.

    Args:
        prompts: S prompts.
        rewards: [S]; NaN where scoring failed, at least one finite.

    Returns:
        The means [S], and the number of rewards behind each [S].
    """
    names = np.asarray(prompts)
    scored = np.isfinite(rewards)
    mean = np.empty(len(rewards))
    count = np.empty(len(rewards), dtype=np.int64)
    for prompt in dict.fromkeys(prompts):
        rows = names == prompt
        for row in np.flatnonzero(rows):
            # Computed afresh for each sample: subtracting one reward from a sum loses digits.
            others = rows & scored
            others[row] = False
            if not others.any():
                others = scored.copy()
                others[row] = False
            count[row] = others.sum()
            mean[row] = rewards[others if others.any() else scored].mean()
    return mean, count
