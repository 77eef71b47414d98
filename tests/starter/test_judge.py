"""Promises of the judge's code; those of its weights are in test_shipped_weights.py."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpo.starter.judge import Judge, JudgeNetwork, Verdicts, build_clip
from ddpo.starter.scenes import Scene
from ddpo.starter.text import build_tokenizer
from starter_training.losses import clip_loss
from tests.starter.similarity import similarity


@pytest.fixture(scope="module")
def judge() -> Judge:
    torch.manual_seed(0)
    return Judge(JudgeNetwork(build_clip(build_tokenizer())))


def pictures(count: int) -> list[Image.Image]:
    draws = np.random.default_rng(0)
    return [
        Image.fromarray(draws.integers(0, 256, (64, 64, 3), dtype=np.uint8)) for _ in range(count)
    ]


def test_a_saved_judge_says_the_same_and_names_its_answers(judge: Judge, tmp_path: Path) -> None:
    judge.save(tmp_path)
    again = Judge.load(tmp_path)
    images = pictures(3)
    for question, found in judge.look(images).probabilities.items():
        assert found.shape == (3, {"name": 69, "activity": 4, "count": 4}[question])
        np.testing.assert_allclose(found.sum(1), 1, rtol=1e-5)
        assert (again.look(images).probabilities[question] == found).all()
    prompts = ["a cat", "two mice", "something else"]
    assert (similarity(again, images, prompts) == similarity(judge, images, prompts)).all()
    (tmp_path / "labels.json").write_text(json.dumps({"name": ["cat"]}))
    with pytest.raises(ValueError, match="has other labels"):
        Judge.load(tmp_path)


def test_pictures_are_judged_alike_alone_and_in_company(judge: Judge) -> None:
    images = pictures(66)
    alone = judge.look(images[65:]).probabilities["name"]
    np.testing.assert_allclose(judge.look(images).probabilities["name"][65:], alone, atol=1e-5)


def test_what_counts_as_right() -> None:
    def one_hot(width: int, *places: int) -> np.ndarray:
        return np.eye(width, dtype=np.float32)[list(places)]

    # The judge sees: a cat; a cat riding a bike; a dog riding a bike; three dogs; two cats.
    verdicts = Verdicts(
        {
            "name": one_hot(69, 0, 0, 1, 1, 0),
            "activity": one_hot(4, 0, 1, 1, 0, 0),
            "count": one_hot(4, 0, 0, 0, 2, 1),
        }
    )
    assert verdicts.names == ["cat", "cat", "dog", "dog", "cat"]
    assert verdicts.activities == [None, "riding a bike", "riding a bike", None, None]
    assert verdicts.counts == [1, 1, 1, 3, 2]
    asked = [
        Scene("cat"),
        Scene("cat", "riding a bike"),
        Scene("cat", "riding a bike"),
        Scene("cat", count=3),
        Scene("cat", count=3),
    ]
    assert verdicts.right(asked).tolist() == [True, True, False, True, False]


def test_the_contrast_is_clips_with_prompts_that_repeat() -> None:
    torch.manual_seed(0)
    pictures = torch.nn.functional.normalize(torch.randn(3, 5).double(), dim=-1)
    prompts = torch.nn.functional.normalize(torch.randn(2, 5).double(), dim=-1)
    place, scale = torch.tensor([0, 1, 0]), torch.tensor(7.0).double()
    exp = np.exp(7 * pictures.numpy() @ prompts.numpy().T)
    of_pictures = -np.log([exp[i, p] / exp[i].sum() for i, p in enumerate(place)]).mean()
    share = exp / exp.sum(0)
    first, second = -np.log(share[[0, 2], 0]).mean(), -np.log(share[1, 1])
    expected = (of_pictures + (first + second) / 2) / 2
    assert float(clip_loss(pictures, prompts, place, scale)) == pytest.approx(expected, rel=1e-12)
