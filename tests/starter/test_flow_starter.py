"""Promises of the flow-matching weights that ship with the package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from safetensors.torch import load_file

from ddpo.config.files import read_config
from ddpo.diffusion.sampling import sample
from ddpo.models import check_model
from ddpo.starter import FLOW_STARTER_PATH, JUDGE_PATH, STARTER_PATH
from ddpo.starter.judge import Judge
from ddpo.starter.scenes import Scene
from tests.tiny import load_policy

CONFIG = Path(__file__).parents[2] / "configs/starter_flow.yaml"


@pytest.fixture(scope="module")
def pipeline() -> Any:
    """Return the pipeline as the model card loads it: without T5, which it was trained without."""
    loaded = StableDiffusion3Pipeline.from_pretrained(
        FLOW_STARTER_PATH, text_encoder_3=None, tokenizer_3=None
    )
    loaded.set_progress_bar_config(disable=True)
    return loaded


def test_it_is_small_and_of_stable_diffusion_3s_classes(pipeline: Any) -> None:
    files = [path for path in FLOW_STARTER_PATH.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json"}
    assert sum(path.stat().st_size for path in files) <= 15e6
    assert isinstance(pipeline.scheduler, FlowMatchEulerDiscreteScheduler)
    parts = (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2)
    assert {p.dtype for part in parts for p in part.parameters()} == {torch.float32}


def test_its_autoencoder_is_the_starters() -> None:
    file = "vae/diffusion_pytorch_model.safetensors"
    own, shared = load_file(FLOW_STARTER_PATH / file), load_file(STARTER_PATH / file)
    assert own.keys() == shared.keys()
    assert all(torch.equal(own[name], shared[name]) for name in own)


def test_the_weights_name_what_made_them() -> None:
    made = json.loads((FLOW_STARTER_PATH / "training.json").read_text())
    assert made["command"].startswith("python -m starter_training.train --flow --seed ")
    assert made["flow_pictures_seen"] == made["recipe"]["flow"]["pictures"]
    stages = made["stages"].values()
    assert all(stage["done"] for stage in stages)
    # A "+" says that the tree had changes that were not committed yet.
    assert all(len(c.removesuffix("+")) == 40 for stage in stages for c in stage["commits"])


def test_our_sampler_draws_what_plain_diffusers_does(pipeline: Any) -> None:
    config = read_config(CONFIG, [])
    assert check_model(config.model).size == (64, 64)
    policy = load_policy(config)
    still = config.sampler.at_inference(0.0)
    (ours,) = sample(policy, ["a fox"], [3], still).images
    (theirs,) = pipeline(
        "a fox",
        generator=torch.Generator().manual_seed(3),
        **still.pipeline_arguments,
        **policy.pipeline_arguments,
    ).images
    difference = np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int)
    assert np.abs(difference).max() <= 1  # weights that lie elsewhere in memory round otherwise


@pytest.mark.slow
def test_the_judge_recognises_most_animals(pipeline: Any) -> None:
    wanted = [Scene(name) for name in ("cat", "fox", "whale", "butterfly", "turtle", "bear")] * 4
    images = pipeline(
        [scene.prompt for scene in wanted],
        num_inference_steps=10,
        guidance_scale=3.0,
        max_sequence_length=0,
        generator=[torch.Generator().manual_seed(seed) for seed in range(len(wanted))],
    ).images
    assert Judge.load(JUDGE_PATH).look(images).right(wanted).mean() > 0.5
