"""Training on whole trajectories: the updates of DDPO (arXiv 2305.13301, section 4.2).

Shapes: S samples, T denoising steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, cast

import torch
from torch import Tensor

from ddpo.algorithms.base import Update
from ddpo.algorithms.policy_gradient import PolicyGradient
from ddpo.config import RunConfig
from ddpo.diffusion.window import sampler_of_epoch
from ddpo.errors import ConfigError
from ddpo.models import Policy
from ddpo.training.critic import Critic
from ddpo.training.loss_scale import LossScale
from ddpo.training.objective import Objective
from ddpo.training.old_means import OldMeans
from ddpo.training.ranks import Ranks
from ddpo.training.ratios import RatioDeviation, ratio_metrics
from ddpo.training.samples import Rollouts, Samples
from ddpo.training.state import TrainState
from ddpo.training.trajectory_gradient import Accumulated, TrajectoryGradient


class TrajectoryObjective(Objective):
    """The loss of a policy gradient on one epoch's trajectories.

    Args:
        policy: Its weights are updated in place.
        state: Before the epoch.
        samples: Sampled by this very policy, unless the epoch is an off-policy one.
        credit: The epoch's credit table: ``reward`` (NaN where scoring failed) and ``advantage``,
            [S] each. With a value function, ``advantage`` is the normalised reward.
        updates: The epoch's updates.
        config: Sampler, algorithm, seed.
        ranks: The processes that share the micro-batches.

    Raises:
        ConfigError: The samples are final latents alone.
    """

    def __init__(
        self,
        policy: Policy,
        state: TrainState,
        samples: Samples,
        credit: Mapping[str, Tensor],
        updates: Sequence[Update],
        config: RunConfig,
        ranks: Ranks,
    ) -> None:
        if not isinstance(samples, Rollouts):
            raise ConfigError(
                f"{config.algorithm.type} trains on every step of a trajectory, and these samples "
                "are final latents alone; sample with rollouts.store_trajectories: full"
            )
        # The registry of objectives: what needs trajectories is a policy gradient.
        self.algorithm = cast(PolicyGradient, config.algorithm)
        self.rollouts = samples
        sampler = sampler_of_epoch(policy, config, state.epoch)
        self.gradient = TrajectoryGradient(policy, sampler, self.algorithm, ranks)
        self.steps = self.gradient.trained_steps()
        self.items_per_sample = len(self.steps)
        self.rows = sorted(row for each in updates for row in each.samples)
        self._probed = 0
        self.old_means = self._empty_means(updates) if self.algorithm.needs.old_means else None
        off_policy = config.is_off_policy(state.epoch)
        self.old = samples.log_probs if off_policy else self._old_log_probs(updates)
        self.rewards, self.scored = credit["advantage"], torch.isfinite(credit["reward"])
        critic = self.algorithm.advantages.critic
        self.critic = critic and Critic(
            policy,
            self.gradient.process,
            samples.prompts,
            state.value,
            critic,
            seed=config.seed,
        )
        self.advantages = credit["advantage"]
        if self.critic is not None:
            self.advantages = self.critic.advantages(self.rewards, self.scored)
        self._done: list[Accumulated] = []
        self._learned: dict[str, float | None] = {}

    def accumulate(
        self, update: Update, scale: LossScale | None, on_items: Callable[[int], None]
    ) -> float:
        """Add the gradient of one update's loss to the policy's parameters."""
        self.gradient.loss_scale = scale
        self._done.append(
            self.gradient.accumulate(
                self.rollouts,
                self.advantages,
                update.samples,
                self.old,
                on_items,
                old_means=self.old_means,
            )
        )
        return self._done[-1].loss

    def finish(self) -> None:
        """Train the value function, if there is one."""
        if self.critic is not None:
            self._learned = self.critic.learn(self.rewards, self.scored)

    def forwards(self) -> int:
        """Return those of the policy, of each other weight set, and of recomputed log-probs."""
        sets = 1 + len(self.algorithm.needs.policies) + self._recomputed
        predictions = sets * sum(done.predictions for done in self._done) + self._probed
        policy, sampler = self.gradient.policy, self.gradient.sampler
        return predictions * policy.forwards(sampler.guidance_scale)

    def metrics(self) -> dict[str, Any]:
        """Return importance ratios, their deviation before any update, and optional measurements.

        What the algorithm measures is a mean over the updates; ``value_loss`` and
        ``value_explained_variance`` are there with a value function only.
        """
        rollouts, times = self.rollouts, self.gradient.process.times
        first = self._done[0].log_probs
        new = torch.stack([done.log_probs for done in self._done]).nansum(0)
        ratio, metrics = ratio_metrics(
            *(each[self.rows][:, self.steps] for each in (new, self.old))
        )
        measured = {
            name: sum(done.measured[name] for done in self._done) / len(self._done)
            for name in self.algorithm.measures
        }
        return {
            **metrics,
            **self.algorithm.ratio_metrics(ratio),
            "recomputed_log_probs": self._recomputed,
            "initial_ratio_deviation": asdict(RatioDeviation.of(first, rollouts.log_probs)),
            "initial_ratio_deviation_by_timestep": {
                f"{float(times[i]):g}": asdict(
                    RatioDeviation.of(first[:, i], rollouts.log_probs[:, i])
                )
                for i in self.steps
            },
            **measured,
            **{name: value for name, value in self._learned.items() if value is not None},
        }

    def state(self) -> dict[str, Tensor]:
        """Return the value function and its optimizer, if there is one."""
        return self.critic.state() if self.critic is not None else {}

    @property
    def _recomputed(self) -> bool:
        return self.old is not self.rollouts.log_probs

    def _old_log_probs(self, updates: Sequence[Update]) -> Tensor:
        """Return the ratio's denominator, [S, T]: stored log-probs, or recomputed ones.

        In float32 on a CPU the stored ones are accurate to 5e-6. Anywhere else, and in 16 bits, one
        sampler batch is recomputed first: it shows whether the two graphs round alike, at a
        fraction of the cost of all.
        """
        stored, limit = self.rollouts.log_probs, self.algorithm.tolerated_deviation
        policy = self.gradient.policy
        if limit == float("inf") or (limit > 0 and policy.numerics.exact):
            return stored
        if probe := probe_rows(policy, self.algorithm, len(self.rollouts.prompts)):
            self._probed = len(probe) * len(self.steps)  # at most, if some start alike
            deviation = RatioDeviation.of(self.gradient.recompute(self.rollouts, probe), stored)
            if deviation.p99 <= limit:
                return stored
        # In the groups that the updates will see: another batch rounds differently.
        recomputed = [
            self.gradient.recompute(self.rollouts, each.samples, self.old_means) for each in updates
        ]
        return torch.stack(recomputed).nansum(0)

    def _empty_means(self, updates: Sequence[Update]) -> OldMeans:
        pairs = [pairs for each in updates for pairs in self.gradient.mine(each.samples)]
        return OldMeans(pairs, self.rollouts.log_probs.shape)


def probe_rows(policy: Policy, algorithm: PolicyGradient, samples: int) -> range:
    """Return the rows that show whether stored log-probs are accurate enough; none if it is known.

    Args:
        policy: The policy that is trained.
        algorithm: Says what is accurate enough.
        samples: Number of samples of the epoch.
    """
    known = algorithm.tolerated_deviation in (0.0, float("inf")) or policy.numerics.exact
    return range(0 if known else min(policy.numerics.sample_batch_size, samples))
