"""The published weights themselves, where DDPO_TEST_WEIGHTS names a folder that has them.

Each file lies there under its published name; models and tokenizers are folders as on the hub
(`clip-vit-large-patch14`, `PickScore_v1`, `CLIP-ViT-H-14-laion2B-s32B-b79K`, `bert-base-uncased`),
and ImageReward's example pictures are in `imagereward-examples` (assets/images of its repository).
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ddpo.prompts import Prompt
from ddpo.rewards import load_reward, score_images
from ddpo.rewards.builtin.laion_aesthetic import HEAD_SHA256
from ddpo.rewards.models.pinned import find_weights

GOLDEN = Path(__file__).parents[1] / "golden"
LAION_HEAD = "sac+logos+ava1-l14-linearMSE.pth"
VIT_L, VIT_H = "clip-vit-large-patch14", "CLIP-ViT-H-14-laion2B-s32B-b79K"

# The README of github.com/THUDM/ImageReward.
OCEAN = "a painting of an ocean with clouds and birds, day time, low depth field effect"
OCEAN_REWARDS = [0.5811622738838196, 0.2745276093482971, -1.4131819009780884, -2.029569625854492]


def weights(*names: str) -> list[str]:
    folder = os.environ.get("DDPO_TEST_WEIGHTS")
    if folder is None:
        pytest.skip("needs published weights: DDPO_TEST_WEIGHTS names no folder of them")
    paths = [Path(folder) / name for name in names]
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        pytest.skip(f"needs published weights: {', '.join(missing)} not in {folder}")
    return list(map(str, paths))


def test_the_laion_head_as_published_is_the_golden_one():
    (path,) = weights(LAION_HEAD)
    found = find_weights(path, None, HEAD_SHA256).tensors()
    expected = load_file(GOLDEN / "laion_aesthetic_head.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_image_reward_gives_the_rewards_of_its_readme():
    path, tokenizer, examples = weights(
        "ImageReward.pt", "bert-base-uncased", "imagereward-examples"
    )
    reward = load_reward("image_reward", {"weights": path, "tokenizer": tokenizer})
    pictures = [Image.open(Path(examples) / f"{number}.webp") for number in range(1, 5)]
    found = score_images(reward, pictures, [Prompt(OCEAN)] * 4).values
    np.testing.assert_allclose(found, OCEAN_REWARDS, atol=0.02)


# Plain colours, and what their names are: no published values, but which must win is known.
COLOURS = {"red": (220, 20, 20), "green": (20, 160, 40), "blue": (20, 40, 220)}


@pytest.mark.parametrize(
    ("name", "parameters", "lowest", "highest"),
    [
        ("clip_score", {"model": VIT_L, "formula": "cosine"}, 0.1, 0.4),
        ("pickscore", {"model": "PickScore_v1", "processor": VIT_H}, 10, 30),
        ("hps_v2", {"weights": "HPS_v2.1_compressed.pt", "tokenizer": VIT_H}, 0.05, 0.45),
        ("image_reward", {"weights": "ImageReward.pt", "tokenizer": "bert-base-uncased"}, -4, 3),
    ],
)
def test_a_colour_fits_its_own_name_best(name, parameters, lowest, highest):
    files = {key: value for key, value in parameters.items() if key != "formula"}
    reward = load_reward(name, parameters | dict(zip(files, weights(*files.values()), strict=True)))
    prompts = [Prompt(f"a plain {colour} background") for colour in COLOURS]
    table = np.stack(
        [
            score_images(reward, [Image.new("RGB", (512, 512), rgb)] * 3, prompts).values
            for rgb in COLOURS.values()
        ]
    )
    assert (table > lowest).all()
    assert (table < highest).all()
    assert table.argmax(0).tolist() == [0, 1, 2]


def test_the_aesthetic_score_is_on_its_scale():
    path, model = weights(LAION_HEAD, VIT_L)
    reward = load_reward("laion_aesthetic", {"model": model, "head": path})
    pictures = [Image.new("RGB", (512, 512), rgb) for rgb in COLOURS.values()]
    found = score_images(reward, pictures, [Prompt("a colour")] * 3).values
    assert (found > 1).all()
    assert (found < 8).all()
