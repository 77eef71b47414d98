"""The KL divergence from the base model, step by step."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ddpo.config import DdimSampler
from ddpo.diffusion.divergence import kl_to_base
from ddpo.diffusion.sampling import sample
from ddpo.diffusion.window import process_of
from ddpo.models import Policy
from tests.tiny import grow_adapter, load_policy, tiny_config

SAMPLER = DdimSampler(steps=4, guidance_scale=3.0, eta=1.0)
PROMPTS, SEEDS = ["a cat", "a dog"], [1, 2]


@pytest.fixture
def policy(tiny_model: Path) -> Policy:
    return load_policy(tiny_config(tiny_model))


def test_an_untrained_adapter_has_not_moved(policy: Policy) -> None:
    assert kl_to_base(policy, PROMPTS, SEEDS, SAMPLER).nan_to_num().abs().max() == 0


@torch.no_grad()
def test_it_is_the_divergence_of_torchs_gaussians_on_the_policys_own_samples(
    policy: Policy,
) -> None:
    grow_adapter(policy)
    found = kl_to_base(policy, PROMPTS, SEEDS, SAMPLER)
    latents = sample(policy, PROMPTS, SEEDS, SAMPLER).latents
    process, encoded = process_of(policy, SAMPLER), policy.encode(PROMPTS)
    for number in range(process.steps):
        steps = torch.full((2,), number)
        if not process.stochastic()[number]:
            assert found[number].isnan()
            continue
        gaussians = []
        for weights in ("trained", "base"):
            with policy.weights.use(weights):
                output = policy.predict(latents[:, number], process.times[steps], encoded, 3.0)
            each = process.transition(steps, output, latents[:, number])
            gaussians.append(Normal(each.mean.double(), each.std.double()))
        expected = kl_divergence(*gaussians).mean()
        assert expected > 1e-5
        assert found[number].item() == pytest.approx(expected.item(), rel=1e-5)


def test_steps_without_noise_have_none(policy: Policy) -> None:
    grow_adapter(policy)
    assert kl_to_base(policy, PROMPTS, SEEDS, SAMPLER.changed(eta=0.0)).isnan().all()
