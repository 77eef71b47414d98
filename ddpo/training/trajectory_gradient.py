"""Training on whole trajectories, in micro-batches of (sample, timestep) pairs.

Section 4.2 of DDPO (arXiv 2305.13301).

Shapes: S samples, T denoising steps, P = S·T (sample, timestep) pairs, N pairs of one micro-batch,
C latent channels, h x w latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpo.algorithms.policy_gradient import PairBatch, PolicyGradient
from ddpo.config import SamplerConfig
from ddpo.diffusion import Transition
from ddpo.diffusion.shared_rows import SharedRows, shared_rows
from ddpo.diffusion.window import markov_process_of, window_steps
from ddpo.errors import NonFiniteError
from ddpo.models import Policy
from ddpo.training.loss_scale import first_loss_scale
from ddpo.training.objective import factor_of, unscale
from ddpo.training.old_means import OldMeans
from ddpo.training.pairs import Pairs, micro_batches
from ddpo.training.ranks import Alone, Ranks
from ddpo.training.samples import Rollouts


@dataclass(frozen=True)
class Accumulated:
    """What one update's gradient was computed from."""

    loss: float
    """Mean over the update's pairs."""
    log_probs: Tensor
    """[S, T], under the policy being updated; NaN outside this update's pairs."""
    measured: Mapping[str, float]
    """What the algorithm measures, by name, means over the pairs."""
    predictions: int
    """How many different inputs the pairs have, each of which was predicted once."""


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
        conditioning = self.policy.encode(_prompts(rollouts, pairs))
        times, scale = self.process.times[steps], self.sampler.guidance_scale
        rows = self._rows(rollouts, pairs)
        output = rows.predict(self.policy, latents, times, conditioning, scale)
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
            return float(loss.detach()), len(self._rows(rollouts, pairs)), *measured

        batches = list(micro_batches(samples, steps, self.policy.numerics.micro_batch_size))
        values = self.ranks.add_up(self.parameters, batches, backward)
        unscale(self.parameters, factor)
        loss, predictions, *means = [sum(column) for column in zip(*values, strict=True)]
        measured = dict(zip(self.algorithm.measures, means, strict=True))
        return Accumulated(loss, self.ranks.merged(seen), measured, round(predictions))

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

    def _rows(self, rollouts: Rollouts, pairs: Pairs) -> SharedRows:
        latents = rollouts.latents_at(pairs.samples, pairs.steps)
        return shared_rows(_prompts(rollouts, pairs), pairs.steps, latents)

    def _next_latents(self, rollouts: Rollouts, pairs: Pairs) -> Tensor:
        return rollouts.latents_at(pairs.samples, pairs.steps + 1).to(self.policy.device)


def _prompts(rollouts: Rollouts, pairs: Pairs) -> list[str]:
    return [rollouts.prompts[int(row)] for row in pairs.samples]


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
