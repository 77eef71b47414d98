"""State, rollouts and advantages to the next state: the training half of DDPO's algorithm 1.

Shapes: S samples, T denoising steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ddpo.config import DdpoIsConfig, Regression, RunConfig
from ddpo.errors import ConfigError, NonFiniteError
from ddpo.gradient import PolicyGradient, Rollouts
from ddpo.optimizer import copies, make_adamw, optimizer_state, take_step
from ddpo.policies import Policy
from ddpo.state import PromptStatistics, TrainState


@dataclass(frozen=True)
class RatioDeviation:
    """How far the importance ratio was from 1 before any update, at one timestep or over all.

    Attributes:
        mean: Mean of |rho - 1|.
        p99: Its 99th percentile.
        max: Its maximum.
    """

    mean: float
    p99: float
    max: float

    @classmethod
    def of(cls, new: Tensor, stored: Tensor) -> RatioDeviation:
        """Measure log-probs against the sampler's; NaN entries of ``new`` are left out."""
        deviation = (torch.exp(new - stored) - 1).abs().flatten().double()
        deviation = deviation[~torch.isnan(deviation)]
        return cls(float(deviation.mean()), float(deviation.quantile(0.99)), float(deviation.max()))


@dataclass(frozen=True)
class UpdateMetrics:
    """What an update measured. Names are the field's.

    Attributes:
        loss: Mean over the epoch's updates.
        approx_kl: Mean of (log p_new - log p_old)² / 2 (http://joschu.net/blog/kl-approx.html).
        clip_fraction: Share of pairs whose ratio left the clip range; 0 for DDPO-SF.
        ratio_mean: Mean importance ratio.
        ratio_min: Smallest importance ratio.
        ratio_max: Largest importance ratio.
        grad_norm: Mean over the updates of the gradient's norm before clipping.
        learning_rate: Of AdamW.
        recomputed_log_probs: Whether old log-probs were made anew in the update's own graph.
        initial_ratio_deviation: Of the stored log-probs, over all timesteps of the first update.
        initial_ratio_deviation_by_timestep: The same, a timestep each.
    """

    loss: float
    approx_kl: float
    clip_fraction: float
    ratio_mean: float
    ratio_min: float
    ratio_max: float
    grad_norm: float
    learning_rate: float
    recomputed_log_probs: bool
    initial_ratio_deviation: RatioDeviation
    initial_ratio_deviation_by_timestep: Mapping[int, RatioDeviation]

    def document(self) -> dict[str, Any]:
        """Return the metrics as JSON values."""
        document = asdict(self)
        name = "initial_ratio_deviation_by_timestep"
        document[name] = {str(timestep): found for timestep, found in document[name].items()}
        return document


def initial_state(policy: Policy) -> TrainState:
    """Return checkpoint 0: the policy as it was loaded."""
    return TrainState(copies(policy.weights.state()), {}, {}, epoch=0, updates=0, samples=0)


def update(
    policy: Policy,
    state: TrainState,
    rollouts: Rollouts,
    advantages: Tensor,
    statistics: PromptStatistics,
    config: RunConfig,
    *,
    on_progress: Callable[[float], None] = lambda share: None,
) -> tuple[TrainState, UpdateMetrics]:
    """Run one epoch's updates.

    Each update sees samples_per_epoch / updates_per_epoch consecutive samples, all their timesteps.
    (Prompts and noise are drawn independently, so any order is a random one.)

    Args:
        policy: Holds ``state.weights``; changed in place.
        state: Before the epoch.
        rollouts: Drawn by this very policy.
        advantages: [S].
        statistics: After this epoch's rewards.
        config: Sampler, algorithm, optimizer.
        on_progress: Called with the share that is done, in [0, 1].

    Returns:
        The state after the epoch, and what was measured.

    Raises:
        ConfigError: The algorithm is a regression.
        NonFiniteError: A loss, log-prob or gradient is NaN or infinite.
    """
    algorithm = config.algorithm
    if isinstance(algorithm, Regression):
        raise ConfigError(
            f"algorithm.type {algorithm.type} has no policy gradient; its update is "
            "ddpo.regression.regress"
        )
    gradient = PolicyGradient(policy, config.sampler, algorithm)
    adamw = make_adamw(gradient.parameters, config.optimizer, state.optimizer)
    old = _old_log_probs(gradient, rollouts, config)
    count = len(rollouts.prompts)
    pairs = count * len(gradient.trained_steps())
    done = 0

    def on_pairs(number: int) -> None:
        nonlocal done
        done += number
        on_progress(done / pairs)

    losses, norms, log_probs = [], [], []
    try:
        for samples in _samples_of_updates(rollouts, config):
            loss, new = gradient.accumulate(rollouts, advantages, samples, old, on_pairs)
            norms.append(take_step(adamw, gradient.parameters, config.optimizer))
            losses.append(loss)
            log_probs.append(new)
    except NonFiniteError:
        # Earlier updates of this epoch have already stepped.
        policy.weights.load(state.weights)
        raise
    first = log_probs[0]
    new = torch.stack(log_probs).nansum(0)[:, gradient.trained_steps()]
    metrics = _measure(config, new, old[:, gradient.trained_steps()])
    after = TrainState(
        weights=copies(policy.weights.state()),
        optimizer=copies(optimizer_state(adamw, gradient.parameters)),
        statistics=statistics,
        epoch=state.epoch + 1,
        updates=state.updates + len(losses),
        samples=state.samples + count,
    )
    return after, UpdateMetrics(
        loss=sum(losses) / len(losses),
        grad_norm=sum(norms) / len(norms),
        learning_rate=config.optimizer.learning_rate,
        recomputed_log_probs=old is not rollouts.log_probs,
        initial_ratio_deviation=RatioDeviation.of(first, rollouts.log_probs),
        initial_ratio_deviation_by_timestep={
            int(rollouts.timesteps[i]): RatioDeviation.of(first[:, i], rollouts.log_probs[:, i])
            for i in gradient.trained_steps()
        },
        **metrics,
    )


def _old_log_probs(gradient: PolicyGradient, rollouts: Rollouts, config: RunConfig) -> Tensor:
    """Return the ratio's denominator, [S, T]: the stored log-probs, or new ones of every sample.

    In float32 the stored ones are right to 5e-6. In 16 bits one sampler batch is computed again
    first: it tells whether the two graphs round alike, at a small part of the whole's cost.
    """
    algorithm = config.algorithm
    if not isinstance(algorithm, DdpoIsConfig) or algorithm.old_log_probs == "stored":
        return rollouts.log_probs
    if algorithm.old_log_probs == "auto":
        if not gradient.policy.numerics.low_precision:
            return rollouts.log_probs
        probe = range(min(gradient.policy.numerics.sample_batch_size, len(rollouts.prompts)))
        deviation = RatioDeviation.of(gradient.recompute(rollouts, probe), rollouts.log_probs)
        if deviation.p99 <= algorithm.clip_range / 10:
            return rollouts.log_probs
    # In the groups that the updates will see: another batch rounds differently.
    recomputed = [
        gradient.recompute(rollouts, samples) for samples in _samples_of_updates(rollouts, config)
    ]
    return torch.stack(recomputed).nansum(0)


def _samples_of_updates(rollouts: Rollouts, config: RunConfig) -> list[range]:
    count = len(rollouts.prompts)
    size = count // config.algorithm.updates_per_epoch
    return [range(start, start + size) for start in range(0, count, size)]


def _measure(config: RunConfig, new: Tensor, old: Tensor) -> dict[str, float]:
    difference = (new - old).double()
    ratio = difference.exp()
    clipped = 0.0
    if isinstance(config.algorithm, DdpoIsConfig):
        clipped = float(((ratio - 1).abs() > config.algorithm.clip_range).double().mean())
    return {
        "approx_kl": float((difference**2).mean() / 2),
        "clip_fraction": clipped,
        "ratio_mean": float(ratio.mean()),
        "ratio_min": float(ratio.min()),
        "ratio_max": float(ratio.max()),
    }
