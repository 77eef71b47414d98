from __future__ import annotations

import math

import numpy as np
import pytest

from ddpo.algorithms.advantages import BatchAdvantages, PerPromptAdvantages
from ddpo.errors import RewardError
from tests.checks import check_advantages_are_golden
from tests.scored import compute_advantages

PER_PROMPT = PerPromptAdvantages(buffer_size=4, min_count=2, clip=5.0)
BATCH = BatchAdvantages(type="batch")


def test_advantages_are_those_of_an_independent_implementation_over_six_epochs() -> None:
    check_advantages_are_golden()


def test_the_batch_is_normalised_by_its_own_mean_and_population_deviation() -> None:
    batch = compute_advantages(BATCH, {}, ["a", "b", "c", "d"], np.array([1.0, 2.0, 3.0, 6.0]))
    std = math.sqrt((4 + 1 + 0 + 9) / 4)
    expected = [(r - 3.0) / (std + 1e-6) for r in (1, 2, 3, 6)]
    assert batch.advantages == pytest.approx(expected, rel=1e-12)
    assert batch.mean.tolist() == [3.0] * 4 and batch.count.tolist() == [4] * 4
    assert batch.std == pytest.approx([std] * 4)
    assert batch.statistics == {}


def test_a_prompt_is_normalised_by_its_own_rewards_the_current_ones_among_them() -> None:
    before = {"a": (10.0, 20.0)}
    batch = compute_advantages(PER_PROMPT, before, ["a", "b", "a"], np.array([30.0, 5.0, 40.0]))
    mean, std = 25.0, math.sqrt((225 + 25 + 25 + 225) / 4)
    assert batch.advantages[0] == pytest.approx((30 - mean) / (std + 1e-6))
    assert batch.advantages[2] == pytest.approx((40 - mean) / (std + 1e-6))
    assert batch.count[[0, 2]].tolist() == [4, 4]
    assert batch.statistics == {"a": (10.0, 20.0, 30.0, 40.0), "b": (5.0,)}
    assert before == {"a": (10.0, 20.0)}


def test_a_buffer_forgets_the_oldest() -> None:
    before = {"a": (1.0, 2.0, 3.0, 4.0)}
    batch = compute_advantages(PER_PROMPT, before, ["a", "a"], np.array([5.0, 6.0]))
    assert batch.statistics == {"a": (3.0, 4.0, 5.0, 6.0)}
    assert batch.mean.tolist() == [4.5, 4.5]


def test_a_prompt_with_few_rewards_is_normalised_by_the_whole_batch() -> None:
    rewards = np.array([1.0, 2.0, 9.0])
    batch = compute_advantages(PER_PROMPT, {}, ["a", "a", "b"], rewards)
    assert batch.count.tolist() == [2, 2, 3]
    assert batch.mean[2] == 4.0
    assert batch.std[2] == pytest.approx(rewards.std())
    assert batch.advantages[2] == pytest.approx((9.0 - 4.0) / (rewards.std() + 1e-6))
    assert batch.advantages[:2] == pytest.approx([-1.0, 1.0], abs=1e-5)


def test_min_count_counts_the_current_rewards() -> None:
    config = PerPromptAdvantages(buffer_size=16, min_count=3)
    rewards = np.array([1.0, 2.0, 60.0, 80.0])
    short = compute_advantages(config, {}, ["a", "a", "b", "b"], rewards)
    assert short.count.tolist() == [4] * 4
    enough = compute_advantages(config, {"a": (0.0,)}, ["a", "a", "b", "b"], rewards)
    assert enough.count.tolist() == [3, 3, 4, 4] and enough.mean[0] == 1.0


@pytest.mark.parametrize("config", [PER_PROMPT, BATCH])
def test_failed_samples_get_advantage_0_and_stay_out_of_the_statistics(
    config: PerPromptAdvantages | BatchAdvantages,
) -> None:
    prompts = ["a", "a", "a", "b", "b"]
    rewards = np.array([1.0, np.nan, 3.0, 4.0, 8.0])
    whole = compute_advantages(config, {}, prompts, rewards)
    scored = np.flatnonzero(np.isfinite(rewards))
    without = compute_advantages(config, {}, [prompts[i] for i in scored], rewards[scored])
    assert whole.advantages[1] == 0.0
    assert whole.advantages[scored].tolist() == without.advantages.tolist()
    assert whole.statistics == without.statistics
    assert whole.count[scored].tolist() == without.count.tolist()


def test_a_prompt_whose_samples_all_failed_gets_no_statistics_of_nan() -> None:
    batch = compute_advantages(PER_PROMPT, {}, ["a", "b", "b"], np.array([np.nan, 1.0, 2.0]))
    assert batch.statistics == {"a": (), "b": (1.0, 2.0)}
    assert np.isfinite(batch.advantages).all() and batch.advantages[0] == 0.0


@pytest.mark.parametrize("config", [PER_PROMPT, BATCH])
def test_an_epoch_without_any_reward_is_refused(
    config: PerPromptAdvantages | BatchAdvantages,
) -> None:
    with pytest.raises(RewardError, match="none of the 2 samples"):
        compute_advantages(config, {}, ["a", "b"], np.array([np.nan, np.nan]))


@pytest.mark.parametrize("kind", ["per_prompt", "batch"])
def test_advantages_are_clipped(kind: str) -> None:
    rewards = np.array([0.0] * 99 + [1000.0])
    config = (
        PerPromptAdvantages(buffer_size=100, min_count=2, clip=2.5)
        if kind == "per_prompt"
        else BatchAdvantages(type="batch", clip=2.5)
    )
    batch = compute_advantages(config, {}, ["a"] * 100, rewards)
    assert batch.advantages.max() == 2.5
    assert batch.advantages.min() == pytest.approx(-10 / (rewards.std() + 1e-6))


def test_equal_rewards_give_advantage_0() -> None:
    batch = compute_advantages(BATCH, {}, ["a", "b"], np.array([7.0, 7.0]))
    assert batch.advantages.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("kind", ["per_prompt", "batch"])
def test_a_shuffled_control_deals_the_same_advantages_to_other_samples(kind: str) -> None:
    config = PER_PROMPT if kind == "per_prompt" else BATCH
    rewards = np.random.default_rng(0).normal(size=32)
    prompts = [f"prompt {i % 4}" for i in range(32)]
    plain = compute_advantages(config, {}, prompts, rewards, shuffle_seed=1)
    shuffled = config.model_copy(update={"shuffle": True})
    dealt = compute_advantages(shuffled, {}, prompts, rewards, shuffle_seed=1)
    again = compute_advantages(shuffled, {}, prompts, rewards, shuffle_seed=1)
    other = compute_advantages(shuffled, {}, prompts, rewards, shuffle_seed=2)
    assert sorted(dealt.advantages) == sorted(plain.advantages)
    assert dealt.advantages.tolist() != plain.advantages.tolist()
    assert dealt.advantages.tolist() == again.advantages.tolist()
    assert dealt.advantages.tolist() != other.advantages.tolist()
    assert dealt.statistics == plain.statistics


@pytest.mark.parametrize("config", [PER_PROMPT, BATCH], ids=["per prompt", "batch"])
def test_an_imputed_sample_counts_as_its_prompts_mean_and_moves_no_statistic(config) -> None:
    prompts = ["a", "a", "b", "a", "c"]
    rewards = np.array([1.0, 3.0, 9.0, np.nan, np.nan])
    dropped = compute_advantages(config, {}, prompts, rewards)
    imputed = compute_advantages(config, {}, prompts, rewards, impute=True)
    assert imputed.statistics == dropped.statistics
    for name in ("mean", "std", "count"):
        assert np.array_equal(getattr(imputed, name), getattr(dropped, name))
    # 'c' has no reward to take a mean of.
    assert imputed.imputed.tolist() == [False, False, False, True, False]
    assert not dropped.imputed.any()
    expected = (2.0 - imputed.mean[3]) / (imputed.std[3] + 1e-6)
    assert imputed.advantages[3] == pytest.approx(expected, rel=1e-12)
    assert dropped.advantages[3] == dropped.advantages[4] == imputed.advantages[4] == 0.0
    assert np.array_equal(imputed.advantages[:3], dropped.advantages[:3])


def test_a_sample_is_imputed_from_what_its_prompt_had_in_earlier_epochs() -> None:
    before = {"a": (4.0, 8.0)}
    batch = compute_advantages(PER_PROMPT, before, ["a", "b"], np.array([np.nan, 1.0]), impute=True)
    assert batch.imputed.tolist() == [True, False]
