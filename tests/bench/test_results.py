"""What `bench.results` measures of runs from scratch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from PIL import Image

from bench.evaluate import _told_apart
from bench.results import _starter_that_predicts
from ddpo.config import FullConfig, ModelConfig
from ddpo.models import check_model
from ddpo.models.hub import STARTERS
from ddpo.prompts import Prompt, load_prompts
from ddpo.rewards import Reward, load_reward
from ddpo.rewards.builtin.disc_match import BACKGROUND, Disc


@dataclass
class Scored:
    reward: Reward


def drawn(prompt: Prompt) -> Image.Image:
    disc = Disc.model_validate(prompt.metadata["disc"])
    pixels = np.full((64, 64, 3), BACKGROUND, np.uint8)
    pixels[disc.covers(64, 64)] = disc.color
    return Image.fromarray(pixels)


def test_images_that_follow_their_prompt_are_told_apart_and_others_are_not() -> None:
    run = cast(Any, Scored(load_reward("disc_match", {})))
    prompts = load_prompts("colored_discs", {"colors": ["red", "blue"]})
    images = [drawn(prompt) for prompt in prompts]
    assert _told_apart(run, images, prompts) == 1
    assert _told_apart(run, [*images[1:], images[0]], prompts) == 0
    grey = Image.new("RGB", (64, 64), (int(BACKGROUND),) * 3)
    assert _told_apart(run, [grey] * len(prompts), prompts) == 0  # no prompt is preferred
    assert _told_apart(run, [images[0], grey] * 4, [prompts[0], prompts[1]] * 4) == 0.5


def test_the_copy_of_the_starter_differs_in_its_prediction_type_alone(tmp_path: Path) -> None:
    copy = _starter_that_predicts("v_prediction", tmp_path)
    assert _starter_that_predicts("v_prediction", tmp_path) == copy
    scheduler = Path("scheduler/scheduler_config.json")
    files = [file for file in STARTERS["starter"].rglob("*") if file.is_file()]
    assert len(files) > 8
    for file in files:
        name = file.relative_to(STARTERS["starter"])
        if name != scheduler:
            assert (copy / name).read_bytes() == file.read_bytes()
    before, after = (
        json.loads((folder / scheduler).read_text()) for folder in (STARTERS["starter"], copy)
    )
    assert after == before | {"prediction_type": "v_prediction"}
    facts = check_model(ModelConfig(path=str(copy)), FullConfig(type="full", from_scratch=True))
    assert cast(Any, facts.schedule).prediction_type == "v_prediction"
