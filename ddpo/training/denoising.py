"""Weighted regression on final latents: the update of RWR (arXiv 2305.13301, section 4.1).

The loss is the one that diffusion models are trained with, on the model's own pictures: for noise
eps ~ N(0, I) and a training timestep t ~ Uniform, x_t = sqrt(alpha_t) x_0 + sqrt(1 - alpha_t) eps,
and the model predicts eps, or v = sqrt(alpha_t) eps - sqrt(1 - alpha_t) x_0, from x_t, t and the
prompt, without guidance.

Shapes: S samples, N samples of one step or micro-batch, C latent channels, h x w latent pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ddpo.basics.randomness import derive_seed, generator
from ddpo.config import Regression, RunConfig
from ddpo.errors import ConfigError, NonFiniteError
from ddpo.models import Policy
from ddpo.training.ema import Ema
from ddpo.training.optimizer import copies, make_adamw, optimizer_state, take_step
from ddpo.training.pairs import float16_loss_scale, unscale
from ddpo.training.state import PromptStatistics, TrainState


@dataclass(frozen=True)
class FinalLatents:
    """The samples of one epoch, in the order of ``sample_id``: what their pictures were made of.

    Attributes:
        prompts: S texts.
        latents: [S, C, h, w] float32, clean.
    """

    prompts: Sequence[str]
    latents: Tensor


@dataclass(frozen=True)
class Noising:
    """How the samples of one step are made noisy.

    Attributes:
        timesteps: [N] int64, training timesteps.
        noise: [N, C, h, w] float32, standard normal.
    """

    timesteps: Tensor
    noise: Tensor

    @classmethod
    def draw(
        cls, run_seed: int, epoch: int, inner_epoch: int, samples: Sequence[int], policy: Policy
    ) -> Noising:
        """Draw, on the CPU: what a sample draws depends on its own index and on nothing beside it.

        Args:
            run_seed: The config's ``seed``.
            epoch: The epoch.
            inner_epoch: The pass over the epoch's samples.
            samples: N indices within the epoch.
            policy: Gives the shape of its latents and the number of its training timesteps.

        Returns:
            Timesteps and noise on the CPU.
        """
        last = policy.pipeline.scheduler.config.num_train_timesteps
        timesteps, noise = [], []
        for index in samples:
            own = generator(derive_seed(run_seed, "regression", epoch, inner_epoch, index))
            timesteps.append(torch.randint(last, (), generator=own))
            noise.append(torch.randn(policy.latent_shape, generator=own))
        return cls(torch.stack(timesteps), torch.stack(noise))


@dataclass(frozen=True)
class RegressionMetrics:
    """What an update measured. Names are the field's.

    Attributes:
        loss: The weighted denoising loss, mean over the epoch's updates.
        grad_norm: Mean over the updates of the gradient's norm before clipping.
        learning_rate: Of AdamW.
        weight_max: Largest weight of a sample; the mean over what shares a softmax is 1.
        trained_samples: Samples whose weight is above 0.
        effective_sample_size: (sum w)² / sum w² (Kish): as few samples of equal weight would vary
            as much. Near 1, a single picture is learnt by heart.
    """

    loss: float
    grad_norm: float
    learning_rate: float
    weight_max: float
    trained_samples: int
    effective_sample_size: float

    def document(self) -> dict[str, Any]:
        """Return the metrics as JSON values."""
        return asdict(self)


class DenoisingGradient:
    """The gradient of the weighted denoising loss, accumulated over micro-batches.

    Args:
        policy: Whose weights are updated, in place.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.parameters = policy.weights.parameters()
        self.loss_scale = float16_loss_scale(policy.numerics)

    def losses(self, prompts: Sequence[str], latents: Tensor, noising: Noising) -> Tensor:
        """Return each sample's denoising loss.

        Args:
            prompts: N texts.
            latents: [N, C, h, w], clean.
            noising: Of the same N samples.

        Returns:
            [N], squared errors averaged over latent dimensions, with a gradient where gradients
            are on.
        """
        scheduler, device = self.policy.pipeline.scheduler, self.policy.device
        clean, timesteps = latents.to(device), noising.timesteps.to(device)
        noise = noising.noise.to(clean)
        noisy = scheduler.add_noise(clean, noise, timesteps)
        output = self.policy.predict(noisy, timesteps, self.policy.embed(prompts), 1.0)
        target = noise
        if scheduler.config.prediction_type == "v_prediction":
            target = scheduler.get_velocity(clean, noise, timesteps)
        return ((output - target) ** 2).mean(dim=(1, 2, 3))

    def accumulate(
        self,
        finals: FinalLatents,
        weights: Tensor,
        samples: Sequence[int],
        noising: Noising,
        on_samples: Callable[[int], None] = lambda count: None,
    ) -> float:
        """Add the gradient of one step's loss to the parameters, micro-batch by micro-batch.

        The loss is the mean over the step's samples of weight times denoising loss, so any
        micro-batch size gives the same gradient.

        Args:
            finals: All samples of the epoch.
            weights: [S].
            samples: N rows that this step sees.
            noising: Of those rows, in their order.
            on_samples: Called with the number of samples that were just done.

        Returns:
            The loss.

        Raises:
            NonFiniteError: A sample's loss is NaN or infinite.
        """
        count = len(samples)
        scale = self.loss_scale * count if self.loss_scale != 1.0 else 1.0
        total = 0.0
        for part in torch.arange(count).split(self.policy.numerics.micro_batch_size):
            rows: list[int] = [samples[int(i)] for i in part]
            prompts = [finals.prompts[row] for row in rows]
            mine = Noising(noising.timesteps[part], noising.noise[part])
            losses = self.losses(prompts, finals.latents[rows], mine)
            _check_finite(rows, prompts, mine, losses)
            loss = (weights[rows].to(losses) * losses).sum() / count
            (loss * scale).backward()
            total += float(loss.detach())
            on_samples(len(rows))
        unscale(self.parameters, scale)
        return total


def steps_of_pass(
    run_seed: int, epoch: int, inner_epoch: int, samples: Sequence[int], updates: int
) -> list[list[int]]:
    """Shuffle the samples and cut them into the steps of one pass.

    Args:
        run_seed: The config's ``seed``.
        epoch: The epoch.
        inner_epoch: The pass; each has an order of its own.
        samples: What is passed over.
        updates: Steps of the pass; as many as there are samples, where those are fewer.

    Returns:
        The samples of each step: every sample once, sizes that differ by 1 at most.
    """
    seed = derive_seed(run_seed, "regression order", epoch, inner_epoch)
    order = torch.randperm(len(samples), generator=generator(seed))
    steps = order.tensor_split(min(updates, len(samples)))
    return [[samples[i] for i in step.tolist()] for step in steps]


def regress(
    policy: Policy,
    state: TrainState,
    finals: FinalLatents,
    weights: Tensor,
    statistics: PromptStatistics,
    config: RunConfig,
    *,
    on_progress: Callable[[float], None] = lambda share: None,
) -> tuple[TrainState, RegressionMetrics]:
    """Run one epoch's updates: several shuffled passes over the samples whose weight is above 0.

    Args:
        policy: Holds ``state.weights``; changed in place.
        state: Before the epoch.
        finals: Drawn by this very policy.
        weights: [S], at least 0, one of them above.
        statistics: What the next epoch starts from.
        config: Algorithm, optimizer, seed.
        on_progress: Called with the share that is done, in [0, 1].

    Returns:
        The state after the epoch, and what was measured.

    Raises:
        ConfigError: The algorithm is no regression.
        NonFiniteError: A loss or gradient is NaN or infinite.
    """
    algorithm = config.algorithm
    if not isinstance(algorithm, Regression):
        raise ConfigError(
            f"algorithm.type {algorithm.type} is no regression; its update is "
            "ddpo.training.loop.update"
        )
    gradient = DenoisingGradient(policy)
    ema = Ema.of(policy, state, config.optimizer)
    adamw = make_adamw(gradient.parameters, config.optimizer, state.optimizer)
    samples = torch.nonzero(weights > 0).flatten().tolist()
    done = 0

    def on_samples(number: int) -> None:
        nonlocal done
        done += number
        on_progress(done / (len(samples) * algorithm.inner_epochs))

    losses, norms = [], []
    try:
        for inner in range(algorithm.inner_epochs):
            path = (config.seed, state.epoch, inner)
            for step in steps_of_pass(*path, samples, algorithm.updates_per_pass):
                noising = Noising.draw(*path, step, policy)
                losses.append(gradient.accumulate(finals, weights, step, noising, on_samples))
                norms.append(take_step(adamw, gradient.parameters, config.optimizer))
                if ema is not None:
                    ema.follow(policy.weights.state())
    except NonFiniteError:
        # Earlier steps of this epoch have already moved them.
        policy.weights.load(state.weights)
        raise
    after = TrainState(
        weights=copies(policy.weights.state()),
        optimizer=copies(optimizer_state(adamw, gradient.parameters)),
        statistics=statistics,
        epoch=state.epoch + 1,
        updates=state.updates + len(losses),
        samples=state.samples + len(finals.prompts),
        ema={} if ema is None else copies(ema.average),
    )
    own = weights.double()
    return after, RegressionMetrics(
        loss=sum(losses) / len(losses),
        grad_norm=sum(norms) / len(norms),
        learning_rate=config.optimizer.learning_rate,
        weight_max=float(own.max()),
        trained_samples=len(samples),
        effective_sample_size=float(own.sum() ** 2 / (own**2).sum()),
    )


def _check_finite(
    rows: Sequence[int], prompts: Sequence[str], noising: Noising, losses: Tensor
) -> None:
    bad = ~torch.isfinite(losses)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise NonFiniteError(
            f"denoising loss {float(losses.detach()[first])} for sample {rows[first]} (prompt "
            f"{prompts[first]!r}) at timestep {int(noising.timesteps[first])}; the weights were "
            "left as they were. Lower optimizer.learning_rate, or use numerics.dtype float32 or "
            "bfloat16."
        )
