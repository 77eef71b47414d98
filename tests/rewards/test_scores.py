"""What Scores accepts, and what score_images makes of a reward that misbehaves."""

import numpy as np
import pytest
import torch
from PIL import Image

from ddpo.errors import RewardError
from ddpo.prompts import Prompt
from ddpo.rewards import RewardIdentity, Scores, score_images
from ddpo.rewards.columns import say_left_out

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


@pytest.mark.parametrize(
    ("given", "stored"),
    [
        ([True, False], [1, 0]),
        ([np.float32(0.5), np.int64(2)], [0.5, 2.0]),
        (np.array([1, 2], np.uint8), [1, 2]),
        ([1, float("nan")], [1.0, None]),
        ([float("inf"), 1e300], [None, None]),
        ([2**63, 1], [float(2**63), 1.0]),
        (["a", None], ["a", None]),
        (["\ud800", "b"], ["\\ud800", "b"]),
        ([None, None], [None, None]),
        (torch.tensor([0.5, 1.0], requires_grad=True), [0.5, 1.0]),
        ([torch.tensor(1), torch.tensor(2)], [1, 2]),
    ],
)
def test_columns_become_what_a_table_holds(given, stored):
    found = Scores([0.0, 0.0], columns={"a": given}).columns["a"]
    assert found == stored
    assert [type(value) for value in found] == [type(value) for value in stored]


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["a"], "1 values for 2 samples"),
        ("ab", "it is a str, not one value per sample"),
        (7, "it is a int"),
        (["a", 1], "both text and numbers"),
        ([{}, {}], "values of type dict"),
        ([[1], [2]], "values of type list"),
        ([1j, 2j], "values of type complex"),
        (np.zeros((2, 2)), "values of type list"),
        (torch.empty(2, device="meta"), "meta"),
    ],
)
def test_a_column_that_cannot_be_stored_is_left_out_with_a_warning(given, reason, caplog):
    say_left_out.cache_clear()
    assert Scores([0.0, 0.0], columns={"odd": given, "even": [1, 2]}).columns == {"even": [1, 2]}
    (said,) = caplog.messages
    assert said.startswith("the reward's column 'odd' is not stored: ") and reason in said
    Scores([0.0, 0.0], columns={"odd": given})
    assert len(caplog.messages) == 1  # said once


def test_a_name_that_a_table_cannot_have_is_changed():
    names = ["my col", "reward", "Epoch", "9", "größe", "a" * 200, "猫", "犬", "my_col", "", 3]
    found = Scores([0.0], columns={name: [1] for name in names}).columns
    assert list(found) == [
        "my_col", "reward_", "Epoch_", "_9", "gr__e", "a" * 100, "_", "__", "my_col_", "__2", "_3",
    ]  # fmt: skip


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
