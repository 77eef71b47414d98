"""The value function in an epoch: a baseline of the policy's updates, trained after them.

Shapes: S samples, T denoising steps.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ddpo.algorithms.advantages.base import CriticSettings
from ddpo.basics.randomness import derive_seed
from ddpo.config import OptimizerConfig
from ddpo.diffusion import Process
from ddpo.errors import NonFiniteError
from ddpo.models import Policy
from ddpo.training.optimizer import copies, make_adamw, optimizer_state
from ddpo.training.value_network import (
    ValueNetwork,
    explained_variance,
    prompt_features,
    time_features,
    value_loss,
)


class Critic:
    """V on the rollouts of one epoch.

    Args:
        policy: Gives the prompts' embeddings.
        process: Gives the steps' times.
        prompts: S prompts, one per sample of the epoch.
        kept: V and its AdamW as :meth:`state` returned them; empty before the first training,
            when V is initialised from ``seed``.
        settings: How V is trained, and what advantages are clipped to.
        seed: The config's.
    """

    def __init__(
        self,
        policy: Policy,
        process: Process,
        prompts: Sequence[str],
        kept: Mapping[str, Tensor],
        settings: CriticSettings,
        *,
        seed: int,
    ) -> None:
        self.settings = settings
        texts = list(dict.fromkeys(prompts))
        self._rows = torch.tensor([texts.index(text) for text in prompts])
        with torch.no_grad():
            text, empty = policy.encode(texts)["text"], policy.encode([""])["text"]
        self._prompts = prompt_features(text, empty)
        self._times = time_features(process.times, process.schedule.time_scale)
        self.network = ValueNetwork(self._prompts.shape[1], seed=derive_seed(seed, "value"))
        weights = {name: value for name, value in kept.items() if name.startswith(_WEIGHT)}
        if weights:
            self.network.load_state_dict(
                {name.removeprefix(_WEIGHT): value for name, value in weights.items()}
            )
        self._parameters = dict(self.network.named_parameters())
        self._adamw = make_adamw(
            self._parameters,
            OptimizerConfig(learning_rate=settings.learning_rate),
            {name: value for name, value in kept.items() if name not in weights},
        )

    def values(self) -> Tensor:
        """Return V of each sample's prompt at each step, [S, T], with a gradient."""
        return self.network(self._prompts, self._times)[self._rows]

    @torch.no_grad()
    def advantages(self, rewards: Tensor, scored: Tensor) -> Tensor:
        """Return clip(r_s - V(prompt_s, t)), 0 for samples without a reward.

        Args:
            rewards: [S], normalised.
            scored: [S] bool.

        Returns:
            [S, T] on the CPU.
        """
        clip = self.settings.clip
        differences = (rewards[:, None] - self.values()).clamp(-clip, clip)
        return torch.where(scored[:, None], differences, 0.0)

    def learn(self, rewards: Tensor, scored: Tensor) -> dict[str, float | None]:
        """Take the epoch's steps of AdamW, each on all samples that have a reward.

        Args:
            rewards: [S], normalised.
            scored: [S] bool.

        Returns:
            How well V predicted the rewards before it was trained on them: ``value_loss``, its mean
            squared error, and ``value_explained_variance``, 1 - var(r - V) / var(r), None where all
            rewards are equal.

        Raises:
            NonFiniteError: V is NaN or infinite after it.
        """
        targets = rewards[scored].float()
        with torch.no_grad():
            before = self.values()[scored]
        for _ in range(self.settings.epochs):
            value_loss(self.values()[scored], targets).backward()
            self._adamw.step()
            self._adamw.zero_grad(set_to_none=True)
        with torch.no_grad():
            loss = float(value_loss(self.values()[scored], targets))
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"the value function's loss is {loss} after its training; the weights were left as "
                "they were. Lower algorithm.advantages.value_learning_rate, now "
                f"{self.settings.learning_rate:g}"
            )
        return {
            "value_loss": float(value_loss(before, targets)),
            "value_explained_variance": explained_variance(before, targets),
        }

    def state(self) -> dict[str, Tensor]:
        """Return V's weights as ``weight/name`` and AdamW's state as ``moment/name``, copied."""
        weights = {f"{_WEIGHT}{name}": value for name, value in self._parameters.items()}
        return copies({**weights, **optimizer_state(self._adamw, self._parameters)})


_WEIGHT = "weight/"
