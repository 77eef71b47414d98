"""Training on final latents: noised, and predicted by the policy and other weight sets.

Without guidance. With DDIM, for noise eps ~ N(0, I) and a time t, x_t = sqrt(alpha_t) x_0 +
sqrt(1 - alpha_t) eps, and the model predicts eps, or v = sqrt(alpha_t) eps - sqrt(1 - alpha_t) x_0,
from x_t, t and the prompt.

Shapes: S samples, N noised samples of one update or micro-batch, C latent channels, h x w latent
pixels.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from ddpo.algorithms import Algorithm
from ddpo.algorithms.base import Update
from ddpo.algorithms.denoising import DenoisingAlgorithm, DenoisingBatch
from ddpo.config import RunConfig
from ddpo.diffusion import Process
from ddpo.diffusion.window import whole_process
from ddpo.errors import NonFiniteError
from ddpo.models import Policy, WeightSet
from ddpo.training.loss_scale import LossScale, first_loss_scale
from ddpo.training.noising import Noiser, Noising
from ddpo.training.objective import Objective, factor_of, unscale
from ddpo.training.ranks import Alone, Ranks
from ddpo.training.samples import FinalLatents, Rollouts, Samples
from ddpo.training.state import TrainState

_AHEAD = 16
"""Micro-batches for which another weight set predicts at once: it is swapped in for that, and whole
networks take a while to pass through the CPU."""


class DrawsNoising(Protocol):
    """Gives the times and noise of some noised samples."""

    def part(self, rows: Tensor) -> Noising:
        """Return those of some rows, [n] int64."""
        ...


class DenoisingGradient:
    """The gradient of an algorithm's denoising loss, accumulated over micro-batches.

    Args:
        policy: Its weights are updated in place; it keeps the other weight sets that are needed.
        process: Whose schedule noises clean latents.
        algorithm: Gives the loss.
        ranks: The processes that share the micro-batches.
    """

    def __init__(
        self,
        policy: Policy,
        process: Process,
        algorithm: Algorithm,
        ranks: Ranks | None = None,
    ) -> None:
        self.policy = policy
        self.process = process
        # The registry of objectives: what trains on final latents is such an algorithm.
        self.algorithm = cast(DenoisingAlgorithm, algorithm)
        self.ranks = ranks or Alone()
        self.parameters = policy.weights.parameters()
        self.loss_scale = first_loss_scale(policy.numerics)

    def batch(
        self,
        prompts: Sequence[str],
        latents: Tensor,
        credit: Mapping[str, Tensor],
        noising: Noising,
        others: Mapping[str, Tensor] | None = None,
    ) -> DenoisingBatch:
        """Return noised samples with what the weights in use predict, without guidance.

        Args:
            prompts: N prompts.
            latents: [N, C, h, w], clean.
            credit: [N] each, by name.
            noising: Of the same N samples.
            others: [N, C, h, w] each, the predictions of other weight sets.

        Returns:
            N noised samples, with a gradient where gradients are on.
        """
        device = self.policy.device
        clean, times = latents.to(device), noising.times.to(device)
        schedule = self.process.schedule
        noisy, target = schedule.noised(clean, noising.noise.to(clean), times)
        prediction = self.policy.predict(noisy, times, self.policy.encode(prompts), 1.0)
        return DenoisingBatch(
            prediction,
            target,
            {name: values.to(device) for name, values in credit.items()},
            clean,
            times / schedule.time_scale,
            lambda other: schedule.predicted_clean(noisy, other, times),
            {name: other.to(device) for name, other in (others or {}).items()},
        )

    def accumulate(
        self,
        finals: FinalLatents,
        credit: Mapping[str, Tensor],
        samples: Sequence[int],
        noising: DrawsNoising,
        on_samples: Callable[[int], None] = lambda count: None,
        on_measures: Callable[[Mapping[str, float]], None] = lambda measures: None,
    ) -> float:
        """Add the gradient of one update's loss to the parameters, micro-batch by micro-batch.

        The loss is the mean over the update's noised samples, so any micro-batch size gives the
        same gradient.

        Args:
            finals: All samples of the epoch.
            credit: [S] each, by name.
            samples: N rows that this update sees, one as often as it is noised.
            noising: Of those rows, in their order.
            on_samples: Called with the number of noised samples just processed.
            on_measures: Called with what the algorithm measures, means over the update.

        Returns:
            The loss.

        Raises:
            NonFiniteError: A sample's loss is NaN or infinite.
        """
        count = len(samples)
        factor = factor_of(self.loss_scale, count)
        batches = torch.arange(count).split(self.policy.numerics.micro_batch_size)
        others = self._others(finals, samples, noising, self.ranks.mine(batches))
        measured = self.algorithm.measured

        def backward(part: Tensor) -> tuple[float, ...]:
            rows, prompts = _rows(finals, samples, part)
            noised = noising.part(part)
            # Before the policy's own: swapping weights must not meet its graph.
            predictions = next(others)
            own = {name: values[rows] for name, values in credit.items()}
            batch = self.batch(prompts, finals.latents[rows], own, noised, predictions)
            losses = self.algorithm.losses(batch)
            _check_finite(rows, prompts, noised, losses, self.policy.numerics.advice)
            loss = losses.sum() / count
            (loss * factor).backward()
            on_samples(len(rows))
            measures = self.algorithm.measures(batch)
            means = (float(measures[name].detach().sum()) / count for name in measured)
            return (float(loss.detach()), *means)

        values = self.ranks.add_up(self.parameters, batches, backward)
        unscale(self.parameters, factor)
        loss, *means = (sum(each) for each in zip(*values, strict=True))
        on_measures(dict(zip(measured, means, strict=True)))
        return loss

    def _others(
        self,
        finals: FinalLatents,
        samples: Sequence[int],
        noising: DrawsNoising,
        batches: Sequence[Tensor],
    ) -> Iterator[Mapping[str, Tensor]]:
        """Yield what other weight sets predict of each batch, on the CPU."""
        sets = cast(list[WeightSet], sorted(self.algorithm.needs.policies))
        ready: deque[dict[str, Tensor]] = deque()
        for number in range(len(batches)):
            if not ready:
                block = batches[number : number + _AHEAD]
                ready.extend({} for _ in block)
                for name in sets:
                    with torch.no_grad(), self.policy.weights.use(name):
                        for part, predictions in zip(block, ready, strict=True):
                            rows, prompts = _rows(finals, samples, part)
                            latents = finals.latents[rows]
                            found = self.batch(prompts, latents, {}, noising.part(part))
                            predictions[name] = found.prediction.cpu()
            yield ready.popleft()


class DenoisingObjective(Objective):
    """The loss of an algorithm on one epoch's final latents.

    Args:
        policy: Its weights are updated in place.
        state: Before the epoch.
        samples: The epoch's.
        credit: The epoch's credit table, [S] each.
        updates: The epoch's updates.
        config: Algorithm, sampler and seed.
        ranks: The processes that share the micro-batches.
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
        self.finals = samples.final if isinstance(samples, Rollouts) else samples
        self.credit = credit
        process = whole_process(policy, config.sampler)
        self.gradient = DenoisingGradient(policy, process, config.algorithm, ranks)
        kept: Mapping[WeightSet, Mapping[str, Tensor]]
        kept = {"old": state.old_weights, "start": state.weights}
        for name in kept.keys() & config.algorithm.needs.policies:
            policy.weights.keep(name, kept[name])
        times, together = self.gradient.algorithm.times, config.algorithm.needs.samples_per_loss
        self.noiser = Noiser(policy, process, times, config.seed, state.epoch, together)
        self.items_per_sample = self.noiser.times_per_sample
        self._items = 0
        self._measured: list[Mapping[str, float]] = []

    def accumulate(
        self, update: Update, scale: LossScale | None, on_items: Callable[[int], None]
    ) -> float:
        """Add the gradient of one update's loss to the policy's parameters."""
        self.gradient.loss_scale = scale
        noising = self.noiser.of(update)
        self._items += len(noising.samples)
        return self.gradient.accumulate(
            self.finals, self.credit, noising.samples, noising, on_items, self._measured.append
        )

    def finish(self) -> None:
        """Train nothing beside the policy."""

    def forwards(self) -> int:
        """Return those of the policy and of each other weight set, all without guidance."""
        return self._items * (1 + len(self.gradient.algorithm.needs.policies))

    def metrics(self) -> dict[str, Any]:
        """Return what the algorithm measures of its forwards, means over the updates, if any."""
        if not self._measured:
            return {}
        return {
            name: sum(each[name] for each in self._measured) / len(self._measured)
            for name in self.gradient.algorithm.measured
        }


def _rows(
    finals: FinalLatents, samples: Sequence[int], part: Tensor
) -> tuple[list[int], list[str]]:
    """Return the samples of some noised samples, [n] int64, and their prompts."""
    rows = [samples[int(i)] for i in part]
    return rows, [finals.prompts[row] for row in rows]


def _check_finite(
    rows: Sequence[int], prompts: Sequence[str], noising: Noising, losses: Tensor, advice: str
) -> None:
    good = torch.isfinite(losses)
    if not good.all():
        first = int((~good).nonzero()[0])
        raise NonFiniteError(
            f"denoising loss {float(losses.detach()[first])} for sample {rows[first]} (prompt "
            f"{prompts[first]!r}) at time {float(noising.times[first]):g}; the weights were "
            f"left as they were. {advice}"
        )
