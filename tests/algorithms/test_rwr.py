from __future__ import annotations

import math
import warnings
from fractions import Fraction

import numpy as np
import pytest

from ddpo.algorithms.rwr import Regression, Rwr, RwrSparse
from ddpo.errors import RewardError
from tests.checks import check_weights_are_a_softmax
from tests.scored import compute_weights

RWR = Rwr(type="rwr")
BY_PROMPT = Rwr(type="rwr", weights_over="prompt")
SPARSE = RwrSparse(type="rwr_sparse")
HALF = RwrSparse(type="rwr_sparse", keep=0.5)
NAN = float("nan")

each_regression = pytest.mark.parametrize(
    "config", [RWR, BY_PROMPT, HALF], ids=["data set", "prompt", "sparse"]
)


def test_weights_are_a_softmax_of_the_rewards() -> None:
    check_weights_are_a_softmax()


@pytest.mark.parametrize("config", [RWR, BY_PROMPT], ids=["data set", "prompt"])
def test_the_mean_weight_is_1(config: Rwr) -> None:
    rewards = np.random.default_rng(0).normal(size=60) * 4
    prompts = [f"prompt {i % 7}" for i in range(60)]
    weights = compute_weights(config, prompts, rewards).weights
    assert sum(map(Fraction, weights)) / 60 == pytest.approx(1, rel=1e-14)
    if config.weights_over == "prompt":
        for number in range(7):
            own = weights[number::7]
            assert sum(map(Fraction, own)) / len(own) == pytest.approx(1, rel=1e-14)


@pytest.mark.parametrize("scale", [1e6, -1e6, 3.4e38])
def test_huge_rewards_neither_overflow_nor_lose_the_best(scale: float) -> None:
    rewards = np.array([1.0, 1.0, 0.0, -1.0]) * scale
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights = compute_weights(RWR, ["a"] * 4, rewards).weights
    assert weights.tolist() == ([2.0, 2.0, 0.0, 0.0] if scale > 0 else [0.0, 0.0, 0.0, 4.0])


def test_with_beta_0_all_samples_weigh_alike_whatever_their_rewards() -> None:
    control = Rwr(type="rwr", beta=0.0)
    weights = compute_weights(control, ["a", "b"] * 2, np.array([5.0, -3e6, 0.0, NAN])).weights
    assert weights.tolist() == [1.0, 1.0, 1.0, 0.0]


def test_a_shift_of_all_rewards_changes_no_weight() -> None:
    rewards = np.array([1.0, 2.5, -0.5])
    here = compute_weights(RWR, ["a"] * 3, rewards).weights
    there = compute_weights(RWR, ["a"] * 3, rewards + 1e6).weights
    assert there == pytest.approx(here, rel=1e-9)
    assert here[1] / here[0] == pytest.approx(math.exp(0.2 * 1.5), rel=1e-14)


@each_regression
def test_failed_samples_get_weight_0_and_stay_out(config: Regression) -> None:
    prompts = ["a", "a", "b", "a", "b", "c"]
    rewards = np.array([1.0, NAN, 9.0, 2.0, 4.0, NAN])
    scored = np.flatnonzero(np.isfinite(rewards))
    whole = compute_weights(config, prompts, rewards)
    without = compute_weights(config, [prompts[i] for i in scored], rewards[scored])
    assert whole.weights[[1, 5]].tolist() == [0.0, 0.0] and whole.count[[1, 5]].tolist() == [0, 0]
    assert whole.weights[scored].tolist() == without.weights.tolist()
    assert whole.count[scored].tolist() == without.count.tolist()
    assert not whole.imputed.any()


@each_regression
def test_an_imputed_sample_weighs_what_its_prompts_mean_would(config: Regression) -> None:
    prompts = ["a", "a", "b", "a", "c"]
    rewards = np.array([1.0, 3.0, 9.0, NAN, NAN])
    found = compute_weights(config, prompts, rewards, impute=True)
    assert found.imputed.tolist() == [False, False, False, True, False]  # c has no mean
    expected = compute_weights(config, prompts, np.array([1.0, 3.0, 9.0, 2.0, NAN]))
    assert found.weights.tolist() == expected.weights.tolist()
    assert found.weights[4] == 0.0


@each_regression
def test_an_epoch_without_any_reward_is_refused(config: Regression) -> None:
    with pytest.raises(RewardError, match="none of the 2 samples"):
        compute_weights(config, ["a", "b"], np.array([NAN, NAN]))


def test_the_count_is_that_of_the_rewards_that_share_a_softmax() -> None:
    prompts, rewards = ["a", "b", "a"], np.array([1.0, 2.0, 3.0])
    assert compute_weights(RWR, prompts, rewards).count.tolist() == [3, 3, 3]
    assert compute_weights(BY_PROMPT, prompts, rewards).count.tolist() == [2, 1, 2]
    assert compute_weights(SPARSE, prompts, rewards).count.tolist() == [2, 1, 2]


def test_sparse_keeps_the_best_share_of_each_prompt() -> None:
    rewards = np.random.default_rng(1).normal(size=50)
    prompts = ["a", "b"] * 20 + ["a"] * 10  # 30 and 20
    weights = compute_weights(SPARSE, prompts, rewards).weights
    kept = {i for i, weight in enumerate(weights) if weight}
    by_reward = sorted(range(50), key=lambda i: rewards[i], reverse=True)
    expected = [i for i in by_reward if prompts[i] == "a"][:3]
    expected += [i for i in by_reward if prompts[i] == "b"][:2]
    assert kept == set(expected)
    assert set(weights.tolist()) == {0.0, 1.0}


def test_sparse_keeps_at_least_one_sample_of_a_prompt_that_has_a_reward() -> None:
    rewards = np.array([3.0, 5.0, NAN, -1.0])
    assert compute_weights(SPARSE, ["a", "a", "b", "c"], rewards).weights.tolist() == [0, 1, 0, 1]


def test_sparse_prefers_the_first_of_equal_rewards() -> None:
    rewards = np.array([1.0, 2.0, 2.0, 2.0, 2.0, 0.0])
    assert compute_weights(HALF, ["a"] * 6, rewards).weights.tolist() == [0, 1, 1, 1, 0, 0]


@pytest.mark.parametrize(
    ("keep", "samples", "kept"), [(0.1, 30, 3), (0.29, 100, 29), (0.5, 5, 2), (1.0, 7, 7)]
)
def test_sparse_reads_the_share_as_the_config_has_it(keep: float, samples: int, kept: int) -> None:
    """In binary 0.29 * 100 is 28.999 and 0.1 * 30 is more than 3."""
    config = RwrSparse(type="rwr_sparse", keep=keep)
    rewards = np.arange(samples, dtype=np.float64)
    assert compute_weights(config, ["a"] * samples, rewards).weights.sum() == kept
