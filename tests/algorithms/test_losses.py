from __future__ import annotations

import math

import pytest
import torch

from ddpo.algorithms import DdpoIs, DdpoSf
from ddpo.algorithms.policy_gradient import PairBatch, PolicyGradient
from ddpo.diffusion.ddim import Transition

CLIP = 1e-4
IS, SF = DdpoIs(clip_range=CLIP), DdpoSf(type="ddpo_sf")


def loss_of(
    algorithm: PolicyGradient, new: torch.Tensor, old: torch.Tensor, advantages: torch.Tensor
) -> torch.Tensor:
    """Return the losses of pairs whose transitions do not matter: there is no KL penalty."""
    anywhere = Transition(torch.zeros(len(new), 1, 1, 1), torch.ones(len(new), 1, 1, 1))
    return algorithm.losses(PairBatch(new, old, advantages, anywhere))


def is_loss(new: float, old: float, advantage: float, clip: float) -> float:
    ratio = math.exp(new - old)
    clipped = min(max(ratio, 1 - clip), 1 + clip)
    return max(-advantage * ratio, -advantage * clipped)


@pytest.mark.parametrize("advantage", [-2.0, -0.5, 0.0, 0.5, 3.0])
@pytest.mark.parametrize("shift", [-3e-4, -0.5e-4, 0.0, 0.5e-4, 3e-4])
def test_ddpo_is_is_the_clipped_surrogate(shift: float, advantage: float) -> None:
    new = torch.tensor([1.25 + shift], dtype=torch.float64)
    old = torch.tensor([1.25], dtype=torch.float64)
    found = loss_of(IS, new, old, torch.tensor([advantage], dtype=torch.float64))
    assert float(found) == pytest.approx(is_loss(1.25 + shift, 1.25, advantage, CLIP), rel=1e-12)


@pytest.mark.parametrize(
    ("shift", "advantage", "trained"),
    [
        (3e-4, 1.0, False),  # already more likely than the clip range allows
        (-3e-4, -1.0, False),  # already less likely
        (3e-4, -1.0, True),  # moved the wrong way: must come back
        (-3e-4, 1.0, True),
        (0.0, 1.0, True),
        (0.0, -1.0, True),
    ],
)
def test_a_ratio_clipped_on_the_good_side_has_no_gradient(
    shift: float, advantage: float, trained: bool
) -> None:
    new = torch.tensor([0.5 + shift], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([0.5], dtype=torch.float64)
    loss_of(IS, new, old, torch.tensor([advantage])).sum().backward()
    expected = -advantage * math.exp(shift) if trained else 0.0
    assert float(new.grad) == pytest.approx(expected, rel=1e-9, abs=0.0)


def policy_log_probs(theta: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    return torch.distributions.Normal(theta, 1.5).log_prob(actions)


def test_ddpo_sf_is_reinforce() -> None:
    """Its gradient is the score times the advantage: (x - theta) / variance for a Gaussian."""
    theta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    actions = torch.tensor([0.1, 2.0, -1.0], dtype=torch.float64)
    advantages = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    new = policy_log_probs(theta, actions)
    loss_of(SF, new, new.detach(), advantages).mean().backward()
    score = (actions - 0.7) / 1.5**2
    assert float(theta.grad) == pytest.approx(-float((advantages * score).mean()), rel=1e-12)


def test_before_any_update_ddpo_is_has_the_gradient_of_ddpo_sf() -> None:
    theta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    actions = torch.linspace(-2, 2, 9, dtype=torch.float64)
    advantages = torch.linspace(1, -3, 9, dtype=torch.float64)
    log_probs = policy_log_probs(theta, actions)
    old = log_probs.detach()
    loss = loss_of(SF, log_probs, old, advantages)
    (sf,) = torch.autograd.grad(loss.sum(), theta, retain_graph=True)
    loss = loss_of(IS, log_probs, old, advantages)
    (importance,) = torch.autograd.grad(loss.sum(), theta)
    assert float(importance) == pytest.approx(float(sf), rel=1e-12)
    assert abs(float(sf)) > 0.1
