"""What Scores accepts, and what score_images makes of a reward that misbehaves."""

import numpy as np
import pytest
import torch
from PIL import Image

from ddpo.errors import RewardError
from ddpo.prompts import Prompt
from ddpo.rewards import RewardIdentity, Scores, score_images

IMAGES = [Image.new("RGB", (8, 8))] * 3
PROMPTS = [Prompt("a cat")] * 3


class Returns:
    identity = RewardIdentity("returns")

    def __init__(self, result):
        self.result = result

    def __call__(self, images, prompts):
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


@pytest.mark.parametrize(
    "result",
    [
        [1, 2.5, -3],
        (1, 2.5, -3),
        np.array([1, 2.5, -3]),
        torch.tensor([1, 2.5, -3]),
        Scores(np.float32([1, 2.5, -3])),
    ],
)
def test_numbers_of_any_kind_become_float32(result):
    scores = score_images(Returns(result), IMAGES, PROMPTS)
    assert scores.values.dtype == np.float32
    assert scores.values.tolist() == [1, 2.5, -3]
    assert scores.failed.tolist() == [False] * 3
    assert scores.columns == {}


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e300])
def test_non_finite_reward_is_refused_and_its_sample_named(bad):
    with pytest.raises(RewardError, match=r"returns-.*sample 1 of 3 has the reward -?(nan|inf)"):
        score_images(Returns([0.0, bad, 0.0]), IMAGES, PROMPTS)


def test_failed_samples_may_be_non_finite_and_hold_nan():
    scores = Scores(np.array([1.0, np.inf, 7.0]), failed=np.array([False, True, True]))
    assert scores.failed.tolist() == [False, True, True]
    assert scores.values[0] == 1
    assert np.isnan(scores.values[1:]).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": [[1.0], [2.0]]}, r"shape \[B\].*not \[2, 1\]"),
        ({"values": 1.0}, r"not \[\]"),
        ({"values": ["a", "b"]}, "numbers"),
        ({"values": [1.0, 2.0], "failed": [True]}, r"bool \[2\].*\[1\]"),
        ({"values": [1.0, 2.0], "failed": [0, 1]}, r"bool \[2\].*int64"),
        ({"values": [1.0, 2.0], "columns": {"caption": ["a"]}}, "'caption' needs 2.*1 values"),
        ({"values": [1.0, 2.0], "columns": {"caption": "ab"}}, "'caption' needs 2"),
        ({"values": [1.0], "columns": {"reward": [1.0]}}, "'reward'.*rename"),
    ],
)
def test_scores_that_do_not_fit_together_are_refused(arguments, message):
    with pytest.raises(RewardError, match=message):
        Scores(**arguments)


def test_columns_become_plain_python_values():
    columns = {"share": np.array([0.5, 1.0]), "caption": ("a", "b"), "n": torch.tensor([1, 2])}
    scores = Scores([0.0, 0.0], columns=columns)
    assert scores.columns == {"share": [0.5, 1.0], "caption": ["a", "b"], "n": [1, 2]}
    assert type(scores.columns["n"][0]) is int


def test_scores_do_not_change_after_they_were_made():
    given = np.zeros(2, np.float32)
    scores = Scores(given)
    given[0] = 9
    assert scores.values.tolist() == [0, 0]
    with pytest.raises(ValueError, match="read-only"):
        scores.values[0] = 1


def test_wrong_number_of_scores_is_refused_by_name():
    with pytest.raises(RewardError, match=r"returns-[0-9a-f]{8} returned 2 scores for 3 images"):
        score_images(Returns([1.0, 2.0]), IMAGES, PROMPTS)


def test_wrong_number_of_prompts_is_refused():
    with pytest.raises(RewardError, match="3 images with 2 prompts"):
        score_images(Returns([1.0] * 3), IMAGES, PROMPTS[:2])


def test_exception_of_a_reward_names_the_reward_and_is_the_cause():
    cause = ZeroDivisionError("by nought")
    with pytest.raises(
        RewardError, match=r"returns-\w{8} raised ZeroDivisionError: by nought"
    ) as e:
        score_images(Returns(cause), IMAGES, PROMPTS)
    assert e.value.__cause__ is cause
