"""Promises of the weights that ship with the package."""

import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from ddpo.starter import STARTER_PATH


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    pipeline = StableDiffusionPipeline.from_pretrained(STARTER_PATH)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline: StableDiffusionPipeline, prompts: list[str]) -> np.ndarray:
    images = pipeline(
        prompts,
        num_inference_steps=4,
        guidance_scale=3.0,
        eta=1.0,
        generator=[torch.Generator().manual_seed(place) for place in range(len(prompts))],
    ).images
    return np.stack([np.asarray(image) for image in images])


def test_weights_are_safetensors_of_at_most_25_mb() -> None:
    files = [path for path in STARTER_PATH.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} <= {".safetensors", ".json"}
    assert sum(path.stat().st_size for path in files) <= 25e6


def test_the_noise_schedule_is_stable_diffusions(pipeline: StableDiffusionPipeline) -> None:
    scheduler = pipeline.scheduler
    assert isinstance(scheduler, DDIMScheduler)
    expected = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": 1000,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "epsilon",
    }
    assert {key: scheduler.config[key] for key in expected} == expected


def test_it_loads_in_float32_without_checker_and_extractor(
    pipeline: StableDiffusionPipeline,
) -> None:
    assert pipeline.safety_checker is None and pipeline.feature_extractor is None
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        assert {parameter.dtype for parameter in part.parameters()} == {torch.float32}


def test_the_same_seeds_give_the_same_bytes(pipeline: StableDiffusionPipeline) -> None:
    prompts = ["a cat", "an ant", "two dogs riding a bike", ""]
    first, second = generate(pipeline, prompts), generate(pipeline, prompts)
    assert first.shape == (4, 64, 64, 3)
    assert first.tobytes() == second.tobytes()
    assert first.std((1, 2)).max() > 5, "pictures are empty"


def test_the_prompt_decides_the_picture(pipeline: StableDiffusionPipeline) -> None:
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    images = pipeline(
        ["a frog", "a sheep"], num_inference_steps=4, eta=1.0, generator=generators
    ).images
    assert np.abs(np.asarray(images[0]).astype(int) - np.asarray(images[1])).mean() > 3


def test_the_recipe_ships_with_the_weights() -> None:
    training = json.loads((STARTER_PATH / "training.json").read_text())
    assert training["unet_pictures_seen"] > 0
    assert set(training["recipe"]) >= {"seed", "vae", "unet"}
