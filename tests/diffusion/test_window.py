"""Windows of timesteps: which steps an epoch trains, and where noise is drawn."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load
from torch.distributions import Normal

from ddpo.algorithms import Rwr
from ddpo.config import RunConfig
from ddpo.diffusion.sampling import sample, sampler_digest
from ddpo.diffusion.window import check_sampler, sampler_of_epoch, window_steps
from ddpo.errors import ConfigError, PolicyMismatch
from ddpo.models import Policy
from ddpo.models.schedule import NoiseSchedule
from ddpo.runs import Run, RunHandle, check_run, start_run
from ddpo.runs.forks.plan import fork_config
from ddpo.store import manifests
from ddpo.store.kinds import CHECKPOINT
from ddpo.store.tables import decode_rollouts
from ddpo.training.loop import initial_state, update
from ddpo.training.samples import Rollouts
from ddpo.training.trajectory_gradient import TrajectoryGradient
from ddpo_workflow.tasks.pictures import PictureSet, draw_pictures
from ddpo_workflow.tasks.sample import sample_shard
from ddpo_workflow.tasks.start import start
from tests.checks import accumulated, ddim_reference
from tests.fold import as_in_a_new_process, run_epoch
from tests.recorded import start_unchecked
from tests.tiny import (
    PROMPTS,
    alternating_advantages,
    as_credit,
    as_float64,
    assert_same_tensors,
    draw,
    flat,
    load_policy,
    make_float64,
    rollouts_of,
    tiny_config,
)

ADVANTAGES = alternating_advantages(8)
CREDIT = as_credit(ADVANTAGES)
SEEDS = (11, 22, 33, 44)
TIMESTEPS = (751, 501, 251, 1)
# Of a run with this seed, random windows of 2 of the 4 steps begin at these, epoch by epoch.
MOVING_SEED, MOVING_STARTS = 13, (2, 0, 1)


def windowed(model: Path | str, seed: int = 0, **window: Any) -> RunConfig:
    return tiny_config(model, seed=seed, sampler={"window": window})


def end_without_noise(policy: Policy) -> None:
    """Let the last step be deterministic, as with `set_alpha_to_one`."""
    settings = {**policy.schedule.settings, "set_alpha_to_one": True}
    policy.schedule = NoiseSchedule.from_scheduler(settings)


# What is trained


def test_the_gradient_of_a_window_is_that_of_its_steps_alone(
    policy: Policy, rollouts: Rollouts
) -> None:
    config = windowed(policy.folder, steps=2, position=1)
    make_float64(policy)
    exact = as_float64(rollouts)
    loss, found = accumulated(policy, config, exact, exact.log_probs, 3)
    singles = [
        accumulated(policy, windowed(policy.folder, steps=1, position=p), exact, exact.log_probs, 8)
        for p in range(4)
    ]
    whole_loss, whole = accumulated(policy, tiny_config(policy.folder), exact, exact.log_probs, 8)
    assert loss == pytest.approx((singles[1][0] + singles[2][0]) / 2, abs=1e-10)
    mean = (singles[1][1] + singles[2][1]) / 2
    torch.testing.assert_close(found, mean, rtol=0, atol=1e-10)
    # Together the four single steps are the whole.
    assert whole_loss == pytest.approx(sum(s[0] for s in singles) / 4, abs=1e-10)
    torch.testing.assert_close(whole, sum(s[1] for s in singles) / 4, rtol=0, atol=1e-10)
    assert (found - whole).abs().max() > 0.1 * whole.abs().max()


def test_an_update_measures_and_counts_the_windows_pairs(
    policy: Policy, rollouts: Rollouts
) -> None:
    config = windowed(policy.folder, steps=2, position=1)
    shares: list[float] = []
    _, metrics = update(
        policy,
        initial_state(policy),
        rollouts,
        as_credit(ADVANTAGES),
        {},
        config,
        on_progress=shares.append,
    )
    assert list(metrics["initial_ratio_deviation_by_timestep"]) == ["501", "251"]
    assert metrics["initial_ratio_deviation"]["max"] == 0.0
    assert shares == [0.25, 0.5, 0.75, 1.0]  # 2 updates x 4 samples x 2 steps, 4 pairs at a time
    assert metrics["ratio_min"] < 1 < metrics["ratio_max"]


def test_a_window_alone_changes_no_picture_and_no_digest(policy: Policy, config: RunConfig) -> None:
    windows = windowed(policy.folder, steps=2, position=1)
    plain, drawn = (sample(policy, PROMPTS[:4], SEEDS, c.sampler) for c in (config, windows))
    assert torch.equal(plain.latents, drawn.latents)
    assert torch.equal(plain.log_probs, drawn.log_probs)
    assert sampler_digest(policy, windows.sampler) == sampler_digest(policy, config.sampler)


# Noise in the window only


def test_outside_of_the_window_steps_are_ddims_without_eta(policy: Policy) -> None:
    config = windowed(policy.folder, steps=2, position=1, noise_only_there=True)
    drawn = sample(policy, PROMPTS[:4], SEEDS, config.sampler)
    assert (drawn.log_probs[:, [0, 3]] == 0).all()
    alphas = policy.pipeline.scheduler.alphas_cumprod.double()
    final = float(policy.pipeline.scheduler.final_alpha_cumprod)
    for row, seed in enumerate(SEEDS):
        source = torch.Generator().manual_seed(seed)
        noises = [torch.randn((4, 8, 8), generator=source) for _ in range(5)]
        assert torch.equal(drawn.latents[row, 0], noises[0])
        for step, timestep in enumerate(TIMESTEPS):
            latents, following = drawn.latents[row, step], drawn.latents[row, step + 1]
            with torch.no_grad():
                output = policy.predict(
                    latents[None],
                    torch.tensor([float(timestep)]),
                    policy.encode([PROMPTS[row]]),
                    3.0,
                )[0]
            eta = 1.0 if step in (1, 2) else 0.0
            mean, std = ddim_reference(
                alphas,
                timestep,
                timestep - 250,
                latents.double(),
                output.double(),
                eta=eta,
                prediction_type="epsilon",
                final_alpha=final,
            )
            assert (std > 0) == (eta > 0)
            # A step's noise is the same as without a window.
            expected = mean + std * noises[step + 1].double()
            torch.testing.assert_close(following.double(), expected, rtol=0, atol=2e-5)
            if eta:
                log_prob = Normal(mean, std).log_prob(following.double()).mean()
                assert float(drawn.log_probs[row, step]) == pytest.approx(float(log_prob), abs=1e-4)


@pytest.mark.parametrize("position", [0, 2, "random"])
def test_the_update_sees_the_samplers_own_log_probs(policy: Policy, position: int | str) -> None:
    config = windowed(policy.folder, steps=2, position=position, noise_only_there=True)
    sampler = sampler_of_epoch(policy, config, 0)
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(8)]
    drawn = sample(policy, prompts, list(range(8)), sampler)
    _, metrics = update(policy, initial_state(policy), rollouts_of(drawn), CREDIT, {}, config)
    assert len(metrics["initial_ratio_deviation_by_timestep"]) == 2
    assert metrics["initial_ratio_deviation"]["max"] == 0.0
    assert metrics["grad_norm"] > 0


def test_samplers_that_draw_noise_elsewhere_are_told_apart(policy: Policy) -> None:
    windows: list[dict[str, Any]] = [
        {"steps": 2, "position": 1},
        {"steps": 2, "position": 1, "noise_only_there": True},
        {"steps": 2, "position": 0, "noise_only_there": True},
        {"steps": 1, "position": 1, "noise_only_there": True},
        {"steps": 2, "position": "random", "noise_only_there": True},
    ]
    digests = {sampler_digest(policy, windowed(policy.folder, **w).sampler) for w in windows}
    assert len(digests) == len(windows)


def test_a_place_that_is_still_to_be_drawn_is_no_sampler(policy: Policy) -> None:
    config = windowed(policy.folder, steps=2, position="random", noise_only_there=True)
    with pytest.raises(ValueError, match="a random window has a position within an epoch only"):
        draw(policy, config)


# Random windows


def places(policy: Policy, seed: int, epochs: int = 60, steps: int = 2) -> list[range]:
    config = windowed(policy.folder, seed=seed, steps=steps, position="random")
    return [window_steps(sampler_of_epoch(policy, config, epoch)) for epoch in range(epochs)]


def test_a_random_window_depends_on_run_seed_and_epoch_alone(policy: Policy) -> None:
    found = places(policy, seed=5)
    other = load_policy(tiny_config(policy.folder, seed=9))
    assert places(other, seed=5) == found
    assert places(policy, seed=6) != found
    counts = Counter(place.start for place in found)
    assert counts.keys() == {0, 1, 2} and min(counts.values()) > 8
    assert {len(place) for place in found} == {2}


def test_a_random_window_always_holds_a_step_to_train_on(policy: Policy) -> None:
    assert {place.start for place in places(policy, seed=0, steps=1)} == {0, 1, 2, 3}
    end_without_noise(policy)
    assert {place.start for place in places(policy, seed=0, steps=1)} == {0, 1, 2}
    config = windowed(policy.folder, steps=2, position=2)
    gradient = TrajectoryGradient(policy, sampler_of_epoch(policy, config, 0), config.algorithm)
    assert gradient.trained_steps() == [2]


def test_every_epochs_update_trains_the_window_that_is_drawn_for_it(policy: Policy) -> None:
    config = windowed(policy.folder, seed=MOVING_SEED, steps=2, position="random")
    state = initial_state(policy)
    for epoch, first in enumerate(MOVING_STARTS):
        drawn = rollouts_of(draw(policy, tiny_config(policy.folder), first_seed=1000 * epoch))
        placed = {
            position: windowed(policy.folder, seed=MOVING_SEED, steps=2, position=position)
            for position in range(3)
        }
        expected = {}
        for position, other in placed.items():
            policy.weights.load(state.weights)
            expected[position], _ = update(policy, state, drawn, CREDIT, {}, other)
        policy.weights.load(state.weights)
        after, metrics = update(policy, state, drawn, CREDIT, {}, config)
        assert_same_tensors(after.weights, expected.pop(first).weights)
        for position, elsewhere in expected.items():
            assert not torch.equal(flat(after.weights), flat(elsewhere.weights)), position
        measured = tuple(map(int, metrics["initial_ratio_deviation_by_timestep"]))
        assert measured == TIMESTEPS[first : first + 2]
        state = after


def test_without_a_window_the_sampler_stays_the_configs(policy: Policy, config: RunConfig) -> None:
    assert sampler_of_epoch(policy, config, 3) is config.sampler
    gradient = TrajectoryGradient(policy, config.sampler, config.algorithm)
    assert gradient.trained_steps() == [0, 1, 2, 3]


# Through the tasks


def test_a_runs_samples_and_updates_have_noise_in_the_same_window_in_every_epoch(
    tiny_model: Path, tmp_path: Path
) -> None:
    run, handle = moving_run(tiny_model, tmp_path / "store")
    checkpoint = start.fn(handle)
    for epoch, first in enumerate(MOVING_STARTS):
        shard = manifests.load(run.store, sample_shard.fn(handle, checkpoint, epoch, 0))
        tensors = load(run.store.get(shard.objects["trajectories"]))
        noisy = (tensors["log_probs"] != 0).all(dim=0).nonzero().flatten().tolist()
        assert noisy == [first, first + 1], epoch
        checkpoint = run_epoch(run, checkpoint, epoch)
        metrics = CHECKPOINT.load(run.store, checkpoint).metrics
        trained = metrics["initial_ratio_deviation_by_timestep"]
        assert sorted(map(int, trained), reverse=True) == list(TIMESTEPS[first : first + 2])
        assert metrics["initial_ratio_deviation"]["max"] == 0.0


def test_pictures_of_one_policy_are_the_same_whatever_the_epochs_window(
    tiny_model: Path, tmp_path: Path
) -> None:
    run, handle = moving_run(tiny_model, tmp_path / "store")
    checkpoint = start.fn(handle)
    pictures = []
    for epoch in range(2):
        drawn = draw_pictures.fn(
            handle, checkpoint, PictureSet(prompts=("a cat",), seeds=(0,)), epoch
        )
        assert drawn is not None
        stored = manifests.load(run.store, drawn).objects["pictures"]
        pictures += [row.image_png for row in decode_rollouts(run.store.get(stored))]
    assert pictures[0] == pictures[1]


@pytest.mark.slow
def test_a_fork_of_another_seed_may_not_train_samples_whose_noise_is_elsewhere(
    tiny_model: Path, tmp_path: Path
) -> None:
    parent, handle = moving_run(tiny_model, tmp_path / "store")
    checkpoint = start.fn(handle)
    run_epoch(parent, checkpoint, 0)
    refusal = "placed by seed 13, but a fork with seed 14 would train"
    with pytest.raises(PolicyMismatch, match=refusal):  # before there is such a run
        check_run(fork_config(parent, 0, overrides=[f"seed={MOVING_SEED + 1}"]), "other")
    fork = {"run_id": "r", "epoch": 0}
    _, same = moving_run(tiny_model, tmp_path / "store", "same", fork=fork)
    assert start.fn(same) != checkpoint
    with pytest.raises(PolicyMismatch, match=refusal):
        moving_run(tiny_model, tmp_path / "store", "other", fork=fork, seed=MOVING_SEED + 1)
    # And where it comes to the model, should its parent be another run by then.
    other = same.open().config.model_copy(update={"seed": MOVING_SEED + 1})
    with pytest.raises(PolicyMismatch, match=refusal):
        start.fn(start_unchecked(other, "other").handle)
    # Steps that are all noisy can be trained in any window.
    everywhere = {"steps": 2, "position": "random"}
    run, handle = moving_run(
        tiny_model, tmp_path / "store", "noisy", sampler={"window": everywhere}
    )
    run_epoch(run, start.fn(handle), 0)
    fork = {"run_id": "noisy", "epoch": 0}
    changes: dict[str, Any] = {"sampler": {"window": everywhere}, "seed": MOVING_SEED + 1}
    _, other = moving_run(tiny_model, tmp_path / "store", "free", fork=fork, **changes)
    assert start.fn(other)


def moving_run(model: Path, root: Path, run_id: str = "r", **changes: Any) -> tuple[Run, RunHandle]:
    """Start a run whose window moves, with noise in it alone."""
    as_in_a_new_process()
    window = {"steps": 2, "position": "random", "noise_only_there": True}
    parts: dict[str, Any] = {"seed": MOVING_SEED, "sampler": {"window": window}, **changes}
    run = start_run(tiny_config(model, **parts, storage={"root": str(root)}), run_id)
    return run, RunHandle(root=run.store.root, run_id=run_id)


# What is refused


def test_a_random_window_lies_in_the_same_place_for_every_algorithm(policy: Policy) -> None:
    """The samples of one may be trained on by another: the seed alone says where noise is."""
    end_without_noise(policy)
    config = windowed(policy.folder, steps=1, position="random", noise_only_there=True)
    regression = config.model_copy(update={"algorithm": Rwr(type="rwr")})
    for epoch in range(40):
        assert sampler_of_epoch(policy, regression, epoch) == sampler_of_epoch(
            policy, config, epoch
        )


def test_a_window_without_a_step_to_train_on_is_refused_with_the_reason(policy: Policy) -> None:
    end_without_noise(policy)
    config = windowed(policy.folder, steps=1, position=3)
    message = r"only step 3 \(time 1\).*without noise.*sampler.window.position to at most 2"
    with pytest.raises(ConfigError, match=message):
        sampler_of_epoch(policy, config, 0)
    with pytest.raises(ConfigError, match=message):  # before the model is loaded
        check_sampler(policy.schedule, config)


@pytest.mark.parametrize(
    ("window", "message"),
    [
        ({"steps": 5}, "window.steps 5 is more than the 4 denoising steps; set it to at most 4"),
        ({"steps": 2, "position": 3}, "set window.position to at most 2"),
        ({"steps": 0}, "greater than 0"),
        ({"steps": 1, "position": -1}, "position"),
        ({"steps": 1, "position": "somewhere"}, "random"),
    ],
    ids=["too long", "too late", "empty", "negative", "no place"],
)
def test_windows_that_do_not_fit_are_refused(
    tiny_model: Path, window: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        windowed(tiny_model, **window)


def test_a_moving_window_moves_on_with_the_epochs_and_begins_again(tiny_model: Path) -> None:
    config = windowed(tiny_model, steps=2, position="moving", move_every=3)
    policy = load_policy(config)
    resolved = [sampler_of_epoch(policy, config, epoch) for epoch in range(12)]
    starts = [window_steps(sampler).start for sampler in resolved]
    assert starts == [0, 0, 0, 1, 1, 1, 2, 2, 2, 0, 0, 0]
    with pytest.raises(ValueError, match="a moving window has a position within an epoch only"):
        window_steps(config.sampler)


@pytest.mark.parametrize("position", ["random", "moving"])
def test_a_window_may_be_kept_among_the_noisier_steps(tiny_model: Path, position: str) -> None:
    config = windowed(tiny_model, steps=2, position=position, move_every=1, before=3)
    policy = load_policy(config)
    resolved = [sampler_of_epoch(policy, config, epoch) for epoch in range(12)]
    assert {window_steps(sampler).stop for sampler in resolved} == {2, 3}
    for before in (1, 5):
        with pytest.raises(ConfigError, match=r"window\.before is .; expected 2 to 4"):
            windowed(tiny_model, steps=2, before=before)
