"""Bugs planted on purpose: each must turn a check red that is green on the right code.

All of them have been made in published trainers or reported against them.
"""

from __future__ import annotations

import io
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch

import ddpo_workflow.tasks.update
from ddpo.algorithms import rwr as rwr_module
from ddpo.algorithms.advantages import PerPromptAdvantages
from ddpo.algorithms.advantages import base as advantages_module
from ddpo.algorithms.advantages.base import Moments
from ddpo.algorithms.base import PromptStatistics, Scored
from ddpo.diffusion import Transition
from ddpo.diffusion.ddim import Ddim
from ddpo.models import Conditioning, Policy
from ddpo.models.schedule import NoiseSchedule
from ddpo.models.stable_diffusion import StableDiffusion
from ddpo.runs import RunHandle, start_run
from ddpo.store import manifests
from ddpo.store.artefacts import AdvantageTable
from ddpo.store.kinds import CHECKPOINT
from ddpo.store.tables import AdvantageRow
from ddpo.training.denoising import DenoisingGradient
from ddpo.training.loop import initial_state, update
from ddpo.training.noising import Noising
from ddpo.training.pairs import Pairs
from ddpo.training.samples import FinalLatents, Rollouts
from ddpo.training.trajectory_gradient import Accumulated, TrajectoryGradient
from ddpo_workflow.tasks.credit import credit_of
from ddpo_workflow.tasks.sample import sample_shard
from ddpo_workflow.tasks.score import score_shard
from ddpo_workflow.tasks.start import start
from tests.checks import (
    check_advantages_are_golden,
    check_gradient_is_each_samples_own,
    check_initial_ratio_is_one,
    check_log_probs_are_golden,
    check_regression_is_each_samples_own,
    check_weights_are_a_softmax,
)
from tests.tiny import (
    PROMPTS,
    Credit,
    alternating_advantages,
    as_credit,
    as_float64,
    ddim_on,
    draw,
    grow_adapter,
    load_policy,
    make_float64,
    rollouts_of,
    tiny_config,
)

pytestmark = pytest.mark.slow  # the checks themselves run by `make check`


@pytest.fixture
def gradient_check(tiny_model: Path) -> Callable[[], None]:
    config = tiny_config(tiny_model)
    policy = load_policy(config)
    grow_adapter(policy)
    rollouts = as_float64(rollouts_of(draw(policy, config, PROMPTS[:4]), PROMPTS[:4]))
    make_float64(policy)
    advantages = alternating_advantages(4)
    return lambda: check_gradient_is_each_samples_own(policy, config, rollouts, advantages)


@pytest.fixture
def ratio_check(tiny_model: Path) -> Callable[[], None]:
    config = tiny_config(tiny_model)
    policy = load_policy(config)
    grow_adapter(policy)
    return lambda: check_initial_ratio_is_one(policy, config)


def assert_turns_red(check: Callable[[], None], plant: Callable[[], None], message: str) -> None:
    check()
    plant()
    with pytest.raises(AssertionError, match=message):
        check()


def test_credit_of_the_neighbouring_sample_are_caught(
    gradient_check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = TrajectoryGradient.accumulate

    def shifted(
        self: TrajectoryGradient, rollouts: Rollouts, advantages: torch.Tensor, *rest: object
    ) -> Accumulated:
        return right(self, rollouts, advantages.roll(1), *rest)

    assert_turns_red(
        gradient_check,
        lambda: monkeypatch.setattr(TrajectoryGradient, "accumulate", shifted),
        "gradient off by",
    )


def test_advantages_joined_to_the_neighbouring_sample_are_caught(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = AdvantageTable.rows

    def shifted(table: AdvantageTable) -> list[AdvantageRow]:
        rows = right(table)
        ahead = [*rows[1:], rows[0]]
        return [replace(row, columns=other.columns) for row, other in zip(rows, ahead, strict=True)]

    assert_turns_red(
        lambda: check_the_update_task_joins_advantages_by_sample(tiny_model),
        lambda: monkeypatch.setattr(AdvantageTable, "rows", shifted),
        "weights of another join",
    )


def check_the_update_task_joins_advantages_by_sample(model: Path) -> None:
    """Run one epoch's tasks; update a second policy from the stored tables, matched by id here."""
    root = f"memory://{uuid.uuid4().hex}"
    config = tiny_config(
        model,
        storage={"root": root},
        algorithm={"advantages": {"type": "batch"}},
        optimizer={"learning_rate": 0.1},
    )
    run = start_run(config, "r")
    handle = RunHandle(root=root, run_id="r")
    checkpoint = start.fn(handle)
    shards = [
        sample_shard.fn(handle, checkpoint, 0, shard) for shard in range(run.shards_per_epoch)
    ]
    scores = [score_shard.fn(handle, ref, 0, shard) for shard, ref in enumerate(shards)]
    scored = credit_of.fn(handle, checkpoint, shards, scores, 0)
    following = ddpo_workflow.tasks.update.update_policy.fn(handle, checkpoint, shards, scored, 0)
    found = CHECKPOINT.load(run.store, following).state().weights

    table = run.store.get(manifests.load(run.store, scored).objects["advantages"])
    by_id = {
        row["sample_id"]: row["advantage"] for row in pq.read_table(io.BytesIO(table)).to_pylist()
    }
    assert len(set(by_id.values())) > 4, "advantages so alike that a shift would not show"
    samples, tensors = [], []
    for ref in shards:
        objects = manifests.load(run.store, ref).objects
        rows = pq.read_table(io.BytesIO(run.store.get(objects["rollouts"]))).to_pylist()
        samples += [(row["sample_id"], row["prompt"]) for row in rows]
        tensors.append(safetensors.torch.load(run.store.get(objects["trajectories"])))
    rollouts = Rollouts(
        [prompt for _, prompt in samples],
        torch.cat([shard["latents"] for shard in tensors]),
        torch.cat([shard["log_probs"] for shard in tensors]),
    )
    policy = load_policy(config)
    own = torch.tensor([by_id[sample_id] for sample_id, _ in samples])
    expected, _ = update(policy, initial_state(policy), rollouts, as_credit(own), {}, config)
    same = all(torch.equal(found[name], value) for name, value in expected.weights.items())
    assert same, "weights of another join"


def neighbouring_step(
    self: TrajectoryGradient,
    rollouts: Rollouts,
    pairs: Pairs,
    right: Callable = TrajectoryGradient.transition,
) -> Transition:
    process = self.process
    self.process = SimpleNamespace(
        times=process.times.roll(1),
        transition=lambda steps, *rest: process.transition((steps - 1) % process.steps, *rest),
    )
    try:
        return right(self, rollouts, pairs)
    finally:
        self.process = process


def test_log_probs_of_the_neighbouring_timestep_are_caught_by_the_ratio(
    ratio_check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_turns_red(
        ratio_check,
        lambda: monkeypatch.setattr(TrajectoryGradient, "transition", neighbouring_step),
        "initial ratio off by",
    )


def test_log_probs_of_the_neighbouring_timestep_are_caught_by_the_gradient(
    gradient_check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_turns_red(
        gradient_check,
        lambda: monkeypatch.setattr(TrajectoryGradient, "transition", neighbouring_step),
        "gradient off by",
    )


def test_a_neighbouring_timestep_in_sampler_and_update_alike_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The ratio cannot see it, since both sides agree; golden values do."""
    right = Ddim.alphas

    def one_step_late(self: Ddim, steps: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return right(self, (steps + 1).clamp(max=self.steps - 1))

    assert_turns_red(
        check_log_probs_are_golden,
        lambda: monkeypatch.setattr(Ddim, "alphas", one_step_late),
        "log-prob off by",
    )


def forget_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    right = StableDiffusion.predict

    def unguided(
        self: Policy,
        latents: torch.Tensor,
        times: torch.Tensor,
        conditioning: Conditioning,
        guidance_scale: float,
    ) -> torch.Tensor:
        training = torch.is_grad_enabled()
        return right(self, latents, times, conditioning, 1.0 if training else guidance_scale)

    monkeypatch.setattr(StableDiffusion, "predict", unguided)


def test_guidance_left_out_of_the_update_is_caught_by_the_ratio(
    ratio_check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_turns_red(ratio_check, lambda: forget_guidance(monkeypatch), "initial ratio off by")


def test_guidance_left_out_of_the_update_is_caught_by_the_gradient(
    gradient_check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_turns_red(gradient_check, lambda: forget_guidance(monkeypatch), "gradient off by")


def test_statistics_updated_after_their_use_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = PerPromptAdvantages.moments

    def late(
        self: PerPromptAdvantages, scored: Scored, statistics: PromptStatistics
    ) -> tuple[Moments, PromptStatistics]:
        moments = advantages_module.batch_moments(scored.rewards)
        for index, prompt in enumerate(scored.prompts):
            known = np.asarray(statistics.get(prompt, ()))
            if len(known) >= self.min_count:
                moments.mean[index], moments.std[index] = known.mean(), known.std()
                moments.count[index] = len(known)
        return moments, right(self, scored, statistics)[1]

    assert_turns_red(
        check_advantages_are_golden,
        lambda: monkeypatch.setattr(PerPromptAdvantages, "moments", late),
        "advantages off by",
    )


def test_sample_deviation_in_place_of_the_populations_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = advantages_module.normalise

    def sample_deviation(rewards, moments, clip):
        return right(rewards, replace(moments, std=moments.std * 1.03), clip)  # sqrt(16 / 15)

    assert_turns_red(
        check_advantages_are_golden,
        lambda: monkeypatch.setattr(advantages_module, "normalise", sample_deviation),
        "advantages off by",
    )


@pytest.fixture
def regression_check(tiny_v_model: Path) -> Callable[[], None]:
    policy = load_policy(tiny_config(tiny_v_model))
    grow_adapter(policy)
    latents = draw(policy, tiny_config(tiny_v_model), PROMPTS[:4]).latents[:, -1].double()
    make_float64(policy)
    finals, weights = FinalLatents(PROMPTS[:4], latents), torch.tensor([0.25, 1.0, 2.0, 0.75])
    noising = Noising.draw(0, 0, 0, range(4), policy, ddim_on(policy))
    return lambda: check_regression_is_each_samples_own(policy, finals, weights, noising)


def test_weights_of_the_neighbouring_sample_are_caught(
    regression_check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = DenoisingGradient.accumulate

    def shifted(
        self: DenoisingGradient, finals: FinalLatents, credit: Credit, *rest: object
    ) -> float:
        return right(self, finals, {"weight": credit["weight"].roll(1)}, *rest)

    assert_turns_red(
        regression_check,
        lambda: monkeypatch.setattr(DenoisingGradient, "accumulate", shifted),
        "gradient off by",
    )


def test_regression_on_the_other_prediction_type_is_caught(
    regression_check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise as the target of a model that predicts v."""
    right = NoiseSchedule.noised

    def with_the_noise_as_target(
        self: NoiseSchedule, clean: torch.Tensor, noise: torch.Tensor, times: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return right(self, clean, noise, times)[0], noise

    assert_turns_red(
        regression_check,
        lambda: monkeypatch.setattr(NoiseSchedule, "noised", with_the_noise_as_target),
        "gradient off by",
    )


def test_guidance_in_the_regression_is_caught(
    regression_check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    right = StableDiffusion.predict

    def guided(self: Policy, *rest: torch.Tensor) -> torch.Tensor:
        return right(self, *rest[:3], 3.0)

    assert_turns_red(
        regression_check,
        lambda: monkeypatch.setattr(StableDiffusion, "predict", guided),
        "gradient off by",
    )


def test_weights_that_sum_to_1_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rwr_module.scaled_softmax
    assert_turns_red(
        check_weights_are_a_softmax,
        lambda: monkeypatch.setattr(
            rwr_module, "scaled_softmax", lambda logits: right(logits) / len(logits)
        ),
        "weights over the data_set off by",
    )


def test_a_softmax_over_all_prompts_in_place_of_each_ones_is_caught(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    right = rwr_module.rows_by_name
    assert_turns_red(
        check_weights_are_a_softmax,
        lambda: monkeypatch.setattr(
            rwr_module, "rows_by_name", lambda names, known: right([""] * len(names), known)
        ),
        "weights over the prompt off by",
    )
