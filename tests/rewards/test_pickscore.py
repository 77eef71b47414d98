"""PickScore against the logits of CLIP's own forward pass, each pair by itself."""

import numpy as np
import pytest
import torch

from ddpo.rewards import load_reward, score_images
from tests.rewards.tiny_models import PICTURES, PROMPTS, clip_parts, save_clip


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Return a folder of weights alone, one of tokenizer and processor alone, and the model."""
    whole, prepares = (tmp_path_factory.mktemp(name) for name in ("model", "processor"))
    model = save_clip(whole)
    with torch.no_grad():
        model.logit_scale.fill_(4.6)
    model.save_pretrained(whole)
    for file in whole.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.rename(prepares / file.name)
    return whole, prepares, model


@pytest.fixture(scope="module")
def reward(folders):
    whole, prepares, _ = folders
    return load_reward("pickscore", {"model": str(whole), "processor": str(prepares)})


def test_the_reward_is_clips_own_logit_for_the_pair(folders, reward):
    _, prepares, model = folders
    tokenizer, processor = clip_parts(prepares)
    expected = []
    for image, prompt in zip(PICTURES, PROMPTS, strict=True):
        tokens = tokenizer([prompt.text], return_tensors="pt")
        pixels = processor(image, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            expected.append(model(**tokens, pixel_values=pixels).logits_per_image.item())
    found = score_images(reward, PICTURES, PROMPTS).values
    np.testing.assert_allclose(found, expected, atol=1e-3)
    assert np.ptp(expected) > 0.1


def test_what_is_scored_together_changes_no_score(reward):
    together = reward(PICTURES, PROMPTS).values
    alone = [reward([i], [p]).values[0] for i, p in zip(PICTURES, PROMPTS, strict=True)]
    np.testing.assert_allclose(together, alone, atol=1e-4)
    np.testing.assert_array_equal(together, reward(PICTURES, PROMPTS).values)


def test_model_and_processor_are_both_in_the_identity(folders, reward):
    whole, prepares, _ = folders
    assert set(reward.identity.revisions) == {str(whole), str(prepares)}
