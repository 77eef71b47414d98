from __future__ import annotations

import math

import numpy as np
import pytest

from ddpo.algorithms.advantages import LeaveOneOutAdvantages
from ddpo.errors import RewardError
from tests.scored import compute_advantages

CONFIG = LeaveOneOutAdvantages(type="leave_one_out")
NAN = float("nan")


def test_a_sample_is_compared_with_the_others_of_its_prompt() -> None:
    prompts = ["a", "b", "a", "b", "a"]
    rewards = [1.0, 10.0, 2.0, 14.0, 6.0]
    batch = compute_advantages(CONFIG, {"a": (9.0,)}, prompts, np.array(rewards))
    mean = sum(rewards) / 5
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 5)
    others = [(2.0 + 6.0) / 2, 14.0, (1.0 + 6.0) / 2, 10.0, (1.0 + 2.0) / 2]
    expected = [(r - o) / (std + 1e-6) for r, o in zip(rewards, others, strict=True)]
    assert batch.advantages == pytest.approx(expected, rel=1e-12)
    assert batch.mean.tolist() == others
    assert batch.std == pytest.approx([std] * 5)
    assert batch.count.tolist() == [2, 1, 2, 1, 2]
    assert batch.statistics == {"a": (9.0,)}  # neither used nor added to


def test_a_prompt_with_one_sample_is_compared_with_all_others_of_the_batch() -> None:
    batch = compute_advantages(CONFIG, {}, ["a", "a", "b"], np.array([1.0, 2.0, 9.0]))
    assert batch.mean.tolist() == [2.0, 1.0, 1.5]
    assert batch.count.tolist() == [1, 1, 2]


def test_failed_samples_stay_out_of_everybodys_mean_and_get_advantage_0() -> None:
    prompts = ["a", "a", "a", "b", "b"]
    rewards = np.array([1.0, NAN, 3.0, NAN, 8.0])
    whole = compute_advantages(CONFIG, {}, prompts, rewards)
    scored = np.flatnonzero(np.isfinite(rewards))
    without = compute_advantages(CONFIG, {}, [prompts[i] for i in scored], rewards[scored])
    assert whole.advantages[scored].tolist() == without.advantages.tolist()
    assert whole.count[scored].tolist() == without.count.tolist() == [1, 1, 2]
    assert whole.advantages[[1, 3]].tolist() == [0.0, 0.0]
    assert np.isfinite(whole.mean).all()


def test_an_imputed_sample_is_as_good_as_its_others_and_moves_nobodys_mean() -> None:
    prompts, rewards = ["a", "a", "a", "b"], np.array([1.0, NAN, 3.0, 8.0])
    imputed = compute_advantages(CONFIG, {}, prompts, rewards, impute=True)
    dropped = compute_advantages(CONFIG, {}, prompts, rewards)
    assert imputed.imputed.tolist() == [False, True, False, False]
    assert imputed.mean[1] == 2.0 and imputed.advantages[1] == 0.0
    assert imputed.advantages.tolist() == dropped.advantages.tolist()


def test_the_only_scored_sample_has_nothing_to_be_better_than() -> None:
    batch = compute_advantages(CONFIG, {}, ["a", "a"], np.array([5.0, NAN]))
    assert batch.advantages.tolist() == [0.0, 0.0]
    assert batch.count.tolist() == [0, 1]


def test_no_reward_at_all_is_refused() -> None:
    with pytest.raises(RewardError, match="none of the 2 samples"):
        compute_advantages(CONFIG, {}, ["a", "b"], np.array([NAN, NAN]))


def test_advantages_are_clipped() -> None:
    config = LeaveOneOutAdvantages(type="leave_one_out", clip=2.5)
    batch = compute_advantages(config, {}, ["a"] * 100, np.array([0.0] * 99 + [1000.0]))
    assert batch.advantages.max() == 2.5


def test_a_shuffled_control_deals_the_same_advantages_to_other_samples() -> None:
    rewards = np.random.default_rng(0).normal(size=32)
    prompts = [f"prompt {i % 4}" for i in range(32)]
    plain = compute_advantages(CONFIG, {}, prompts, rewards)
    dealt = compute_advantages(CONFIG.model_copy(update={"shuffle": True}), {}, prompts, rewards)
    assert sorted(dealt.advantages) == sorted(plain.advantages)
    assert dealt.advantages.tolist() != plain.advantages.tolist()


def test_the_baseline_leaves_the_expected_gradient_as_it_is() -> None:
    """Two actions, theta = 0: E[(r - b) d log p] is that of the reward alone, unlike r - mean."""
    reward = {0: 1.0, 1: 3.0}
    score = {0: -0.5, 1: 0.5}  # of p(1) = sigmoid(theta), at theta = 0
    exact = sum(0.5 * reward[a] * score[a] for a in (0, 1))
    found = 0.0
    for draws in np.ndindex(2, 2, 2):
        rewards = np.array([reward[a] for a in draws])
        if rewards.std() == 0:
            continue  # all alike: no advantage
        batch = compute_advantages(CONFIG, {}, ["a"] * 3, rewards)
        advantages = batch.advantages * (rewards.std() + 1e-6)
        found += sum(x * score[a] for x, a in zip(advantages, draws, strict=True)) / 3 / 8
    assert found == pytest.approx(exact, rel=1e-12)
