"""Training on final latents: the denoising loss that diffusion models are trained with.

On the model's own images. With DDIM, for noise eps ~ N(0, I) and a training timestep t ~ Uniform,
x_t = sqrt(alpha_t) x_0 + sqrt(1 - alpha_t) eps, and the model predicts eps, or
v = sqrt(alpha_t) eps - sqrt(1 - alpha_t) x_0, from x_t, t and the prompt, without guidance.

Shapes: S samples, N samples of one update or micro-batch, C latent channels, h x w latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddpo.algorithms import Algorithm
from ddpo.algorithms.base import Update
from ddpo.algorithms.rwr import DenoisingBatch
from ddpo.basics.randomness import derive_seed, generator
from ddpo.config import RunConfig
from ddpo.diffusion import Process
from ddpo.diffusion.window import whole_process
from ddpo.errors import NonFiniteError
from ddpo.models import Policy
from ddpo.training.loss_scale import LossScale, first_loss_scale
from ddpo.training.objective import Objective, factor_of, unscale
from ddpo.training.ranks import Alone, Ranks
from ddpo.training.samples import FinalLatents, Rollouts, Samples
from ddpo.training.state import TrainState


@dataclass(frozen=True)
class Noising:
    """The noise that the samples of one update are given."""

    times: Tensor
    """[N] float32, as the process draws them for training."""
    noise: Tensor
    """[N, C, h, w] float32, standard normal."""

    @classmethod
    def draw(
        cls,
        run_seed: int,
        epoch: int,
        inner_epoch: int,
        samples: Sequence[int],
        policy: Policy,
        process: Process,
    ) -> Noising:
        """Sample times and noise; a sample's depend on its own index and pass alone.

        Args:
            run_seed: The config's ``seed``.
            epoch: The epoch.
            inner_epoch: The pass over the epoch's samples.
            samples: N indices within the epoch.
            policy: Gives the shape of its latents.
            process: Gives the distribution of training times.

        Returns:
            Times and noise on the CPU.
        """
        times, noise = [], []
        for index in samples:
            source = generator(derive_seed(run_seed, "regression", epoch, inner_epoch, index))
            times.append(process.training_time(source))
            noise.append(torch.randn(policy.latent_shape, generator=source))
        return cls(torch.stack(times), torch.stack(noise))


class DenoisingGradient:
    """The gradient of an algorithm's denoising loss, accumulated over micro-batches.

    Args:
        policy: Its weights are updated in place.
        process: Noises clean latents.
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
        self.algorithm = algorithm
        self.ranks = ranks or Alone()
        self.parameters = policy.weights.parameters()
        self.loss_scale = first_loss_scale(policy.numerics)

    def losses(
        self, prompts: Sequence[str], latents: Tensor, weights: Tensor, noising: Noising
    ) -> Tensor:
        """Return each sample's loss.

        Args:
            prompts: N prompts.
            latents: [N, C, h, w], clean.
            weights: [N].
            noising: Of the same N samples.

        Returns:
            [N], with a gradient where gradients are on.
        """
        device = self.policy.device
        clean, times = latents.to(device), noising.times.to(device)
        noisy, target = self.process.noised(clean, noising.noise.to(clean), times)
        output = self.policy.predict(noisy, times, self.policy.encode(prompts), 1.0)
        return self.algorithm.losses(DenoisingBatch(output, target, weights))

    def accumulate(
        self,
        finals: FinalLatents,
        weights: Tensor,
        samples: Sequence[int],
        noising: Noising,
        on_samples: Callable[[int], None] = lambda count: None,
    ) -> float:
        """Add the gradient of one update's loss to the parameters, micro-batch by micro-batch.

        The loss is the mean over the update's samples, so any micro-batch size gives the same
        gradient.

        Args:
            finals: All samples of the epoch.
            weights: [S].
            samples: N rows that this update sees.
            noising: Of those rows, in their order.
            on_samples: Called with the number of samples just processed.

        Returns:
            The loss.

        Raises:
            NonFiniteError: A sample's loss is NaN or infinite.
        """
        count = len(samples)
        factor = factor_of(self.loss_scale, count)

        def backward(part: Tensor) -> tuple[float]:
            rows: list[int] = [samples[int(i)] for i in part]
            prompts = [finals.prompts[row] for row in rows]
            noised = Noising(noising.times[part], noising.noise[part])
            losses = self.losses(prompts, finals.latents[rows], weights[rows], noised)
            _check_finite(rows, prompts, noised, losses, self.policy.numerics.advice)
            loss = losses.sum() / count
            (loss * factor).backward()
            on_samples(len(rows))
            return (float(loss.detach()),)

        batches = torch.arange(count).split(self.policy.numerics.micro_batch_size)
        values = self.ranks.add_up(self.parameters, batches, backward)
        unscale(self.parameters, factor)
        return sum(loss for (loss,) in values)


class DenoisingObjective(Objective):
    """The loss of a regression on one epoch's final latents.

    Args:
        policy: Its weights are updated in place.
        state: Before the epoch.
        samples: Sampled by this very policy.
        credit: The epoch's credit table: ``weight``, [S], at least 0, one of them above.
        updates: The epoch's updates.
        config: Algorithm and seed.
        ranks: The processes that share the micro-batches.
    """

    items_per_sample = 1

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
        self.policy = policy
        self.finals = samples.final if isinstance(samples, Rollouts) else samples
        self.weights = credit["weight"]
        process = whole_process(policy, config.sampler)
        self.gradient = DenoisingGradient(policy, process, config.algorithm, ranks)
        self._path = (config.seed, state.epoch)

    def accumulate(
        self, update: Update, scale: LossScale | None, on_items: Callable[[int], None]
    ) -> float:
        """Add the gradient of one update's loss to the policy's parameters."""
        self.gradient.loss_scale = scale
        noising = Noising.draw(
            *self._path, update.inner_epoch, update.samples, self.policy, self.gradient.process
        )
        return self.gradient.accumulate(
            self.finals, self.weights, update.samples, noising, on_items
        )

    def finish(self) -> None:
        """Train nothing beside the policy."""

    def metrics(self) -> dict[str, Any]:
        """Return nothing beside what the loop and the algorithm measure."""
        return {}


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
