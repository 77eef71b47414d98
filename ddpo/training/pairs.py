"""The policy gradient over micro-batches of (sample, timestep) pairs (arXiv 2305.13301, 4.2).

Shapes: S samples, T denoising steps, P = S·T (sample, timestep) pairs, N pairs of one micro-batch,
C latent channels, h x w latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ddpo.algorithms.ddpo_is import ddpo_is_loss
from ddpo.algorithms.ddpo_sf import ddpo_sf_loss
from ddpo.algorithms.kl import gaussian_kl
from ddpo.config import DdpoIsConfig, DdpoSfConfig, SamplerConfig
from ddpo.diffusion.ddim import Transition, ddim_transition
from ddpo.diffusion.window import noise_schedule, window_steps
from ddpo.errors import NonFiniteError
from ddpo.models import Policy
from ddpo.models.numerics import Numerics

# float16's smallest normal number is 6e-5. The mean over thousands of pairs would put gradients
# inside the UNet below it: they are computed of the sum, times this, and scaled down once gathered.
_FLOAT16_LOSS_SCALE = 1024.0


def float16_loss_scale(numerics: Numerics) -> float:
    """Return what a summed loss is multiplied by before its backward; 1 where nothing is lost."""
    return _FLOAT16_LOSS_SCALE if numerics.dtype == "float16" else 1.0


def unscale(parameters: Mapping[str, torch.nn.Parameter], scale: float) -> None:
    """Divide the gathered gradients by the scale of the losses that they are of, in place."""
    if scale == 1.0:
        return
    for parameter in parameters.values():
        if parameter.grad is not None:
            parameter.grad /= scale


@dataclass(frozen=True)
class Rollouts:
    """The samples of one epoch, in the order of ``sample_id``.

    Attributes:
        prompts: S texts.
        latents: [S, T+1, C, h, w] float32, from noise to clean.
        log_probs: [S, T] float32, of the policy that sampled.
        timesteps: [T] int64.
    """

    prompts: Sequence[str]
    latents: Tensor
    log_probs: Tensor
    timesteps: Tensor


@dataclass(frozen=True)
class Pairs:
    """One micro-batch of (sample, timestep) pairs, as indices into rollouts.

    Attributes:
        samples: [N] int64, rows of the rollouts.
        steps: [N] int64, columns: 0 is the noisiest.
    """

    samples: Tensor
    steps: Tensor


@dataclass(frozen=True)
class Accumulated:
    """What one update's gradient was computed of.

    Attributes:
        loss: Mean over the update's pairs.
        log_probs: [S, T], the new ones; NaN outside this update's pairs.
        kl_to_base: Mean KL divergence from the base model over the pairs; None where it has no
            weight in the loss.
    """

    loss: float
    log_probs: Tensor
    kl_to_base: float | None


def micro_batches(samples: Sequence[int], steps: Sequence[int], size: int) -> Iterator[Pairs]:
    """Cut the pairs of one update into micro-batches, timestep by timestep.

    With ``size`` equal to the sampler's batch, each micro-batch repeats a forward of the sampler's.

    Args:
        samples: Rows of the rollouts.
        steps: Columns with a log-prob.
        size: Pairs a micro-batch; the last may be smaller.

    Yields:
        Micro-batches that cover every pair once.
    """
    pairs = torch.cartesian_prod(torch.tensor(steps), torch.tensor(samples)).view(-1, 2)
    for chunk in pairs.split(size):
        yield Pairs(samples=chunk[:, 1], steps=chunk[:, 0])


class PolicyGradient:
    """Log-probs and gradients of a policy on rollouts.

    Args:
        policy: Whose weights are updated, in place.
        sampler: As in sampling: guidance is part of the policy. Of a window the steps are trained.
        algorithm: The loss.
    """

    def __init__(
        self,
        policy: Policy,
        sampler: SamplerConfig,
        algorithm: DdpoIsConfig | DdpoSfConfig,
    ) -> None:
        self.policy = policy
        self.sampler = sampler
        self.algorithm = algorithm
        self.schedule = noise_schedule(policy, sampler)
        self.parameters = policy.weights.parameters()
        self.loss_scale = float16_loss_scale(policy.numerics)

    def transition(self, rollouts: Rollouts, pairs: Pairs) -> Transition:
        """Compute the distribution of each pair's next latent under the policy as it is now.

        Args:
            rollouts: Where the latents are.
            pairs: N pairs.

        Returns:
            N Gaussians, with a gradient where gradients are on.
        """
        device = self.policy.device
        latents = rollouts.latents[pairs.samples, pairs.steps].to(device)
        timesteps = rollouts.timesteps[pairs.steps].to(device)
        embeddings = self.policy.embed([rollouts.prompts[int(row)] for row in pairs.samples])
        output = self.policy.predict(latents, timesteps, embeddings, self.sampler.guidance_scale)
        return ddim_transition(self.schedule, output, latents, timesteps)

    def log_probs(self, rollouts: Rollouts, pairs: Pairs) -> Tensor:
        """Compute the log-prob of each pair's own next latent under the policy as it is now.

        Args:
            rollouts: Where the latents are.
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
    ) -> Accumulated:
        """Add the gradient of one update's loss to the parameters, micro-batch by micro-batch.

        The loss is the mean over all pairs of the update, so any micro-batch size gives the same
        gradient.

        Args:
            rollouts: All samples of the epoch.
            advantages: [S], or [S, T] where a sample's differ from step to step.
            samples: Rows that this update sees.
            old: [S, T], the log-probs in the ratio's denominator.
            on_pairs: Called with the number of pairs that were just done.

        Returns:
            The loss and what it was made of.

        Raises:
            NonFiniteError: A log-prob or loss is NaN or infinite.
        """
        steps = self.trained_steps()
        count = len(samples) * len(steps)
        scale = self.loss_scale * count if self.loss_scale != 1.0 else 1.0
        advantages = advantages.reshape(len(advantages), -1).expand_as(rollouts.log_probs)
        seen = torch.full_like(rollouts.log_probs, torch.nan)
        total, total_kl = 0.0, 0.0
        for pairs in micro_batches(samples, steps, self.policy.numerics.micro_batch_size):
            # Before the policy's own: switching an adapter off and on must not meet its graph.
            base = self._base_transition(rollouts, pairs) if self.algorithm.kl_weight else None
            transition = self.transition(rollouts, pairs)
            log_probs = transition.log_prob(self._next_latents(rollouts, pairs))
            losses = self._losses(
                log_probs,
                old[pairs.samples, pairs.steps].to(log_probs.device),
                advantages[pairs.samples, pairs.steps].to(log_probs.device, log_probs.dtype),
            )
            if base is not None:
                kl = gaussian_kl(transition.mean, base.mean, transition.std)
                losses = losses + self.algorithm.kl_weight * kl
                total_kl += float(kl.detach().sum()) / count
            _check_finite(rollouts, pairs, log_probs, losses)
            loss = losses.sum() / count
            (loss * scale).backward()
            total += float(loss.detach())
            seen[pairs.samples, pairs.steps] = log_probs.detach().to(seen)
            on_pairs(len(pairs.samples))
        unscale(self.parameters, scale)
        return Accumulated(total, seen, total_kl if self.algorithm.kl_weight else None)

    @torch.no_grad()
    def recompute(self, rollouts: Rollouts, samples: Sequence[int]) -> Tensor:
        """Compute the log-probs of whole trajectories as the update's own forwards give them.

        Args:
            rollouts: All samples of the epoch.
            samples: Rows to compute.

        Returns:
            [S, T] on the CPU; NaN outside the rows and where a step is deterministic.
        """
        result = torch.full_like(rollouts.log_probs, torch.nan)
        size = self.policy.numerics.micro_batch_size
        for pairs in micro_batches(samples, self.trained_steps(), size):
            result[pairs.samples, pairs.steps] = self.log_probs(rollouts, pairs).to(result)
        return result

    def trained_steps(self) -> list[int]:
        """Return the columns of a trajectory that are trained, noisiest first.

        They have a log-prob, and are in the window where there is one.
        """
        stochastic = self.schedule.stochastic().tolist()
        return [step for step in window_steps(self.sampler) if stochastic[step]]

    @torch.no_grad()
    def _base_transition(self, rollouts: Rollouts, pairs: Pairs) -> Transition:
        """Return the same under the base model: the same guidance, the adapter switched off."""
        with self.policy.weights.switched_off():
            return self.transition(rollouts, pairs)

    def _next_latents(self, rollouts: Rollouts, pairs: Pairs) -> Tensor:
        return rollouts.latents[pairs.samples, pairs.steps + 1].to(self.policy.device)

    def _losses(self, log_probs: Tensor, old: Tensor, advantages: Tensor) -> Tensor:
        if isinstance(self.algorithm, DdpoIsConfig):
            return ddpo_is_loss(log_probs, old, advantages, clip_range=self.algorithm.clip_range)
        return ddpo_sf_loss(log_probs, advantages)


def _check_finite(rollouts: Rollouts, pairs: Pairs, log_probs: Tensor, losses: Tensor) -> None:
    bad = ~(torch.isfinite(log_probs) & torch.isfinite(losses))
    if bad.any():
        first = int(bad.nonzero()[0])
        row, step = int(pairs.samples[first]), int(pairs.steps[first])
        raise NonFiniteError(
            f"log-prob {float(log_probs.detach()[first])}, loss {float(losses.detach()[first])} "
            f"for sample {row} (prompt {rollouts.prompts[row]!r}) at timestep "
            f"{int(rollouts.timesteps[step])} (step {step}); the weights were left as they "
            "were. Lower optimizer.learning_rate, or use numerics.dtype float32 or bfloat16."
        )
