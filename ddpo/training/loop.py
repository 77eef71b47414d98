"""State, rollouts and advantages to the next state: the training half of DDPO's algorithm 1.

Shapes: S samples, T denoising steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpo.config import DdpoIsConfig, Regression, RunConfig
from ddpo.diffusion.window import sampler_of_epoch
from ddpo.errors import ConfigError, NonFiniteError
from ddpo.models import Policy
from ddpo.training.critic import ValueBaseline
from ddpo.training.ema import Ema
from ddpo.training.optimizer import copies, make_adamw, optimizer_state, take_step
from ddpo.training.pairs import PolicyGradient, Rollouts
from ddpo.training.state import PromptStatistics, TrainState


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
        ratio_p05: Its 5th percentile.
        ratio_p95: Its 95th percentile.
        ratio_min: Smallest importance ratio.
        ratio_max: Largest importance ratio.
        grad_norm: Mean over the updates of the gradient's norm before clipping.
        learning_rate: Of AdamW.
        kl_to_base: Mean KL divergence of a step from the base model's, over all pairs; None where
            ``algorithm.kl_weight`` is 0.
        value_loss: Mean squared error of the value function before its training; None where there
            is none.
        value_explained_variance: 1 - var(r - V) / var(r) of it, likewise.
        recomputed_log_probs: Whether old log-probs were made anew in the update's own graph.
        initial_ratio_deviation: Of the stored log-probs, over all timesteps of the first update.
        initial_ratio_deviation_by_timestep: The same, a timestep each.
    """

    loss: float
    approx_kl: float
    clip_fraction: float
    ratio_mean: float
    ratio_p05: float
    ratio_p95: float
    ratio_min: float
    ratio_max: float
    grad_norm: float
    learning_rate: float
    recomputed_log_probs: bool
    initial_ratio_deviation: RatioDeviation
    initial_ratio_deviation_by_timestep: Mapping[int, RatioDeviation]
    kl_to_base: float | None = None
    value_loss: float | None = None
    value_explained_variance: float | None = None

    def document(self) -> dict[str, Any]:
        """Return the metrics as JSON values; what was not measured is left out."""
        document = {name: value for name, value in asdict(self).items() if value is not None}
        name = "initial_ratio_deviation_by_timestep"
        document[name] = {str(timestep): found for timestep, found in document[name].items()}
        return document


def initial_state(policy: Policy, *, ema: bool = False) -> TrainState:
    """Return checkpoint 0: the policy as it was loaded.

    Args:
        policy: Just loaded.
        ema: Whether a moving average of the weights is kept; it starts at them.
    """
    weights = copies(policy.weights.state())
    average = dict(weights) if ema else {}
    return TrainState(weights, {}, {}, epoch=0, updates=0, samples=0, ema=average)


def update(
    policy: Policy,
    state: TrainState,
    rollouts: Rollouts,
    advantages: Tensor,
    statistics: PromptStatistics,
    config: RunConfig,
    *,
    scored: Tensor | None = None,
    on_progress: Callable[[float], None] = lambda share: None,
) -> tuple[TrainState, UpdateMetrics]:
    """Run one epoch's updates.

    Each update sees samples_per_epoch / updates_per_epoch consecutive samples, all their timesteps
    or those of the epoch's window.
    (Prompts and noise are drawn independently, so any order is a random one.)

    Args:
        policy: Holds ``state.weights``; changed in place.
        state: Before the epoch.
        rollouts: Drawn by this very policy.
        advantages: [S]; with a value function the normalised rewards, which it is subtracted from.
        statistics: After this epoch's rewards.
        config: Sampler, algorithm, optimizer.
        scored: [S] bool, samples with a reward of their own; by default all. A value function
            learns of these, and gives the others advantage 0.
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
            "ddpo.training.denoising.regress"
        )
    sampler = sampler_of_epoch(policy, config, state.epoch)
    gradient = PolicyGradient(policy, sampler, algorithm)
    ema = Ema.of(policy, state, config.optimizer)
    adamw = make_adamw(gradient.parameters, config.optimizer, state.optimizer)
    old = _old_log_probs(gradient, rollouts, config, state.epoch)
    count = len(rollouts.prompts)
    rewards = advantages
    scored = torch.ones(count, dtype=torch.bool) if scored is None else scored
    baseline = ValueBaseline.of(policy, state, rollouts, config)
    if baseline is not None:
        advantages = baseline.advantages(rewards, scored)
    pairs = count * len(gradient.trained_steps())
    done = 0

    def on_pairs(number: int) -> None:
        nonlocal done
        done += number
        on_progress(done / pairs)

    norms, passes = [], []
    try:
        for samples in _samples_of_updates(rollouts, config):
            passes.append(gradient.accumulate(rollouts, advantages, samples, old, on_pairs))
            norms.append(take_step(adamw, gradient.parameters, config.optimizer))
            if ema is not None:
                ema.follow(policy.weights.state())
        learnt = None if baseline is None else baseline.learn(rewards, scored)
    except NonFiniteError:
        # Earlier updates of this epoch have already stepped.
        policy.weights.load(state.weights)
        raise
    first = passes[0].log_probs
    new = torch.stack([done.log_probs for done in passes]).nansum(0)[:, gradient.trained_steps()]
    metrics = _measure(config, new, old[:, gradient.trained_steps()])
    after = TrainState(
        weights=copies(policy.weights.state()),
        optimizer=copies(optimizer_state(adamw, gradient.parameters)),
        statistics=statistics,
        epoch=state.epoch + 1,
        updates=state.updates + len(passes),
        samples=state.samples + count,
        ema={} if ema is None else copies(ema.average),
        value={} if baseline is None else baseline.state(),
    )
    return after, UpdateMetrics(
        loss=sum(done.loss for done in passes) / len(passes),
        grad_norm=sum(norms) / len(norms),
        learning_rate=config.optimizer.learning_rate,
        recomputed_log_probs=old is not rollouts.log_probs,
        initial_ratio_deviation=RatioDeviation.of(first, rollouts.log_probs),
        initial_ratio_deviation_by_timestep={
            int(rollouts.timesteps[i]): RatioDeviation.of(first[:, i], rollouts.log_probs[:, i])
            for i in gradient.trained_steps()
        },
        kl_to_base=_mean([done.kl_to_base for done in passes]),
        value_loss=learnt and learnt.loss,
        value_explained_variance=learnt and learnt.explained_variance,
        **metrics,
    )


def _old_log_probs(
    gradient: PolicyGradient, rollouts: Rollouts, config: RunConfig, epoch: int
) -> Tensor:
    """Return the ratio's denominator, [S, T]: the stored log-probs, or new ones of every sample.

    In float32 the stored ones are right to 5e-6. In 16 bits one sampler batch is computed again
    first: it tells whether the two graphs round alike, at a small part of the whole's cost.
    """
    algorithm = config.algorithm
    if not isinstance(algorithm, DdpoIsConfig) or algorithm.old_log_probs == "stored":
        return rollouts.log_probs
    fork = config.fork
    if fork is not None and fork.off_policy and fork.adopts(epoch):
        return rollouts.log_probs  # another policy's: this one cannot say what they were
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


def _mean(values: list[float | None]) -> float | None:
    measured = [value for value in values if value is not None]
    return sum(measured) / len(measured) if measured else None


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
        "ratio_p05": float(np.quantile(ratio.cpu().numpy(), 0.05)),
        "ratio_p95": float(np.quantile(ratio.cpu().numpy(), 0.95)),
        "ratio_min": float(ratio.min()),
        "ratio_max": float(ratio.max()),
    }
