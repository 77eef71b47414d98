"""Which values a config may have, and how others are refused."""

from __future__ import annotations

import re
from typing import Any

import pytest

from ddpo.algorithms import DdpoSf
from ddpo.config.files import parse_config
from ddpo.errors import ConfigError
from tests.configs import parse


def refusal(**changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(**changes)
    message = str(caught.value)
    assert message.startswith("run.yaml cannot be run:\n  ")
    return message.removeprefix("run.yaml cannot be run:\n  ")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epoch": 3}, "epoch: there is no such key; did you mean `epochs`?"),
        (
            {"sampler": {"guidance": 3}},
            "sampler.guidance: there is no such key; did you mean `guidance_scale`?",
        ),
        (
            {"algorithm": {"type": "ddpo_is", "advantages": {"type": "batch", "clp": 8}}},
            "algorithm.advantages.clp: there is no such key; did you mean `clip`?",
        ),
        (
            {"advantages": {"type": "batch"}},
            "advantages: there is no such key; it belongs under `algorithm`",
        ),
        (
            {"steps": 20},
            "steps: there is no such key; it belongs under `sampler` or `evaluation`",
        ),
        (
            {"algorithm": {"type": "ddpo_is", "clip_rang": 1e-4}},
            "algorithm.clip_rang: there is no such key; did you mean `clip_range`?",
        ),
        (
            {"trainable": {"type": "lora", "ranks": 8}},
            "trainable.ranks: there is no such key; did you mean `rank`?",
        ),
        (
            {"trainable": {"type": "lora", "from_scratch": True}},
            "trainable.from_scratch: there is no such key; expected one of type, rank, alpha, "
            "target_modules, text_encoders, or type full, which has it",
        ),
        (
            {"tracking": {"pictures": {"seed": [1]}}},
            "tracking.pictures.seed: there is no such key; did you mean `seeds`?",
        ),
        (
            {"reward": {"name": "r", "xyzzy": 1}},
            "reward.xyzzy: there is no such key; expected one of name, parameters, tries, "
            "on_failure",
        ),
    ],
)
def test_a_misspelt_key_is_told_the_nearest(changes: dict[str, Any], message: str) -> None:
    assert refusal(**changes) == message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": "many"}, "epochs: found 'many'; input should be a valid integer"),
        ({"sampler": {"steps": 0}}, "sampler.steps: found 0; input should be greater than 0"),
        ({"sampler": {"eta": 1.5}}, "sampler.eta: found 1.5; input should be less than or equal"),
        ({"storage": {"root": 3}}, "storage.root: found 3; input should be a valid string"),
        ({"optimizer": {"betas": [0.9]}}, "optimizer.betas.1: missing"),
        (
            {"trainable": {"type": "lora", "target_modules": ["to_q", 3]}},
            "trainable.target_modules.1: found 3; input should be a valid string",
        ),
        (
            {"numerics": {"threads": "fast"}},
            "numerics.threads: found 'fast'; input should be a valid integer, unable to parse "
            "string as an integer or input should be 'auto'",
        ),
        (
            {"algorithm": {"type": "ppo"}},
            "algorithm.type: found 'ppo'; expected one of ddpo_is, ddpo_sf, rwr, rwr_sparse",
        ),
        (
            {"algorithm": {"type": "ddpo_is", "advantages": {"clip": 3}}},
            "algorithm.advantages.type: missing; expected one of per_prompt, batch",
        ),
        ({"seed": -1}, "seed: found -1; input should be greater than or equal to 0"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_expected(
    changes: dict[str, Any], message: str
) -> None:
    assert refusal(**changes).startswith(message)


def test_every_problem_is_named_at_once() -> None:
    lines = refusal(epoch=1, seed="x", sampler={"stepps": 3}).splitlines()
    assert len(lines) == 3


def test_a_missing_part_is_named() -> None:
    with pytest.raises(ConfigError, match="reward: missing"):
        parse_config({"model": "starter", "prompts": {"name": "simple_animals"}}, "run.yaml")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"rollouts": {"samples_per_epoch": 100, "shard_size": 30}},
            "rollouts.shard_size 30 does not divide samples_per_epoch 100; 10, 20, 25, 50 would",
        ),
        (
            {"rollouts": {"samples_per_prompt": 3}},
            "rollouts.samples_per_prompt 3 does not divide samples_per_epoch 256; 1, 2, 4, 8 would",
        ),
        (
            {"numerics": {"sample_batch_size": 7}},
            "numerics.sample_batch_size 7 does not divide rollouts.shard_size 64; 1, 2, 4, 8 would",
        ),
        (
            {"algorithm": {"type": "ddpo_is", "updates_per_epoch": 3}},
            "algorithm.updates_per_epoch 3 does not divide samples_per_epoch 256; 1, 2, 4, 8 would",
        ),
    ],
)
def test_sizes_that_do_not_divide_say_which_would(changes: dict[str, Any], message: str) -> None:
    assert refusal(**changes) == message
    whole, would = (re.findall(r"(\d+)[;]", message)[0], re.findall(r"\d+", message.split(";")[1]))
    assert all(int(whole) % int(each) == 0 for each in would)


def test_a_micro_batch_of_any_size_is_allowed() -> None:
    assert parse(numerics={"micro_batch_size": 7}).numerics.micro_batch_size == 7


def test_ddpo_sf_takes_exactly_one_update() -> None:
    message = refusal(algorithm={"type": "ddpo_sf", "updates_per_epoch": 2})
    assert "algorithm.updates_per_epoch: ddpo_sf takes exactly one update" in message
    assert "no longer the policy's own" in message and "use `type: ddpo_is`" in message
    assert parse(algorithm={"type": "ddpo_sf"}).algorithm == DdpoSf(type="ddpo_sf")


def test_eta_0_is_refused_for_want_of_a_gradient() -> None:
    assert "no gradient; set it above 0" in refusal(sampler={"eta": 0})


RWR = {"type": "rwr"}


def test_regression_has_the_published_settings() -> None:
    dense, sparse = (
        parse(algorithm=RWR).algorithm,
        parse(algorithm={"type": "rwr_sparse"}).algorithm,
    )
    assert (dense.beta, dense.weights_over, dense.inner_epochs) == (0.2, "data_set", 5)
    assert (sparse.keep, sparse.inner_epochs) == (0.1, 50)


def test_regression_needs_no_noise_in_sampling() -> None:
    assert parse(algorithm=RWR, sampler={"eta": 0}).sampler.eta == 0


@pytest.mark.parametrize(
    ("algorithm", "message"),
    [
        (
            {"type": "rwr", "updates_per_epoch": 7},
            "algorithm: updates_per_epoch 7 is not a multiple of inner_epochs 5, and every pass "
            "takes the same number of steps; set it to 5 or 10",
        ),
        (
            {"type": "rwr", "updates_per_epoch": 15},
            "algorithm.updates_per_epoch / inner_epochs 5 = 3 does not divide samples_per_epoch "
            "256; 1, 2, 4, 8 would",
        ),
        (
            {"type": "rwr_sparse", "updates_per_epoch": 8},
            "algorithm: updates_per_epoch 8 is not a multiple of inner_epochs 50, and every "
            "pass takes the same number of steps; set it to 50",
        ),
        (
            {"type": "rwr", "beta": -1},
            "algorithm.beta: found -1; input should be greater than or equal to 0",
        ),
        (
            {"type": "rwr", "beta": float("inf")},
            "algorithm.beta: found inf; input should be a finite number",
        ),
        (
            {"type": "rwr_sparse", "keep": 1.5},
            "algorithm.keep: found 1.5; input should be less than or equal to 1",
        ),
        (
            {"type": "rwr", "clip_range": 1e-4},
            "algorithm.clip_range: there is no such key; expected one of type, inner_epochs, "
            "updates_per_epoch, beta, weights_over, or type ddpo_is or awm, which has it",
        ),
    ],
)
def test_settings_that_regression_cannot_have_are_refused(
    algorithm: dict[str, Any], message: str
) -> None:
    assert refusal(algorithm=algorithm) == message


def test_advantages_are_refused_where_they_would_be_ignored() -> None:
    for algorithm in ("rwr", "rwr_sparse"):
        message = refusal(algorithm={"type": algorithm, "advantages": {"type": "batch"}})
        assert message.startswith("algorithm.advantages: there is no such key; expected one of")


def test_only_regression_stores_final_latents_alone() -> None:
    assert parse().stored_trajectories == "full"
    for algorithm in (RWR, {"type": "rwr_sparse"}):
        assert parse(algorithm=algorithm).stored_trajectories == "final"
        full = {"store_trajectories": "full"}
        assert parse(algorithm=algorithm, rollouts=full).stored_trajectories == "full"
    message = refusal(rollouts={"store_trajectories": "final"})
    assert "ddpo_is trains on every step of a trajectory; leave it at auto" in message


def test_a_regressions_config_survives_its_own_json() -> None:
    config = parse(algorithm={"type": "rwr_sparse", "keep": 0.25})
    assert parse_config({**config.identity(), **config.operation()}, "run.json") == config


def test_statistics_that_would_never_be_used_are_refused() -> None:
    message = refusal(
        algorithm={
            "type": "ddpo_is",
            "advantages": {"type": "per_prompt", "buffer_size": 8, "min_count": 9},
        }
    )
    assert "never reached by a buffer of 8" in message and "set min_count to at most 8" in message
