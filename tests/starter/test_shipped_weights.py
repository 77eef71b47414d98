"""Promises of the weights that ship with the package."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from ddpo.starter import JUDGE_PATH, STARTER_PATH
from ddpo.starter.judge import Judge
from ddpo.starter.scenes import Kind, scenes
from starter_training.measure import accuracy, fresh_pictures
from tests.starter.similarity import similarity


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.load(JUDGE_PATH)


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


@pytest.mark.parametrize(("folder", "limit_mb"), [(STARTER_PATH, 25), (JUDGE_PATH, 8)])
def test_weights_are_safetensors_of_limited_size(folder: Path, limit_mb: int) -> None:
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert {path.suffix for path in files if path.name != "merges.txt"} <= {".safetensors", ".json"}
    assert sum(path.stat().st_size for path in files) <= limit_mb * 1e6


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


def test_transformers_4_finds_all_that_it_looks_for() -> None:
    """`tests/models/test_older_releases.py` lets it load them."""
    names = load_file(STARTER_PATH / "text_encoder" / "model.safetensors").keys()
    assert all(name.startswith("text_model.") for name in names)
    folder = STARTER_PATH / "tokenizer"
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    assert json.loads((folder / "vocab.json").read_text()) == model["vocab"]
    merges = (folder / "merges.txt").read_text().splitlines()[1:]
    assert [merge.split(" ") for merge in merges] == model["merges"]


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


def test_the_weights_name_what_made_them() -> None:
    made = [json.loads((path / "training.json").read_text()) for path in (STARTER_PATH, JUDGE_PATH)]
    assert made[0] == made[1]
    assert made[0]["command"].startswith("python -m ddpo.starter.train --seed ")
    assert made[0]["unet_pictures_seen"] == made[0]["recipe"]["unet"]["pictures"]
    stages = made[0]["stages"].values()
    assert all(stage["done"] for stage in stages)
    assert all(len(commit) == 40 for stage in stages for commit in stage["commits"])
    figures = made[0]["figures"]["judge"]
    assert figures["renders"]["all"] >= 0.98


DRAW = """
import hashlib, sys
import numpy as np, torch
from diffusers import StableDiffusionPipeline
torch.set_num_threads(1)
pipeline = StableDiffusionPipeline.from_pretrained(sys.argv[1])
images = pipeline(
    ["a cat", "an ant"], num_inference_steps=4, guidance_scale=3.0, eta=1.0,
    generator=[torch.Generator().manual_seed(place) for place in range(2)],
).images
print(hashlib.sha256(np.stack([np.asarray(image) for image in images]).tobytes()).hexdigest())
"""


@pytest.mark.slow
def test_another_process_draws_the_same_bytes(pipeline: StableDiffusionPipeline) -> None:
    expected = hashlib.sha256(generate(pipeline, ["a cat", "an ant"]).tobytes()).hexdigest()
    done = subprocess.run(
        [sys.executable, "-c", DRAW, str(STARTER_PATH)],
        capture_output=True, text=True, check=True, timeout=900,
    )  # fmt: skip
    assert done.stdout.strip() == expected


def test_the_judge_knows_pictures_that_it_has_never_seen(judge: Judge) -> None:
    fresh = fresh_pictures(12345, 256)
    images = [Image.fromarray(picture.pixels) for picture in fresh]
    found = accuracy(judge, images, [picture.scene for picture in fresh])
    assert found["all"] >= 0.98, found


def test_the_judges_clip_prefers_a_pictures_own_prompt(judge: Judge) -> None:
    fresh = fresh_pictures(54321, 128)
    images = [Image.fromarray(picture.pixels) for picture in fresh]
    own = [picture.scene.prompt for picture in fresh]
    other = [*own[1:], own[0]]
    different = np.array([one != two for one, two in zip(own, other, strict=True)])
    better = similarity(judge, images, own) > similarity(judge, images, other)
    assert better[different].mean() >= 0.98


@pytest.mark.slow
def test_most_animals_are_recognised_as_the_demo_draws_them(
    pipeline: StableDiffusionPipeline, judge: Judge
) -> None:
    """One seed per animal; `make starter-report` measures twenty."""
    wanted = list(scenes(Kind.SINGLE))
    images, _ = pipeline(
        [scene.prompt for scene in wanted],
        return_dict=False,
        num_inference_steps=20,
        guidance_scale=3.0,
        eta=1.0,
        generator=[torch.Generator().manual_seed(place) for place in range(len(wanted))],
    )
    assert judge.look(images).right(wanted).mean() >= 0.8
