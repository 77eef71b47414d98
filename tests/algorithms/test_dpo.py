"""Diffusion-DPO: its loss by the formula in float64, the pairs that rewards make, and its steps."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from ddpo.algorithms import Dpo
from ddpo.algorithms.base import Credit, Scored, ScoredPart
from ddpo.errors import ConfigError, RewardError
from tests.configs import parse
from tests.noised import KINDS, coefficients, noised_batch, process_of_kind
from tests.tiny import Credit as Table

NAN = float("nan")
TIMES = torch.tensor([750.0, 750.0, 250.0, 250.0])
BEST_WORST = Dpo(type="dpo")
MARGIN = Dpo(type="dpo", pairing="margin")


def target_by_hand(
    kind: str, time: float, clean: torch.Tensor, noise: torch.Tensor
) -> torch.Tensor:
    if kind == "epsilon":
        return noise
    if kind == "velocity":
        return noise - clean
    root, minus = coefficients(kind, time)  # sqrt(alpha) and -sqrt(1 - alpha)
    return root * noise + minus * clean


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("beta", [0.5, 20.0])
def test_loss_and_gradient_are_those_of_the_formula(kind: str, beta: float) -> None:
    """Two pairs, each of one noise; the gradient by hand."""
    source = torch.Generator().manual_seed(3)
    clean, new, base = (
        torch.randn(4, 2, 3, 3, generator=source, dtype=torch.float64) for _ in range(3)
    )
    noise = torch.randn(2, 2, 3, 3, generator=source, dtype=torch.float64).repeat_interleave(2, 0)
    dpo = Dpo(type="dpo", beta=beta)
    prediction = new.clone().requires_grad_()
    none = torch.zeros(4)
    batch = noised_batch(
        process_of_kind(kind), clean, noise, TIMES, prediction, none, {"base": base}
    )
    losses = dpo.losses(batch)
    assert losses.shape == (4,)
    (found,) = torch.autograd.grad(losses.mean(), prediction)
    measures = dpo.measures(batch)
    for pair in range(2):
        better, worse = 2 * pair, 2 * pair + 1
        target = {
            row: target_by_hand(kind, float(TIMES[row]), clean[row], noise[row])
            for row in (better, worse)
        }

        def error(values: torch.Tensor, row: int, target: Any = target) -> float:
            return float(((values[row] - target[row]) ** 2).mean())

        model_diff = error(new, better) - error(new, worse)
        ref_diff = error(base, better) - error(base, worse)
        share = 1 / (1 + math.exp(beta / 2 * (model_diff - ref_diff)))
        # float32 alphas in the schedule against float64 ones here.
        for row in (better, worse):
            assert float(losses[row].detach()) == pytest.approx(-math.log(share), rel=1e-4)
            assert float(measures["implicit_accuracy"][row]) == float(model_diff < ref_diff)
            expected = -beta / 2 * (model_diff - ref_diff)
            assert float(measures["implicit_margin"][row]) == pytest.approx(expected, rel=1e-4)
            sign = 1 if row == better else -1
            by_hand = sign * (1 - share) * beta * (new[row] - target[row]) / new[row].numel() / 2
            largest = float(by_hand.abs().max())
            torch.testing.assert_close(found[row], by_hand, atol=1e-4 * largest, rtol=0)
    assert len({round(each, 6) for each in losses.tolist()}) == 2


def test_a_policy_like_the_base_model_has_the_loss_of_a_coin() -> None:
    source = torch.Generator().manual_seed(3)
    clean, noise, new = (torch.randn(4, 2, 3, 3, generator=source) for _ in range(3))
    process = process_of_kind("epsilon")
    batch = noised_batch(process, clean, noise, TIMES, new, torch.zeros(4), {"base": new})
    assert BEST_WORST.losses(batch).tolist() == pytest.approx([math.log(2)] * 4)
    assert BEST_WORST.measures(batch)["implicit_accuracy"].tolist() == [0.0] * 4


def test_a_preference_beyond_doubt_has_a_finite_loss_and_gradient() -> None:
    clean, noise = torch.zeros(2, 2, 3, 3), torch.zeros(2, 2, 3, 3)
    prediction = torch.tensor([1e3, 0.0]).view(2, 1, 1, 1).expand(2, 2, 3, 3).requires_grad_()
    process, others = process_of_kind("epsilon"), {"base": torch.zeros(2, 2, 3, 3)}
    batch = noised_batch(process, clean, noise, TIMES[:2], prediction, torch.zeros(2), others)
    loss = BEST_WORST.losses(batch).mean()
    assert float(loss.detach()) == pytest.approx(2500 * 1e6)
    (gradient,) = torch.autograd.grad(loss, prediction)
    assert torch.isfinite(gradient).all() and gradient[0].abs().max() > 0


def credit_of(
    algorithm: Dpo, rewards: list[float], size: int = 4, **scored: Any
) -> tuple[Credit, list[tuple[int, int]]]:
    """Return the credit, and its pairs as the better and the worse sample."""
    prompts = [f"prompt {i // size}" for i in range(len(rewards))]
    found = algorithm.credit(Scored(prompts, np.asarray(rewards), size, **scored), {"a": (1.0,)})
    assert found.statistics == {"a": (1.0,)}
    pair, preferred = (found.columns[name].tolist() for name in ("pair", "preferred"))
    made = [
        (
            next(i for i, at in enumerate(pair) if at == number and preferred[i] == 1),
            next(i for i, at in enumerate(pair) if at == number and preferred[i] == 0),
        )
        for number in range(int(max(pair)) + 1)
    ]
    assert len(made) * 2 == sum(at >= 0 for at in pair)
    assert sum(preferred) == len(made)
    return found, made


def test_the_best_of_each_group_is_preferred_to_its_worst() -> None:
    """Rewards of groups lie apart: a pair across prompts would be another one."""
    found, made = credit_of(BEST_WORST, [3.0, 1.0, 2.0, 4.0, 90.0, 70.0, 95.0, 80.0])
    assert made == [(3, 1), (6, 5)]
    assert found.count.tolist() == [4] * 8 and not found.imputed.any()


def test_a_margin_pairs_each_sample_with_its_mirror_while_they_differ_enough() -> None:
    rewards = [5.0, 1.0, 3.5, 3.0, 20.0, 10.0, 12.0, 18.0]
    assert credit_of(MARGIN, rewards)[1] == [(0, 1), (2, 3), (4, 5), (7, 6)]
    two = Dpo(type="dpo", pairing="margin", least_margin=4.0)
    assert credit_of(two, rewards)[1] == [(0, 1), (4, 5), (7, 6)]
    # An odd one in the middle has none.
    assert credit_of(MARGIN, [5.0, 1.0, 3.5, 3.0, 2.0], size=5)[1] == [(0, 1), (2, 4)]
    # It holds for the best and the worst as well.
    most = Dpo(type="dpo", least_margin=9.0)
    assert credit_of(most, rewards)[1] == [(4, 5)]


@pytest.mark.parametrize("algorithm", [BEST_WORST, MARGIN])
def test_samples_that_failed_and_groups_of_equal_rewards_make_no_pair(algorithm: Dpo) -> None:
    rewards = [NAN, 1.0, NAN, 4.0, 7.0, 7.0, 7.0, 7.0, NAN, NAN, NAN, 2.0]
    for impute in (False, True):
        found, made = credit_of(algorithm, rewards, impute=impute)
        assert made == [(3, 1)]
        assert found.count.tolist() == [0, 2, 0, 2, 4, 4, 4, 4, 0, 0, 0, 1]
        assert not found.imputed.any()


def test_of_equal_rewards_the_first_is_the_best_and_the_last_the_worst() -> None:
    assert credit_of(MARGIN, [1.0, 2.0, 2.0, 1.0])[1] == [(1, 3), (2, 0)]


def test_an_epoch_without_any_reward_is_refused() -> None:
    with pytest.raises(RewardError, match="none of the 2 samples"):
        credit_of(BEST_WORST, [NAN, NAN], size=2)


def test_a_shuffled_control_pairs_within_groups_whatever_the_rewards() -> None:
    control = Dpo(type="dpo", shuffle=True)
    rewards = [float(i) for i in range(400)]
    _, made = credit_of(control, rewards, shuffle_seed=3)
    assert len(made) == 100 and all(a // 4 == b // 4 for a, b in made)
    assert 35 <= sum(rewards[a] > rewards[b] for a, b in made) <= 65
    assert credit_of(control, rewards, shuffle_seed=3)[1] == made
    assert credit_of(control, rewards, shuffle_seed=4)[1] != made


def test_rewards_of_a_sum_count_by_their_place_in_the_group() -> None:
    """Their sum alone would be decided by the second, whose values are large."""
    first, second = np.array([1.0, 2.0, 3.0, 4.0]), np.array([300.0, 100.0, 200.0, 201.0])
    parts = (ScoredPart(2.0, first), ScoredPart(1.0, second))
    assert credit_of(BEST_WORST, (first + second).tolist(), parts=parts)[1] == [(3, 1)]
    assert credit_of(BEST_WORST, (first + second).tolist())[1] == [(0, 1)]
    parse(
        algorithm={"type": "dpo"},
        rollouts={"samples_per_prompt": 4},
        reward={"name": "weighted", "parameters": {"normalise": "group", "rewards": [
            {"name": "jpeg_compressibility", "weight": 1.0},
            {"name": "colorfulness", "weight": 1.0},
        ]}},
    )  # fmt: skip


def table(pair: list[int], preferred: list[int]) -> Table:
    return {
        "reward": torch.arange(len(pair)).float() ** 2,
        "pair": torch.tensor(pair).float(),
        "preferred": torch.tensor(preferred).float(),
    }


def test_pairs_stay_together_in_steps_with_the_better_sample_first() -> None:
    algorithm = Dpo(type="dpo", inner_epochs=2, updates_per_epoch=4)
    credit = table([1, -1, 0, 2, 0, 1, 2, -1], [0, 0, 1, 1, 0, 1, 0, 0])
    pairs = {(2, 4), (5, 0), (3, 6)}
    assert algorithm.trained(credit) == [2, 4, 5, 0, 3, 6]
    steps = algorithm.updates(credit, run_seed=1, epoch=2)
    assert [(len(step.samples), step.inner_epoch) for step in steps] == [
        (4, 0), (2, 0), (4, 1), (2, 1),
    ]  # fmt: skip
    for inner in range(2):
        rows = [row for step in steps if step.inner_epoch == inner for row in step.samples]
        assert {*zip(rows[::2], rows[1::2], strict=True)} == pairs
    assert steps == algorithm.updates(credit, run_seed=1, epoch=2)
    orders = {
        tuple(algorithm.updates(credit, run_seed=1, epoch=epoch)[0].samples) for epoch in range(20)
    }
    assert len(orders) > 1
    assert algorithm.credit_metrics(credit, 2) == {
        "pairs": 3,
        "reward_margin": pytest.approx((4 - 16 + 25 - 0 + 9 - 36) / 3),
    }


def test_without_a_pair_there_is_no_step() -> None:
    algorithm = Dpo(type="dpo", inner_epochs=2, updates_per_epoch=4)
    credit = table([-1] * 4, [0] * 4)
    assert [*algorithm.updates(credit, run_seed=1, epoch=2)] == []
    assert algorithm.credit_metrics(credit, 2) == {"pairs": 0}


def test_a_dry_run_is_of_pairs_alone() -> None:
    credit = BEST_WORST.credit_of_all(6)
    assert BEST_WORST.trained(credit) == [*range(6)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollouts": {"samples_per_prompt": 1}}, "samples_per_prompt is 1"),
        ({"trainable": {"type": "full"}}, "reference is the base model"),
        ({"numerics": {"micro_batch_size": 5}}, r"not a multiple of 2: .* dpo .*; set it to 6"),
        ({"algorithm": {"type": "dpo", "inner_epochs": 2}}, "not a multiple of inner_epochs"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_way_out(
    changes: dict[str, object], message: str
) -> None:
    fitting: dict[str, object] = {
        "algorithm": {"type": "dpo"},
        "rollouts": {"samples_per_prompt": 4},
    }
    parse(**fitting)
    with pytest.raises(ConfigError, match=message):
        parse(**{**fitting, **changes})
