"""Estimates, by running the code on `meta`, are within a quarter of what real tensors take."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpo.config import RunConfig
from ddpo.config.files import read_config
from ddpo.diffusion.sampling import sample
from ddpo.memory.counting import LiveBytes, Peaks
from ddpo.memory.estimate import MemoryEstimate, estimate
from ddpo.models.numerics import resolve_numerics
from ddpo.training.loop import initial_state, update
from ddpo.training.samples import FinalLatents, Rollouts
from tests.sweeps import swept
from tests.tiny import load_policy, tiny_config
from tests.tiny_families import FAMILIES, SETTINGS

NAMES = ("sd", *FAMILIES)
ALGORITHMS = ("ddpo_is", "ddpo_sf", "rwr", "nft")
TOLERANCE = 0.25
PROMPTS = ("a cat", "a dog")


def config_of(models: Mapping[str, Path], name: str, **changes: Any) -> RunConfig:
    own = {part: dict(value) for part, value in SETTINGS.get(name, {}).items()}
    for part, value in changes.items():
        own[part] = {**own.get(part, {}), **value} if part != "algorithm" else value
    return tiny_config(models[name], **own)


def algorithm_of(name: str) -> dict[str, Any]:
    updates = {"ddpo_is": 1, "ddpo_sf": 1, "rwr": 5, "nft": 1}
    own = {"advantages": {"type": "batch"}} if name == "nft" else {}
    return {"type": name, "updates_per_epoch": updates[name], **own}


def measured(config: RunConfig) -> Mapping[str, int]:
    """Return the peaks of a whole shard and a whole epoch's update on real tensors."""
    policy = load_policy(config)
    weights = [t for m in policy.pipeline.components.values() if isinstance(m, torch.nn.Module)
               for t in (*m.parameters(), *m.buffers())]  # fmt: skip
    prompts = [PROMPTS[i % 2] for i in range(config.rollouts.samples_per_epoch)]
    kept = config.algorithm.needs.keeps_old
    state = initial_state(policy, ema=config.optimizer.ema_decay is not None, old=kept)
    count = len(prompts)
    credit = {"reward": torch.zeros(count), "advantage": torch.linspace(-1, 1, count),
              "weight": torch.linspace(0.5, 1.5, count)}  # fmt: skip
    drawn = sample(policy, prompts, list(range(count)), config.sampler)
    rollouts = Rollouts(prompts, drawn.latents, drawn.log_probs)
    policy.prepare_prompts([])
    counter = LiveBytes()
    peaks = Peaks(counter)
    with counter:
        counter.count(weights)
        with peaks.phase("sample"):
            shard = config.rollouts.shard_size
            sample(policy, prompts[:shard], list(range(shard)), config.sampler)
        with peaks.phase("update"):
            final = config.algorithm.needs.data == "final_latents"
            samples = FinalLatents(prompts, rollouts.latents[:, -1]) if final else rollouts
            # Twice, so that AdamW has its moments.
            state, _ = update(policy, state, samples, credit, {}, config)
            update(policy, state, samples, credit, {}, config)
    return peaks.found


def assert_close(found: MemoryEstimate, config: RunConfig) -> None:
    real = measured(config)
    sampling = max(found.peaks[phase] for phase in ("encode", "sample", "decode"))
    for name, about in (("sample", sampling), ("update", found.peaks["update"])):
        print(f"estimated {about:,}, measured {real[name]:,}: {about / real[name]:.3f} ({name})")
        assert about == pytest.approx(real[name], rel=TOLERANCE), name


@pytest.mark.parametrize(
    ("name", "algorithm"),
    swept(
        product(NAMES, ALGORITHMS),
        often=lambda name, algorithm: name == "sd" or algorithm == "ddpo_is",
    ),
)
def test_an_estimate_is_within_a_quarter_of_what_real_tensors_take(
    pipelines: Mapping[str, Path], name: str, algorithm: str
) -> None:
    config = config_of(pipelines, name, algorithm=algorithm_of(algorithm))
    found = estimate(config, resolve_numerics(config.numerics), prompts=len(PROMPTS))
    assert_close(found, config)


@pytest.mark.parametrize(
    "changes",
    [
        {"trainable": {"type": "full"}, "optimizer": {"ema_decay": 0.9}},
        {"numerics": {"gradient_checkpointing": True}},
        {"numerics": {"dtype": "bfloat16"}},
    ],
    ids=["full with ema", "checkpointing", "bfloat16"],
)
@pytest.mark.parametrize("name", ["sd", pytest.param("flux", marks=pytest.mark.faults)])
def test_so_it_is_with_other_settings(
    pipelines: Mapping[str, Path], name: str, changes: dict[str, Any]
) -> None:
    config = config_of(pipelines, name, algorithm=algorithm_of("ddpo_is"), **changes)
    found = estimate(config, resolve_numerics(config.numerics), prompts=len(PROMPTS))
    assert_close(found, config)


@pytest.mark.parametrize(("name", "kind"), [("sd", "dpm_solver"), ("sd3", "unipc")])
def test_so_it_is_for_solvers_which_remember(
    pipelines: Mapping[str, Path], name: str, kind: str
) -> None:
    sampler = {"type": kind, "order": 3}
    config = config_of(pipelines, name, algorithm=algorithm_of("nft"), sampler=sampler)
    found = estimate(config, resolve_numerics(config.numerics), prompts=len(PROMPTS))
    assert_close(found, config)


@pytest.mark.faults  # of the size of a real model: forty seconds
def test_so_it_is_for_the_starter() -> None:
    settings = ["rollouts.samples_per_epoch=8", "rollouts.shard_size=8"]
    settings += ["numerics.sample_batch_size=8", "numerics.micro_batch_size=8"]
    settings += ["algorithm.updates_per_epoch=1"]
    config = read_config("configs/starter.yaml", [*settings, "numerics.threads=1"], {})
    found = estimate(config, resolve_numerics(config.numerics), prompts=len(PROMPTS))
    assert_close(found, config)
