"""CLIPScore against the judge that ships with the project, and against CLIP's own forward pass."""

import numpy as np
import pytest
import torch

from ddpo.prompts import Prompt
from ddpo.rewards import load_reward, score_images
from ddpo.starter import JUDGE_PATH
from ddpo.starter.judge import Judge
from tests.rewards.tiny_models import PICTURES, PROMPTS, clip_parts, picture, save_clip
from tests.starter.similarity import similarity


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return save_clip(folder), folder


def cosines_by_forward(model, images, texts) -> np.ndarray:
    """Return CLIP's logits for each pair by itself, their scale divided out."""
    clip, folder = model
    tokenizer, processor = clip_parts(folder)
    found = []
    for image, text in zip(images, texts, strict=True):
        tokens = tokenizer([text], truncation=True, max_length=24, return_tensors="pt")
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            output = clip(**tokens, pixel_values=pixels)
        found.append(output.logits_per_image[0, 0].item() / clip.logit_scale.exp().item())
    return np.array(found)


@pytest.mark.parametrize("prefix", ["", "a photo of "])
def test_the_reward_is_the_formula_on_clips_own_cosines(model, prefix):
    reward = load_reward("clip_score", {"model": str(model[1]), "prefix": prefix, "device": "cpu"})
    cosines = cosines_by_forward(model, PICTURES, [prefix + p.text for p in PROMPTS])
    scores = score_images(reward, PICTURES, PROMPTS)
    np.testing.assert_allclose(scores.columns["cosine"], cosines, atol=1e-5)
    np.testing.assert_allclose(scores.values, 2.5 * np.clip(cosines, 0, None), atol=1e-5)
    assert np.ptp(cosines) > 1e-3


def test_cosine_keeps_what_is_below_zero(model):
    pictures = [picture(64, 64) for _ in range(12)]
    prompts = [PROMPTS[i % 4] for i in range(12)]
    settings = {"model": str(model[1]), "device": "cpu"}
    plain = load_reward("clip_score", {**settings, "formula": "cosine"})(pictures, prompts)
    clipped = load_reward("clip_score", settings)(pictures, prompts)
    np.testing.assert_allclose(plain.values, plain.columns["cosine"])
    np.testing.assert_allclose(clipped.values, 2.5 * np.clip(plain.values, 0, None), rtol=1e-6)
    assert plain.values.min() < 0  # so that the two differ here


def test_neither_padding_nor_company_changes_a_score(model):
    reward = load_reward("clip_score", {"model": str(model[1]), "formula": "cosine"})
    prompts = [*PROMPTS, Prompt("a cat and " * 40), Prompt("a")]
    pictures = [*PICTURES, *PICTURES[:2]]
    together = reward(pictures, prompts).values
    alone = [reward([i], [p]).values[0] for i, p in zip(pictures, prompts, strict=True)]
    np.testing.assert_allclose(together, alone, atol=1e-6)
    # The long prompt is cut, not refused.
    expected = cosines_by_forward(model, pictures, [p.text for p in prompts])
    np.testing.assert_allclose(together, expected, atol=1e-5)


def test_the_starters_judge_says_what_it_says_itself():
    reward = load_reward("clip_score", {"model": "starter-judge", "formula": "cosine"})
    found = score_images(reward, PICTURES, PROMPTS)
    expected = similarity(Judge.load(JUDGE_PATH), PICTURES, [p.text for p in PROMPTS])
    np.testing.assert_allclose(found.values, expected, atol=1e-6)
    assert set(reward.identity.revisions) == {"starter-judge"}
    assert reward.identity.revisions["starter-judge"].startswith("sha256:")
