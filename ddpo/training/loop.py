"""The training loop: optimizer, moving average, rollback, progress and metrics of one epoch.

It knows nothing of the algorithm: an :class:`~ddpo.training.objective.Objective` computes the
gradients, and the algorithm says which samples each optimizer step sees.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from ddpo.algorithms.base import Algorithm, Data, PromptStatistics
from ddpo.config import RunConfig
from ddpo.diffusion.shared_rows import sampling_forwards
from ddpo.errors import NonFiniteError
from ddpo.models import Policy
from ddpo.training.denoising import DenoisingObjective
from ddpo.training.ema import Ema
from ddpo.training.loss_scale import LossScale, first_loss_scale
from ddpo.training.optimizer import copies, make_adamw, optimizer_state, take_step
from ddpo.training.ranks import Alone, Ranks
from ddpo.training.samples import Samples
from ddpo.training.state import TrainState
from ddpo.training.trajectories import TrajectoryObjective

OBJECTIVES: Mapping[Data, type[TrajectoryObjective | DenoisingObjective]] = {
    "trajectories": TrajectoryObjective,
    "final_latents": DenoisingObjective,
}
"""The objective of what an algorithm trains on."""


def initial_state(policy: Policy, *, ema: bool = False, old: bool = False) -> TrainState:
    """Return checkpoint 0: the policy as it was loaded.

    Args:
        policy: Just loaded.
        ema: Whether a moving average of the weights is kept; it starts at them.
        old: Whether old weights are kept; they start as them.
    """
    weights = copies(policy.weights.state())
    return TrainState(
        weights,
        {},
        {},
        epoch=0,
        updates=0,
        samples=0,
        ema=dict(weights) if ema else {},
        old=dict(weights) if old else {},
    )


def update(
    policy: Policy,
    state: TrainState,
    samples: Samples,
    credit: Mapping[str, Tensor],
    statistics: PromptStatistics,
    config: RunConfig,
    *,
    ranks: Ranks | None = None,
    on_progress: Callable[[float], None] = lambda share: None,
) -> tuple[TrainState, dict[str, Any]]:
    """Run one epoch's updates.

    Args:
        policy: Holds ``state.weights``; changed in place.
        state: Before the epoch.
        samples: The epoch's samples, S of them.
        credit: The epoch's credit table, [S] each: ``reward``, NaN where scoring failed, and the
            columns that the algorithm declares.
        statistics: Prompt statistics after this epoch's rewards.
        config: Algorithm, sampler, optimizer, seed.
        ranks: The processes that run these updates together; by default this one alone.
        on_progress: Called with the share that is done, in [0, 1].

    Returns:
        The state after the epoch, and metrics by name as JSON values: ``loss`` (None if there
        was no update) and ``grad_norm`` (before clipping, None if no step was taken) are means over
        the updates; ``forwards`` counts those of the network in the updates, an image each, and
        ``sampling_forwards`` those that drew the samples; in float16, ``loss_scale`` is what the
        next epoch starts with, and ``skipped_steps`` counts updates whose gradient overflowed; the
        rest is the objective's and the algorithm's.

    Raises:
        ConfigError: The algorithm cannot train on such samples.
        NonFiniteError: A loss or log-prob is NaN or infinite, or a gradient that no smaller loss
            scale can help; the policy has the weights of ``state`` again.
    """
    ranks = ranks or Alone()
    with ranks.sharing(policy, state.weights):
        return _updated(policy, state, samples, credit, statistics, config, ranks, on_progress)


def _updated(
    policy: Policy,
    state: TrainState,
    samples: Samples,
    credit: Mapping[str, Tensor],
    statistics: PromptStatistics,
    config: RunConfig,
    ranks: Ranks,
    on_progress: Callable[[float], None],
) -> tuple[TrainState, dict[str, Any]]:
    algorithm = config.algorithm
    updates = algorithm.updates(credit, run_seed=config.seed, epoch=state.epoch)
    parameters = policy.weights.parameters()
    policy.prepare_prompts(samples.prompts)
    ema = Ema.of(policy, state, config.optimizer)
    adamw = make_adamw(parameters, config.optimizer, state.optimizer)
    make_objective = OBJECTIVES[algorithm.needs.data]
    objective = make_objective(policy, state, samples, credit, updates, config, ranks)
    items = sum(len(each.samples) for each in updates) * objective.items_per_sample
    done = 0

    def on_items(number: int) -> None:
        nonlocal done
        done += number * ranks.size
        on_progress(min(done / items, 1.0))

    losses, norms = [], []
    scale = state.loss_scale or first_loss_scale(policy.numerics)
    try:
        for each in updates:
            losses.append(objective.accumulate(each, scale, on_items))
            norm = take_step(adamw, parameters, config.optimizer)
            if not math.isfinite(norm):
                scale = _backed_off(scale, norm, policy)
                continue
            norms.append(norm)
            scale = scale and scale.after_step()
            if ema is not None:
                ema.follow(policy.weights.state())
        objective.finish()
    except NonFiniteError:
        # Earlier updates of this epoch have already taken their steps.
        policy.weights.load(state.weights)
        raise
    weights = copies(policy.weights.state())
    ranks.check_equal(weights)
    updated = state.updates + len(norms)
    after = TrainState(
        weights=weights,
        optimizer=copies(optimizer_state(adamw, parameters)),
        statistics=statistics,
        epoch=state.epoch + 1,
        updates=updated,
        samples=state.samples + len(samples.prompts),
        ema={} if ema is None else copies(ema.average),
        value=objective.state(),
        old=_old_after(policy, state, algorithm, updated),
        loss_scale=scale,
    )
    scaling = {}
    if scale is not None:
        scaling = {"loss_scale": scale.value, "skipped_steps": len(updates) - len(norms)}
    return after, {
        "loss": sum(losses) / len(losses) if losses else None,
        "grad_norm": sum(norms) / len(norms) if norms else None,
        "learning_rate": config.optimizer.learning_rate,
        "forwards": objective.forwards(),
        "sampling_forwards": _sampling_forwards(policy, config, state.epoch),
        **scaling,
        **objective.metrics(),
        **algorithm.credit_metrics(credit, config.rollouts.samples_per_prompt),
    }


def _sampling_forwards(policy: Policy, config: RunConfig, epoch: int) -> int:
    # Nothing drew the images of preference pairs.
    return 0 if config.preferences else sampling_forwards(policy, config, epoch)


def _old_after(
    policy: Policy, state: TrainState, algorithm: Algorithm, updates: int
) -> dict[str, Tensor]:
    """Return the old weights after an epoch, empty if the algorithm keeps none."""
    if not algorithm.needs.keeps_old:
        return {}
    weights = policy.weights.state()
    old = Ema(state.old_weights, algorithm.decay_of_old(updates), weights)
    old.follow(weights)
    return copies(old.average)


def _backed_off(scale: LossScale | None, norm: float, policy: Policy) -> LossScale:
    """Return a smaller loss scale after an overflow, or raise if none is left."""
    if scale is None or scale.least:
        raise NonFiniteError(
            f"the gradient's norm is {norm}; the weights were left as they were. "
            f"{policy.numerics.advice}"
        )
    return scale.after_overflow()
