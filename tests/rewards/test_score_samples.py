"""A picture that cannot be scored never stops the others; a reward that is broken or away does."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
from PIL import Image

from ddpo.errors import RewardError, RewardUnavailable
from ddpo.prompts import Prompt
from ddpo.rewards import RewardIdentity, Scores
from ddpo.rewards.scoring import MARKED, score_samples

PROMPTS = [Prompt("a cat")] * 4


def pictures() -> list[Image.Image]:
    """Four pictures that can be told apart by their first pixel."""
    return [Image.new("RGB", (8, 8), (number, 0, 0)) for number in range(4)]


class Fake:
    """A reward that is the picture's number, unless something is planted."""

    identity = RewardIdentity("fake")

    def __init__(self, plant: Callable[[list[int], int], Scores | None]) -> None:
        self.plant = plant
        self.calls: list[list[int]] = []

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        numbers = [image.getpixel((0, 0))[0] for image in images]
        self.calls.append(numbers)
        return self.plant(numbers, len(self.calls)) or Scores([float(n) for n in numbers])


def raise_on(bad: set[int]) -> Callable[[list[int], int], None]:
    def plant(numbers: list[int], call: int) -> None:
        if bad.intersection(numbers):
            raise ValueError("cannot read this one, https://me:secret@host/x")

    return plant


def test_pictures_that_make_a_batch_raise_are_found_and_the_others_scored() -> None:
    reward = Fake(raise_on({1, 2}))
    outcomes = score_samples(reward, pictures(), PROMPTS, tries=1)
    assert [outcome.value for outcome in outcomes] == [0.0, None, None, 3.0]
    assert outcomes[0].status == "ok"
    assert "ValueError: cannot read this one" in outcomes[1].status
    assert "secret" not in outcomes[1].status
    assert reward.calls == [[0, 1, 2, 3], [0, 1, 2, 3], [0], [1], [2], [3]]


@pytest.mark.parametrize("tries", [1, 3])
def test_an_error_that_passes_does_not_change_a_score_that_rounds_by_batch(tries: int) -> None:
    def plant(numbers: list[int], call: int) -> Scores:
        if call == 1:
            raise RuntimeError("CUDA out of memory")
        return Scores([number + len(numbers) / 1e6 for number in numbers])

    undisturbed = Fake(lambda numbers, call: plant(numbers, call + 1))
    expected = score_samples(undisturbed, pictures(), PROMPTS, tries=tries)
    assert score_samples(Fake(plant), pictures(), PROMPTS, tries=tries) == expected


def test_a_sample_that_fails_once_is_scored_again() -> None:
    def plant(numbers: list[int], call: int) -> Scores | None:
        if call == 1:
            return Scores([0.0, 0.0, 2.0, 3.0], failed=[False, True, False, False])
        return None

    reward = Fake(plant)
    outcomes = score_samples(reward, pictures(), PROMPTS, tries=2)
    assert [outcome.value for outcome in outcomes] == [0.0, 1.0, 2.0, 3.0]
    assert reward.calls == [[0, 1, 2, 3], [1]]
    once = score_samples(Fake(plant), pictures(), PROMPTS, tries=1)
    assert once[1].value is None and once[1].status == MARKED


def test_a_sample_is_not_tried_more_often_than_asked() -> None:
    reward = Fake(raise_on({3}))
    score_samples(reward, pictures(), PROMPTS, tries=3)
    assert reward.calls.count([3]) == 3
    assert reward.calls.count([0]) == 1


def test_all_pictures_marked_as_failed_is_an_outcome_and_no_error() -> None:
    reward = Fake(lambda numbers, call: Scores([0.0] * len(numbers), failed=[True] * len(numbers)))
    outcomes = score_samples(reward, pictures(), PROMPTS, tries=2)
    assert {outcome.status for outcome in outcomes} == {MARKED}


def test_a_reward_that_raises_for_every_picture_is_broken() -> None:
    with pytest.raises(RewardError, match=r"fake-.*cannot read this one"):
        score_samples(Fake(raise_on({0, 1, 2, 3})), pictures(), PROMPTS, tries=2)


def test_a_reward_that_is_away_is_not_asked_picture_by_picture() -> None:
    def away(numbers: list[int], call: int) -> None:
        raise RewardUnavailable("no answer")

    reward = Fake(away)
    with pytest.raises(RewardUnavailable, match=r"fake-.*no answer"):
        score_samples(reward, pictures(), PROMPTS, tries=5)
    assert len(reward.calls) == 1


def test_columns_of_a_sample_are_its_own_and_none_is_left_out() -> None:
    def plant(numbers: list[int], call: int) -> Scores:
        return Scores([1.0] * 4, columns={"caption": ["a", None, "c", "d"]})

    outcomes = score_samples(Fake(plant), pictures(), PROMPTS, tries=1)
    assert [outcome.columns for outcome in outcomes] == [
        {"caption": "a"}, {}, {"caption": "c"}, {"caption": "d"},
    ]  # fmt: skip
