"""The LAION aesthetic score against golden values, and against the formula on CLIP's raw output."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ddpo.errors import RewardError
from ddpo.rewards import load_reward, score_images
from ddpo.rewards.builtin.laion_aesthetic import HEAD, HEAD_SHA256, aesthetic_scores
from ddpo.rewards.models.linear_head import build_head
from tests.rewards.tiny_models import (
    PICTURES,
    PROMPTS,
    by_head,
    clip_parts,
    head_tensors,
    picture,
    save_clip,
    save_tensors,
    tiny_clip_config,
)

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    return save_clip(folder, tiny_clip_config(projection_dim=768)), folder


@pytest.fixture(scope="module")
def reward(model, tmp_path_factory):
    head = save_tensors(tmp_path_factory.mktemp("head") / "h.safetensors", head_tensors(768))
    return load_reward("laion_aesthetic", {"model": str(model[1]), "head": head, "device": "cpu"})


def test_the_head_gives_the_published_scores_for_raw_embeddings():
    golden = load_file(GOLDEN / "laion_aesthetic_scores.safetensors")
    head = build_head("head", 768, load_file(GOLDEN / "laion_aesthetic_head.safetensors"))
    norms = golden["embeddings"].norm(dim=-1)
    assert (norms > 2).all()  # dividing by them makes a difference
    found = aesthetic_scores(head, golden["embeddings"])
    torch.testing.assert_close(found, golden["scores"], atol=1e-5, rtol=0)


def test_the_reward_is_the_formula_on_what_clip_says(model, reward):
    clip, folder = model
    expected = []
    for image in PICTURES:
        pixels = clip_parts(folder)[1](image, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            features = clip.get_image_features(pixels).pooler_output.double()
        expected.append(by_head(head_tensors(768), features / features.square().sum().sqrt()))
    scores = score_images(reward, PICTURES, PROMPTS)
    np.testing.assert_allclose(scores.values, torch.cat(expected), atol=1e-4)
    assert np.ptp(scores.values) > 0.01


def test_what_is_scored_together_changes_no_score(reward):
    pictures = [picture(40 + i, 70 - i) for i in range(19)]  # more than one pass
    together = reward(pictures, [PROMPTS[0]] * 19).values
    alone = [reward([one], [PROMPTS[0]]).values[0] for one in pictures]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    assert reward([], []).values.shape == (0,)


@pytest.mark.parametrize("mode", ["RGBA", "L", "P"])
def test_pictures_of_other_modes_are_made_rgb(reward, mode):
    image = picture(50, 60).convert(mode)
    found = reward([image, image.convert("RGB")], PROMPTS[:2]).values
    assert found[0] == found[1]


def test_a_head_as_published_scores_as_its_safetensors_do(model, reward, tmp_path):
    torch.save(head_tensors(768), tmp_path / "head.pth")
    published = load_reward(
        "laion_aesthetic", {"model": str(model[1]), "head": str(tmp_path / "head.pth")}
    )
    found = published(PICTURES, PROMPTS).values
    np.testing.assert_array_equal(found, reward(PICTURES, PROMPTS).values)
    assert published.identity.digest != reward.identity.digest


def test_a_head_of_another_shape_is_refused(model, tmp_path):
    wrong = {**head_tensors(512), "layers.9.bias": torch.ones(1)}
    del wrong["layers.7.bias"]
    head = save_tensors(tmp_path / "h.safetensors", wrong)
    reward = load_reward("laion_aesthetic", {"model": str(model[1]), "head": head})
    with pytest.raises(
        RewardError,
        match=r"missing: layers\.7\.bias; unexpected: layers\.9\.bias; of another shape: "
        r"layers\.0\.weight \[1024, 512\] not \[1024, 768\]",
    ):
        score_images(reward, PICTURES, PROMPTS)


def test_the_default_head_is_pinned_by_its_sha256():
    reward = load_reward("laion_aesthetic", {})
    assert reward.identity.revisions[HEAD] == f"sha256:{HEAD_SHA256}"
