"""Training on whole trajectories, in micro-batches of (sample, timestep) pairs.

Section 4.2 of DDPO (arXiv 2305.13301).

Shapes: S samples, T denoising steps, P = S·T (sample, timestep) pairs, N pairs of one micro-batch,
C latent channels, h x w latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ddpo.algorithms.base import Update
from ddpo.algorithms.policy_gradient import PairBatch, PolicyGradient
from ddpo.config import RunConfig, SamplerConfig
from ddpo.diffusion import Transition
from ddpo.diffusion.window import markov_process_of, sampler_of_epoch, window_steps
from ddpo.errors import ConfigError, NonFiniteError
from ddpo.models import Policy
from ddpo.training.critic import Critic
from ddpo.training.loss_scale import LossScale, first_loss_scale
from ddpo.training.objective import Objective, factor_of, unscale
from ddpo.training.old_means import OldMeans
from ddpo.training.pairs import Pairs, micro_batches
from ddpo.training.ranks import Alone, Ranks
from ddpo.training.ratios import RatioDeviation, ratio_metrics
from ddpo.training.samples import Rollouts, Samples
from ddpo.training.state import TrainState


@dataclass(frozen=True)
class Accumulated:
    """What one update's gradient was computed from."""

    loss: float
    """Mean over the update's pairs."""
    log_probs: Tensor
    """[S, T], under the policy being updated; NaN outside this update's pairs."""
    measured: Mapping[str, float]
    """What the algorithm measures, by name, means over the pairs."""


class TrajectoryGradient:
    """Log-probs and gradients of a policy on rollouts.

    Args:
        policy: Its weights are updated in place.
        sampler: As in sampling, since guidance is part of the policy; a window's steps are trained.
        algorithm: Gives the loss.
        ranks: The processes that share the micro-batches.
    """

    def __init__(
        self,
        policy: Policy,
        sampler: SamplerConfig,
        algorithm: PolicyGradient,
        ranks: Ranks | None = None,
    ) -> None:
        self.policy = policy
        self.sampler = sampler
        self.algorithm = algorithm
        self.ranks = ranks or Alone()
        self.process = markov_process_of(policy, sampler)
        self.parameters = policy.weights.parameters()
        self.loss_scale = first_loss_scale(policy.numerics)

    def transition(self, rollouts: Rollouts, pairs: Pairs) -> Transition:
        """Compute the distribution of each pair's next latents under the current policy.

        Args:
            rollouts: The pairs' trajectories.
            pairs: N pairs.

        Returns:
            N Gaussians, with a gradient where gradients are on.
        """
        device = self.policy.device
        latents = rollouts.latents_at(pairs.samples, pairs.steps).to(device)
        steps = pairs.steps.to(device)
        conditioning = self.policy.encode([rollouts.prompts[int(row)] for row in pairs.samples])
        times = self.process.times[steps]
        output = self.policy.predict(latents, times, conditioning, self.sampler.guidance_scale)
        return self.process.transition(steps, output, latents)

    def log_probs(self, rollouts: Rollouts, pairs: Pairs) -> Tensor:
        """Compute the log-prob of each pair's stored next latents under the current policy.

        Args:
            rollouts: The pairs' trajectories.
            pairs: N pairs.

        Returns:
            [N], with a gradient where gradients are on.
        """
        return self.transition(rollouts, pairs).log_prob(self._next_latents(rollouts, pairs))

    def accumulate(
        self,
        rollouts: Rollouts,
        advantages: Tensor,
        samples: Sequence[int],
        old: Tensor,
        on_pairs: Callable[[int], None] = lambda count: None,
        *,
        old_means: OldMeans | None = None,
    ) -> Accumulated:
        """Add the gradient of one update's loss to the parameters, micro-batch by micro-batch.

        The loss is the mean over all pairs of the update, so any micro-batch size gives the same
        gradient.

        Args:
            rollouts: All samples of the epoch.
            advantages: [S], or [S, T] where a sample's differ from step to step.
            samples: Rows that this update sees.
            old: [S, T], the log-probs in the ratio's denominator.
            on_pairs: Called with the number of pairs just processed.
            old_means: The means under the policy that sampled, if the algorithm needs them.

        Returns:
            The loss and what it was computed from.

        Raises:
            NonFiniteError: A log-prob or loss is NaN or infinite.
        """
        steps = self.trained_steps()
        count = len(samples) * len(steps)
        factor = factor_of(self.loss_scale, count)
        advantages = advantages.reshape(len(advantages), -1).expand_as(rollouts.log_probs)
        seen = torch.full_like(rollouts.log_probs, torch.nan)
        with_base = "base" in self.algorithm.needs.policies
        weights = self._step_weights(steps)

        def backward(pairs: Pairs) -> tuple[float, ...]:
            # Before the policy's own: switching an adapter off and on must not meet its graph.
            base = self._base_transition(rollouts, pairs) if with_base else None
            current = self.transition(rollouts, pairs)
            log_probs = current.log_prob(self._next_latents(rollouts, pairs))
            batch = PairBatch(
                log_probs,
                old[pairs.samples, pairs.steps].to(log_probs.device),
                advantages[pairs.samples, pairs.steps].to(log_probs.device, log_probs.dtype),
                current,
                base,
                old_means and old_means.of(pairs).to(log_probs.device),
                None if weights is None else weights[pairs.steps.to(weights.device)],
            )
            losses = self.algorithm.losses(batch)
            measured = [float(each.sum()) / count for each in self.algorithm.measured(batch)]
            _check_finite(rollouts, pairs, self, log_probs, losses)
            loss = losses.sum() / count
            (loss * factor).backward()
            seen[pairs.samples, pairs.steps] = log_probs.detach().to(seen)
            on_pairs(len(pairs.samples))
            return float(loss.detach()), *measured

        batches = list(micro_batches(samples, steps, self.policy.numerics.micro_batch_size))
        values = self.ranks.add_up(self.parameters, batches, backward)
        unscale(self.parameters, factor)
        sums = [sum(column) for column in zip(*values, strict=True)]
        measured = dict(zip(self.algorithm.measures, sums[1:], strict=True))
        return Accumulated(sums[0], self.ranks.merged(seen), measured)

    @torch.no_grad()
    def recompute(
        self, rollouts: Rollouts, samples: Sequence[int], means: OldMeans | None = None
    ) -> Tensor:
        """Compute the log-probs of whole trajectories in the update's own forwards.

        Args:
            rollouts: All samples of the epoch.
            samples: Rows to compute.
            means: Where the steps' means are put as well, if they are needed.

        Returns:
            [S, T] on the CPU; NaN outside the rows and where a step is deterministic.
        """
        result = torch.full_like(rollouts.log_probs, torch.nan)
        for pairs in self.mine(samples):
            step = self.transition(rollouts, pairs)
            log_probs = step.log_prob(self._next_latents(rollouts, pairs))
            result[pairs.samples, pairs.steps] = log_probs.to(result)
            if means is not None:
                means.put(pairs, step.mean)
        return self.ranks.merged(result)

    def mine(self, samples: Sequence[int]) -> Sequence[Pairs]:
        """Return the micro-batches of some samples that this rank computes."""
        size = self.policy.numerics.micro_batch_size
        return self.ranks.mine(list(micro_batches(samples, self.trained_steps(), size)))

    def trained_steps(self) -> list[int]:
        """Return the trained columns of a trajectory, noisiest first.

        These have a log-prob and are inside the window, if there is one.
        """
        stochastic = self.process.stochastic().tolist()
        return [step for step in window_steps(self.sampler) if stochastic[step]]

    def _step_weights(self, steps: Sequence[int]) -> Tensor | None:
        """Return what the losses of the trained steps are weighed by, [T]; None for 1."""
        weights = self.algorithm.step_weights(self.process.scales(steps))
        if weights is None:
            return None
        whole = torch.full_like(self.process.times, torch.nan)
        whole[list(steps)] = weights
        return whole

    @torch.no_grad()
    def _base_transition(self, rollouts: Rollouts, pairs: Pairs) -> Transition:
        """Return the same under the base model: the same guidance, the adapter switched off."""
        with self.policy.weights.use("base"):
            return self.transition(rollouts, pairs)

    def _next_latents(self, rollouts: Rollouts, pairs: Pairs) -> Tensor:
        return rollouts.latents_at(pairs.samples, pairs.steps + 1).to(self.policy.device)


class TrajectoryObjective(Objective):
    """The loss of a policy gradient on one epoch's trajectories.

    Args:
        policy: Its weights are updated in place.
        state: Before the epoch.
        samples: Sampled by this very policy, unless the epoch is a fork's off-policy one.
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
        fork = config.fork
        off_policy = fork is not None and fork.off_policy and fork.inherits(state.epoch)
        self.rows = sorted(row for each in updates for row in each.samples)
        self._recomputed = 0
        self.old_means = self._empty_means(updates) if self.algorithm.needs.old_means else None
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

    def forwards(self, items: int) -> int:
        """Return those of the policy, of each other weight set, and of recomputed log-probs."""
        predictions = items * (1 + len(self.algorithm.needs.policies)) + self._recomputed
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
            "recomputed_log_probs": self.old is not rollouts.log_probs,
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
            self._recomputed += len(probe) * len(self.steps)
            deviation = RatioDeviation.of(self.gradient.recompute(self.rollouts, probe), stored)
            if deviation.p99 <= limit:
                return stored
        self._recomputed += len(self.rows) * len(self.steps)
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


def _check_finite(
    rollouts: Rollouts,
    pairs: Pairs,
    gradient: TrajectoryGradient,
    log_probs: Tensor,
    losses: Tensor,
) -> None:
    good = torch.isfinite(log_probs) & torch.isfinite(losses)
    if not good.all():
        first = int((~good).nonzero()[0])
        row, step = int(pairs.samples[first]), int(pairs.steps[first])
        raise NonFiniteError(
            f"log-prob {float(log_probs.detach()[first])}, loss {float(losses.detach()[first])} "
            f"for sample {row} (prompt {rollouts.prompts[row]!r}) at step {step} "
            f"(time {float(gradient.process.times[step]):g}); the weights were left as they were. "
            f"{gradient.policy.numerics.advice}"
        )
