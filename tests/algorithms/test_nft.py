"""DiffusionNFT's loss: golden values, its formula in float64, and its optimum."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from ddpo.algorithms import Nft
from ddpo.algorithms.advantages import GroupAdvantages
from ddpo.algorithms.matching import PUBLISHED_SCHEDULES
from ddpo.config import RunConfig
from ddpo.errors import ConfigError
from tests.configs import parse
from tests.noised import KINDS, coefficients, noised_batch, process_of_kind

GOLDEN = Path(__file__).parents[1] / "golden/nft_loss.safetensors"
TIMES = torch.tensor([999.0, 750.0, 250.0, 500.0])
ADVANTAGES = [-6.0, -1.25, 0.5, 4.0]  # the first is clipped

each_kind = pytest.mark.parametrize("kind", KINDS)


def golden_cases() -> list[dict[str, float | str]]:
    with safe_open(GOLDEN, "pt") as file:
        return json.loads(file.metadata()["cases"])


@pytest.mark.parametrize("case", golden_cases(), ids=lambda case: case["key"])
def test_loss_and_gradient_are_golden(case: dict[str, float]) -> None:
    golden = {
        name.rpartition(".")[2]: value
        for name, value in load_file(GOLDEN).items()
        if name.startswith(f"{case['key']}.")
    }
    advantages = GroupAdvantages(type="group", clip=case["adv_clip_max"])
    nft = Nft(type="nft", beta=case["beta"], kl_weight=1.0, advantages=advantages)
    prediction = golden["v"].requires_grad_()
    batch = noised_batch(
        process_of_kind("velocity"),
        golden["x0"],
        golden["noise"],
        golden["t"] * 1000,
        prediction,
        golden["advantages"],
        {"old": golden["v_old"], "base": golden["v_ref"]},
    )
    mixed = case["beta"] * prediction + (1 - case["beta"]) * golden["v_old"]
    other = (1 + case["beta"]) * golden["v_old"] - case["beta"] * prediction
    close = {"atol": 1e-5, "rtol": 0}
    torch.testing.assert_close(nft.errors(batch, mixed), golden["positive_loss"], **close)
    torch.testing.assert_close(nft.errors(batch, other), golden["negative_loss"], **close)
    loss = nft.policy_losses(batch).mean()
    torch.testing.assert_close(loss[None], golden["policy_loss"], **close)
    penalty = (nft.losses(batch) - nft.policy_losses(batch)).mean()
    torch.testing.assert_close(penalty[None], golden["kl"], **close)
    (found,) = torch.autograd.grad(loss, prediction)
    torch.testing.assert_close(found, golden["grad_v"], **close)


def drawn(count: int = 4) -> list[torch.Tensor]:
    source = torch.Generator().manual_seed(3)
    return [torch.randn(count, 2, 3, 3, generator=source, dtype=torch.float64) for _ in range(5)]


@each_kind
@pytest.mark.parametrize("adaptive", [True, False])
def test_loss_and_gradient_are_those_of_the_formula(kind: str, adaptive: bool) -> None:
    """The gradient by hand: the clean latents are linear in the prediction."""
    clean, noise, new, old, base = drawn()
    beta, clip, weight = 0.4, 5.0, 0.3
    nft = Nft(type="nft", beta=beta, kl_weight=weight, adaptive=adaptive)
    prediction = new.clone().requires_grad_()
    process = process_of_kind(kind)
    advantages = torch.tensor(ADVANTAGES)
    batch = noised_batch(
        process, clean, noise, TIMES, prediction, advantages, {"old": old, "base": base}
    )
    losses = nft.losses(batch)
    (found,) = torch.autograd.grad(losses.sum(), prediction)
    for row in range(4):
        a, b = coefficients(kind, float(TIMES[row]))
        noisy = process.schedule.noised(clean, noise, TIMES)[0][row]
        better = (min(max(ADVANTAGES[row], -clip), clip) / clip + 1) / 2
        expected_loss, gradient = weight * ((new[row] - base[row]) ** 2).mean(), 0.0
        for share, sign in ((better, 1), (1 - better, -1)):
            mixed = old[row] + sign * beta * (new[row] - old[row])
            error = a * noisy + b * mixed - clean[row]
            size = max(float(error.abs().mean()), 1e-5) if adaptive else 1.0
            expected_loss = expected_loss + clip * share / beta * (error**2).mean() / size
            gradient = gradient + sign * share * clip * 2 * b * error / size / error.numel()
        gradient = gradient + weight * 2 * (new[row] - base[row]) / new[row].numel()
        # float32 alphas in the schedule against float64 ones here.
        assert float(losses.detach()[row]) == pytest.approx(float(expected_loss), rel=1e-4)
        largest = float(gradient.abs().max())
        torch.testing.assert_close(found[row], gradient, atol=1e-4 * largest, rtol=0)


@each_kind
@pytest.mark.parametrize("beta", [1.0, 0.1])
def test_without_adaptive_weights_a_linear_model_is_led_to_the_published_optimum(
    kind: str, beta: float
) -> None:
    clean, noise, _, old, _ = drawn(2)
    process, times = process_of_kind(kind), torch.tensor([750.0, 250.0])
    advantages = torch.tensor([2.0, -3.5], dtype=torch.float64)
    nft = Nft(type="nft", beta=beta, kl_weight=0.0, adaptive=False)
    source = torch.Generator().manual_seed(5)
    features = torch.randn(36, 36, generator=source, dtype=torch.float64)

    def loss(parameters: torch.Tensor) -> torch.Tensor:
        prediction = (features @ parameters).view_as(clean)
        others = {"old": old}
        batch = noised_batch(process, clean, noise, times, prediction, advantages, others)
        return nft.losses(batch).sum()

    start = torch.zeros(36, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(loss(start), start)
    curvature = torch.autograd.functional.hessian(loss, start)
    assert isinstance(curvature, torch.Tensor)
    found = (features @ torch.linalg.solve(curvature, -gradient)).view_as(clean)
    target = process.schedule.noised(clean, noise, times)[1]
    towards = (2 * (advantages / 5 / 2 + 0.5) - 1).view(-1, 1, 1, 1)
    expected = old + towards * (target - old) / beta
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "steps", "decay"),
    [
        ("on_policy", 500, 0.0),
        ("half", 1, 0.001),
        ("half", 499, 0.499),
        ("half", 5000, 0.5),
        ("late", 75, 0.0),
        ("late", 76, 0.0075),
        ("late", 1000, 0.999),
    ],
)
def test_published_schedules_of_the_old_weights(name: str, steps: int, decay: float) -> None:
    config = parse(algorithm={**NFT, "old_decay": name})
    assert config.algorithm.old_decay == PUBLISHED_SCHEDULES[name]
    assert config.algorithm.decay_of_old(steps) == pytest.approx(decay)


NFT = {"type": "nft", "advantages": {"type": "per_prompt"}}


def test_a_config_is_read_again_as_it_was_written() -> None:
    config = parse(algorithm={**NFT, "old_decay": "late"})
    again = RunConfig.model_validate(config.whole())
    assert again == config and again.algorithm.old_decay.after == 75


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": {**NFT, "old_decay": "slow"}}, "on_policy, half, late"),
        ({"algorithm": {"type": "nft"}}, "samples_per_prompt is 1"),
        ({"algorithm": {"type": "nft", "advantages": {"type": "value"}}}, "value function"),
        ({"algorithm": NFT, "trainable": {"type": "full"}}, "kl_weight to 0"),
        ({"algorithm": {**NFT, "updates_per_epoch": 3}}, "does not divide"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_way_out(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(**changes)
