"""A learned value function V(prompt, t) as a baseline: a minimal critic of an actor-critic.

A baseline that depends on the prompt and the timestep, but not on the sampled noise, leaves the
policy gradient unbiased (Sutton and Barto 2018, section 13.4); close to the prompt's mean reward it
reduces variance. It is computed in float32 on the CPU, whatever the policy computes in.

Shapes: S samples, T denoising steps, U distinct prompts, L tokens, D text features.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ddpo.basics.randomness import generator

_WIDTH = 64


class ValueNetwork(nn.Module):
    """V(prompt, t): two hidden layers of 64 over a prompt's features and a timestep's.

    A new network is 0 everywhere.

    Args:
        features: D.
        seed: Seed of the hidden layers' initial weights.
    """

    def __init__(self, features: int, *, seed: int) -> None:
        super().__init__()
        self.prompt = nn.Linear(features, _WIDTH)
        self.timestep = nn.Linear(1, _WIDTH, bias=False)
        self.hidden = nn.Linear(_WIDTH, _WIDTH)
        self.value = nn.Linear(_WIDTH, 1)
        source = generator(seed)
        with torch.no_grad():
            for layer in (self.prompt, self.timestep, self.hidden):
                bound = layer.in_features**-0.5
                for parameter in layer.parameters():
                    parameter.uniform_(-bound, bound, generator=source)
            self.value.weight.zero_()
            self.value.bias.zero_()

    def forward(self, prompts: Tensor, times: Tensor) -> Tensor:
        """Return V of every prompt at every step.

        Args:
            prompts: [U, D], from :func:`prompt_features`.
            times: [T, 1], from :func:`time_features`.

        Returns:
            [U, T], on the scale of normalised rewards.
        """
        # The first layer on both inputs concatenated, without computing each prompt T times.
        first = functional.silu(self.prompt(prompts)[:, None] + self.timestep(times))
        return self.value(functional.silu(self.hidden(first))).squeeze(-1)


def prompt_features(embeddings: Tensor, empty: Tensor) -> Tensor:
    """Return V's input for prompts: the mean over tokens, relative to the empty prompt's.

    Means of CLIP's embeddings are nearly equal, since most tokens are padding; what distinguishes
    prompts is their difference from the empty prompt's, here normalized to mean 0 and variance 1.

    Args:
        embeddings: [U, L, D].
        empty: [1, L, D], of the prompt "".

    Returns:
        [U, D] float32 on the CPU.
    """
    means = embeddings.float().cpu().mean(dim=1) - empty.float().cpu().mean(dim=1)
    return functional.layer_norm(means, means.shape[-1:])


def time_features(times: Tensor, scale: float) -> Tensor:
    """Return V's input for the times of steps: their position in the process, in [-1, 1].

    Args:
        times: [T] float32, in [0, ``scale``).
        scale: The end of the process's time axis.

    Returns:
        [T, 1] float32 on the CPU.
    """
    return (2 * times.cpu() / scale - 1).unsqueeze(-1)


def value_loss(values: Tensor, rewards: Tensor) -> Tensor:
    """Return the mean of (V(prompt_s, t) - r_s)² over samples and timesteps.

    Args:
        values: [S, T].
        rewards: [S], normalised; the same at every timestep of a sample.

    Returns:
        A scalar.
    """
    return ((values - rewards[:, None]) ** 2).mean()


def explained_variance(values: Tensor, rewards: Tensor) -> float | None:
    """Return 1 - var(r - V) / var(r): 1 if V predicts every reward, 0 if it is of no use.

    Args:
        values: [S, T].
        rewards: [S], normalised.

    Returns:
        At most 1, and below 0 where V adds variance; None where all rewards are equal.
    """
    if rewards.min() == rewards.max():
        return None
    spread = rewards.double().var(unbiased=False)
    left = (rewards.double()[:, None] - values.double()).var(unbiased=False)
    return float(1 - left / spread)
