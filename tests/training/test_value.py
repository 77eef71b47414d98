"""V(prompt, t): its values, its gradient, and what it does to advantages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ddpo.algorithms.advantages import BatchAdvantages, ValueAdvantages
from ddpo.errors import NonFiniteError
from ddpo.models import Policy
from ddpo.training.critic import Critic
from ddpo.training.value_network import (
    ValueNetwork,
    explained_variance,
    prompt_features,
    time_features,
    value_loss,
)
from tests.scored import compute_advantages
from tests.tiny import PROMPTS, assert_same_tensors, ddim_on, load_policy, tiny_config

TIMES = torch.tensor([667.0, 334.0, 1.0])  # of DDIM in three steps
STEPS = len(TIMES)


@pytest.fixture(scope="module")
def policy(tiny_model: Path) -> Policy:
    """A policy whose embeddings alone are wanted."""
    return load_policy(tiny_config(tiny_model))


def lively_network(features: int = 5) -> ValueNetwork:
    """Return a network whose output layer is not 0, as after training."""
    network = ValueNetwork(features, seed=3)
    source = torch.Generator().manual_seed(4)
    with torch.no_grad():
        network.value.weight.normal_(generator=source)
        network.value.bias.fill_(0.3)
    return network


def written_out(network: ValueNetwork, prompt: NDArray, timestep: float) -> float:
    """V of one prompt at one timestep: a plain network on the two side by side."""
    weights = {name: value.detach().double().numpy() for name, value in network.named_parameters()}
    first = np.concatenate([weights["prompt.weight"], weights["timestep.weight"]], axis=1)
    x = first @ np.concatenate([prompt, [2 * timestep / 1000 - 1]]) + weights["prompt.bias"]
    x = x / (1 + np.exp(-x))
    x = weights["hidden.weight"] @ x + weights["hidden.bias"]
    x = x / (1 + np.exp(-x))
    return float((weights["value.weight"] @ x + weights["value.bias"])[0])


def test_values_are_those_of_a_network_on_prompt_and_timestep_side_by_side() -> None:
    network = lively_network()
    prompts = torch.randn((4, 5), generator=torch.Generator().manual_seed(0))
    found = network(prompts, time_features(TIMES, 1000))
    expected = [
        [written_out(network, prompt.double().numpy(), float(t)) for t in TIMES]
        for prompt in prompts
    ]
    assert found.shape == (4, STEPS)
    assert found.detach().numpy() == pytest.approx(np.array(expected), abs=1e-5)
    assert np.ptp(np.array(expected), axis=0).min() > 0.01  # prompts and times matter
    assert np.ptp(np.array(expected), axis=1).min() > 0.01


def test_a_prompts_features_are_its_mean_token_relative_to_the_empty_prompts() -> None:
    embeddings = torch.randn((2, 7, 6), generator=torch.Generator().manual_seed(0))
    empty = torch.randn((1, 7, 6), generator=torch.Generator().manual_seed(1))
    found = prompt_features(embeddings, empty)
    for row, embedding in enumerate(embeddings.double().numpy()):
        x = embedding.sum(axis=0) / 7 - empty[0].double().numpy().sum(axis=0) / 7
        x = (x - x.sum() / 6) / np.sqrt(((x - x.sum() / 6) ** 2).sum() / 6 + 1e-5)
        assert found[row].numpy() == pytest.approx(x, abs=1e-5)


def test_a_new_network_is_0_everywhere_and_the_same_for_the_same_seed() -> None:
    prompts = torch.randn((4, 5), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    network = ValueNetwork(5, seed=3)
    assert not network(prompts, time_features(TIMES, 1000)).any()
    torch.manual_seed(2)
    assert_same_tensors(ValueNetwork(5, seed=3).state_dict(), network.state_dict())
    other = ValueNetwork(5, seed=4).state_dict()
    assert not torch.equal(other["prompt.weight"], network.state_dict()["prompt.weight"])


def test_the_losss_gradient_is_that_of_finite_differences() -> None:
    network = lively_network().double()
    prompts = torch.randn((4, 5), generator=torch.Generator().manual_seed(0)).double()
    rewards = torch.tensor([1.5, -0.5, 0.25, -2.0], dtype=torch.float64)
    times = time_features(TIMES, 1000).double()

    def loss_written_out() -> float:
        return sum(
            (written_out(network, prompt.numpy(), float(t)) - float(reward)) ** 2
            for prompt, reward in zip(prompts, rewards, strict=True)
            for t in TIMES
        ) / (4 * STEPS)

    loss = value_loss(network(prompts, times), rewards)
    loss.backward()
    assert loss.item() == pytest.approx(loss_written_out(), abs=1e-7)  # float32 times
    step = 1e-5
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None
        places = parameter.grad.abs().flatten().argsort(descending=True)[:2]
        for place in places.tolist():
            entry = parameter.data.view(-1)
            whole = entry[place].item()
            entry[place] = whole + step
            above = loss_written_out()
            entry[place] = whole - step
            below = loss_written_out()
            entry[place] = whole
            found = parameter.grad.flatten()[place].item()
            assert abs(found) > 1e-3, name
            assert found == pytest.approx((above - below) / (2 * step), rel=1e-4), name


def test_explained_variance_is_its_formula() -> None:
    rewards = torch.tensor([1.0, 2.0, 4.0])
    values = torch.tensor([[1.0, 0.0], [2.0, 1.0], [3.0, 2.0]])
    left = [0.0, 1.0, 0.0, 1.0, 1.0, 2.0]
    mean = sum(left) / 6
    unexplained = sum((x - mean) ** 2 for x in left) / 6
    spread = sum((r - 7 / 3) ** 2 for r in (1.0, 2.0, 4.0)) / 3
    assert explained_variance(values, rewards) == pytest.approx(1 - unexplained / spread)
    assert explained_variance(rewards[:, None].expand(3, 2), rewards) == 1.0
    assert explained_variance(torch.zeros(3, 2), rewards) == 0.0
    assert explained_variance(values, torch.full((3,), 0.1)) is None


# As a baseline of an epoch


def features_of(policy: Policy, prompts: list[str]) -> torch.Tensor:
    return prompt_features(policy.encode(prompts)["text"], policy.encode([""])["text"])


def settings(**changes: float) -> ValueAdvantages:
    return ValueAdvantages.model_validate({"type": "value", **changes})


def baseline_on(
    policy: Policy,
    prompts: list[str],
    kept: dict[str, torch.Tensor] | None = None,
    **changes: float,
) -> Critic:
    return Critic(
        policy,
        ddim_on(policy, steps=STEPS),
        prompts,
        kept or {},
        settings(**changes).critic,
        seed=0,
    )


def normalised_rewards(prompts: list[str], rewards: NDArray) -> torch.Tensor:
    batch = compute_advantages(settings(), {}, prompts, rewards)
    return torch.tensor(batch.advantages, dtype=torch.float32)


def test_before_any_training_advantages_are_the_batchs(policy: Policy) -> None:
    prompts = [*PROMPTS, "a cat"]
    rewards = np.array([1.0, 5.0, 2.0, float("nan"), 8.0, -3.0, 2.5])
    batch = compute_advantages(BatchAdvantages(type="batch"), {}, prompts, rewards)
    expected = torch.tensor(batch.advantages, dtype=torch.float32)
    found = baseline_on(policy, prompts).advantages(
        normalised_rewards(prompts, rewards), torch.tensor(np.isfinite(rewards))
    )
    assert torch.equal(found, expected[:, None].expand(7, STEPS))


def test_advantages_are_rewards_less_v_clipped_and_0_without_a_reward(policy: Policy) -> None:
    prompts = ["a cat", "a dog", "a cat", "a horse"]
    trained = baseline_on(policy, prompts, value_epochs=100, value_learning_rate=1e-2, clip=1.5)
    rewards = torch.tensor([1.0, -2.0, 0.5, 3.0])
    everybody = torch.ones(4, dtype=torch.bool)
    trained.learn(torch.tensor([0.7, -1.0, 0.7, 1.0]), everybody)
    scored = torch.tensor([True, True, False, True])
    found = trained.advantages(rewards, scored)
    embedded = features_of(policy, prompts).double().numpy()
    for row in range(4):
        for column, time in enumerate(TIMES.tolist()):
            value = written_out(trained.network, embedded[row], time)
            expected = min(max(float(rewards[row]) - value, -1.5), 1.5) if scored[row] else 0.0
            assert float(found[row, column]) == pytest.approx(expected, abs=1e-5)
    assert found[3].eq(1.5).all() and found[1].abs().max() < 1.5  # clipped, and not


def test_v_learns_the_prompts_means_and_advantages_vary_less(policy: Policy) -> None:
    source = np.random.default_rng(0)
    prompts = [PROMPTS[i % 4] for i in range(64)]
    means = np.array([-3.0, -1.0, 1.0, 3.0])
    kept: dict[str, torch.Tensor] = {}
    everybody = torch.ones(64, dtype=torch.bool)
    spreads, explained = [], []
    for _ in range(12):
        rewards = normalised_rewards(prompts, means[np.arange(64) % 4] + source.normal(size=64))
        baseline = baseline_on(policy, prompts, kept, value_learning_rate=1e-2)
        spreads.append(float(baseline.advantages(rewards, everybody).var()))
        measured = baseline.learn(rewards, everybody)
        assert measured["value_explained_variance"] is not None
        explained.append(measured["value_explained_variance"])
        kept = baseline.state()
    # Rewards are prompts' means of variance 5 and noise of variance 1.
    assert abs(explained[0]) < 1e-12 and explained[-1] == pytest.approx(5 / 6, abs=0.05)
    assert spreads[0] == pytest.approx(1.0, abs=0.05)
    assert spreads[-1] == pytest.approx(1 / 6, abs=0.05)
    values = baseline_on(policy, prompts, kept).values()[:4].detach().double().numpy()
    expected = means / np.sqrt(6)
    assert values == pytest.approx(np.repeat(expected[:, None], STEPS, axis=1), abs=0.2)


def test_samples_without_a_reward_teach_nothing(policy: Policy) -> None:
    prompts = ["a cat", "a dog", "a cat", "a horse"]
    rewards = torch.tensor([1.0, -2.0, 0.5, 3.0])
    scored = torch.tensor([True, True, False, True])
    states = []
    for value in (0.5, 4.0):
        rewards[2] = value
        baseline = baseline_on(policy, prompts)
        measured = baseline.learn(rewards, scored)
        states.append(baseline.state())
        assert measured["value_loss"] == pytest.approx((1.0 + 4.0 + 9.0) / 3, rel=1e-6)
    assert_same_tensors(*states)


def test_trainings_are_those_of_one_adamw_that_lives_on(policy: Policy) -> None:
    prompts, rewards = ["a cat", "a dog"], torch.tensor([1.0, -1.0])
    everybody = torch.ones(2, dtype=torch.bool)
    kept: dict[str, torch.Tensor] = {}
    for _ in range(2):
        baseline = baseline_on(policy, prompts, kept, value_epochs=3)
        baseline.learn(rewards, everybody)
        kept = baseline.state()
    whole = baseline_on(policy, prompts, value_epochs=6)
    whole.learn(rewards, everybody)
    assert_same_tensors(kept, whole.state())
    network = baseline_on(policy, prompts).network
    adamw = torch.optim.AdamW(network.parameters(), lr=1e-3, weight_decay=1e-4)
    embedded = features_of(policy, prompts)
    for _ in range(6):
        adamw.zero_grad()
        loss = (network(embedded, time_features(TIMES, 1000)) - rewards[:, None]).square()
        loss.mean().backward()
        adamw.step()
    for name, value in network.state_dict().items():
        torch.testing.assert_close(kept[f"weight/{name}"], value, rtol=0, atol=1e-6)
    assert {float(v) for name, v in kept.items() if name.startswith("step/")} == {6.0}


def test_a_v_that_ran_away_is_refused_by_name(policy: Policy) -> None:
    baseline = baseline_on(policy, ["a cat", "a dog"], value_learning_rate=1e6)
    with pytest.raises(
        NonFiniteError, match=r"Lower algorithm\.advantages\.value_learning_rate, now 1e\+06"
    ):
        baseline.learn(torch.tensor([1.0, -1.0]), torch.ones(2, dtype=torch.bool))
