"""Processes on a rectified flow, against independent values and formulas in float64."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from pydantic import TypeAdapter
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from ddpo.algorithms.kl import gaussian_kl
from ddpo.config import AnySampler, FlowSampler
from ddpo.diffusion import PROCESSES, MarkovProcess, Transition
from ddpo.errors import ConfigError
from ddpo.models.flow_schedule import FlowSchedule

GOLDEN = Path(__file__).parents[1] / "golden/flow_transitions.safetensors"
TYPES = {"sde": "flow_sde", "cps": "flow_cps", "dance": "dance_sde"}


def golden_cases() -> list[dict[str, Any]]:
    with safe_open(GOLDEN, "pt") as file:
        return json.loads(file.metadata()["cases"])


def process(
    kind: str, *, shift: float = 3.0, noisy: range | None = None, **settings: float
) -> MarkovProcess:
    sampler: FlowSampler = TypeAdapter(AnySampler).validate_python({"type": kind, **settings})
    schedule = FlowSchedule.from_scheduler({"shift": shift}, 2, (16, 8, 8))
    made = PROCESSES[kind](schedule, sampler, torch.device("cpu"), noisy)
    assert isinstance(made, MarkovProcess)
    return made


@pytest.mark.parametrize("case", golden_cases(), ids=lambda case: f"{case['type']}-{case['key']}")
def test_transitions_agree_with_other_implementations(case: dict[str, Any]) -> None:
    values = {
        name.rpartition(".")[2]: value
        for name, value in load_file(GOLDEN).items()
        if name.startswith(f"{case['key']}.")
    }
    flow = process(
        TYPES[case["type"]],
        shift=case["shift"],
        steps=case["steps"],
        noise_level=case["noise_level"],
    )
    steps = torch.full((3,), case["index"])
    step = flow.transition(steps, values["velocity"], values["latents"])
    torch.testing.assert_close(step.mean, values["mean"], atol=1e-5, rtol=0)
    found = step.log_prob(values["next_latents"])
    torch.testing.assert_close(found, values["log_prob"], atol=1e-5, rtol=0)
    if case["type"] == "sde":  # whose KL divergence leaves the step's length out
        assert step.divergence_std.flatten()[0] == pytest.approx(float(values["std_dev_t"]))


def in_float64(
    kind: str, level: float, sigma: float, after: float, first: float, x: Tensor, v: Tensor
) -> tuple[Tensor, float]:
    """Return mean and standard deviation of a step, from the published formulas."""
    dt = after - sigma
    clean, noise = x - sigma * v, x + (1 - sigma) * v
    if kind == "flow_sde":
        spread = level * math.sqrt(sigma / (1 - (first if sigma == 1 else sigma)))
        score = -noise / sigma  # of the marginal at sigma
        mean = x + (v - spread**2 / 2 * score) * dt
        return mean, spread * math.sqrt(-dt)
    if kind == "dance_sde":
        score = (clean * (1 - sigma) - x) / sigma**2
        return x + (v - level**2 / 2 * score) * dt, level * math.sqrt(-dt)
    std = after * math.sin(level * math.pi / 2)
    return (1 - after) * clean + math.sqrt(after**2 - std**2) * noise, std


@pytest.mark.parametrize("kind", ["flow_sde", "flow_cps", "dance_sde"])
@pytest.mark.parametrize(
    ("steps", "level", "shift"), [(6, 0.4, 1.0), (28, 0.9, 3.0), (2, 0.7, 5.0)]
)
def test_every_step_is_the_published_gaussian(
    kind: str, steps: int, level: float, shift: float
) -> None:
    flow = process(kind, shift=shift, steps=steps, noise_level=level)
    sigmas: list[float] = flow.sigmas.double().tolist()  # pyright: ignore[reportAttributeAccessIssue]
    source = torch.Generator().manual_seed(0)
    x, v = (torch.randn(2, 4, 3, 3, generator=source) for _ in range(2))
    for number in range(steps):
        step = flow.transition(torch.full((2,), number), v, x)
        mean, std = in_float64(
            kind, level, sigmas[number], sigmas[number + 1], sigmas[1], x.double(), v.double()
        )
        torch.testing.assert_close(step.mean.double(), mean, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(
            step.std.double().flatten(), torch.full((2,), std).double(), atol=1e-6, rtol=1e-5
        )


def test_cps_has_the_noise_of_the_flow_at_every_step() -> None:
    """Signal 1 - sigma and noise sigma after each step, if the prediction is right."""
    flow = process("flow_cps", steps=8, noise_level=0.6)
    sigmas = flow.sigmas  # pyright: ignore[reportAttributeAccessIssue]
    source = torch.Generator().manual_seed(1)
    clean, noise = torch.ones(1, 1, 200, 200), torch.randn(1, 1, 200, 200, generator=source)
    for number in range(7):
        sigma, after = float(sigmas[number]), float(sigmas[number + 1])
        x = (1 - sigma) * clean + sigma * noise
        step = flow.transition(torch.tensor([number]), noise - clean, x)
        drawn = step.draw(torch.randn(x.shape, generator=source))
        assert float(drawn.mean()) == pytest.approx(1 - after, abs=0.02)
        assert float(drawn.std()) == pytest.approx(after, rel=0.02)


@pytest.mark.parametrize("kind", ["flow_sde", "flow_cps", "dance_sde"])
def test_steps_outside_of_the_noisy_ones_are_those_of_diffusers_scheduler(kind: str) -> None:
    flow = process(kind, steps=10, noisy=range(2, 5))
    assert flow.stochastic().tolist() == [False] * 2 + [True] * 3 + [False] * 5
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(10)
    x, v = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3)
    for number, time in enumerate(scheduler.timesteps):
        step = flow.transition(torch.tensor([number]), v, x)
        theirs = scheduler.step(v, time, x, return_dict=False)[0]
        if number not in range(2, 5):
            assert torch.equal(step.mean, theirs) and not step.std.any()
            assert step.log_prob(x) == 0.0
    assert torch.equal(flow.times, scheduler.timesteps)


def test_the_ode_has_no_noise_at_all() -> None:
    assert not process("ode", steps=5).stochastic().any()


def test_a_kl_divergence_leaves_the_steps_length_out_as_published() -> None:
    flow = process("flow_sde", steps=10, noise_level=0.7)
    x, v, other = (torch.randn(2, 4, 3, 3) for _ in range(3))
    one, two = (flow.transition(torch.tensor([4, 4]), each, x) for each in (v, other))
    sigma, after = (float(flow.sigmas[i]) for i in (4, 5))  # pyright: ignore[reportAttributeAccessIssue]
    spread = 0.7 * math.sqrt(sigma / (1 - sigma))
    expected = ((one.mean - two.mean) ** 2).mean((1, 2, 3)) / (2 * spread**2)
    found = gaussian_kl(one.mean, two.mean, one.divergence_std)
    torch.testing.assert_close(found, expected)
    exact = gaussian_kl(one.mean, two.mean, one.std)
    torch.testing.assert_close(exact * (sigma - after), found)


def test_noising_mixes_straight_lines_and_the_target_is_the_velocity() -> None:
    flow = process("ode", steps=5)
    clean, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    noisy, target = flow.schedule.noised(clean, noise, torch.tensor([0.0, 750.0]))
    assert torch.equal(noisy[0], clean[0])
    torch.testing.assert_close(noisy[1], 0.25 * clean[1] + 0.75 * noise[1])
    assert torch.equal(target, noise - clean)


def test_training_times_are_shifted_logit_normals() -> None:
    source = torch.Generator().manual_seed(0)
    times = torch.stack([process("ode").schedule.training_time(source) for _ in range(4000)]) / 1000
    assert float(times.min()) > 0 and float(times.max()) < 1
    unshifted = times / (3 - 2 * times)  # the inverse of 3 s / (1 + 2 s)
    assert float(torch.logit(unshifted).mean()) == pytest.approx(0, abs=0.06)
    assert float(torch.logit(unshifted).std()) == pytest.approx(1, abs=0.05)


def test_more_steps_than_training_timesteps_are_refused() -> None:
    with pytest.raises(ConfigError, match="set it to at most 1000"):
        process("ode", steps=1001)


def test_log_probs_of_cps_leave_the_variance_out() -> None:
    step = Transition(torch.zeros(1, 4), torch.full((1, 1), 0.1), normalized=False)
    assert float(step.log_prob(torch.full((1, 4), 0.5))) == -0.25
