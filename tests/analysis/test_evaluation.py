"""What an evaluation says: statistics of images, gains in pairs, what is sampled."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from PIL import Image

from ddpo.analysis.evaluation.alarms import alarms, constant_share
from ddpo.analysis.evaluation.champion import Candidate, best_of
from ddpo.analysis.evaluation.image_statistics import (
    STATISTICS,
    diversity,
    image_statistics,
    thumbnail,
)
from ddpo.analysis.evaluation.plan import is_due, noise_seed, spread
from ddpo.analysis.evaluation.summary import evaluation_rows, reward_labels, summarize
from ddpo.basics.images import encode_image
from ddpo.config import EvaluationConfig, GateConfig
from ddpo.store.tables import (
    EvaluationRow,
    RolloutRow,
    decode_evaluation,
    encode_evaluation,
)

PX = 64


def flat(level: int) -> Image.Image:
    return Image.new("RGB", (PX, PX), (level, level, level))


def halves(left: int, right: int) -> Image.Image:
    pixels = np.full((PX, PX, 3), left, np.uint8)
    pixels[:, PX // 2 :] = right
    return Image.fromarray(pixels)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (flat(0), {"brightness": 0.0, "dark": 1.0, "blown": 0.0, "edges": 0.0, "entropy": 0.0}),
        (flat(255), {"brightness": 1.0, "dark": 0.0, "blown": 1.0, "edges": 0.0, "entropy": 0.0}),
        # Central differences see the edge in the column on either side of it.
        (
            halves(0, 255),
            {"brightness": 0.5, "dark": 0.5, "blown": 0.5, "edges": 2 / PX, "entropy": 1.0},
        ),
        (halves(120, 125), {"dark": 0.0, "blown": 0.0, "edges": 0.0, "entropy": 0.0}),
    ],
    ids=["black", "white", "halves", "a faint edge"],
)
def test_statistics_of_plain_images(image: Image.Image, expected: dict[str, float]) -> None:
    found = image_statistics(image)
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_noise_has_the_entropy_of_all_its_colours_and_the_largest_file() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    found = image_statistics(Image.fromarray(noise))
    assert found["entropy"] == pytest.approx(9, abs=0.01)
    assert found["edges"] > 0.9
    assert found["jpeg_kb"] > 100 * image_statistics(flat(128))["jpeg_kb"]


def test_diversity_is_the_mean_distance_of_images_of_one_prompt() -> None:
    black, grey, white = (thumbnail(flat(level)) for level in (0, 51, 255))
    found = diversity([[black, white], [black, black], [grey]])
    assert found == pytest.approx({"diversity": 0.5, "repetition": 0.5})
    assert diversity([[black, grey, white]])["diversity"] == pytest.approx((0.2 + 1 + 0.8) / 3)
    assert diversity([[black], [white]]) == {}


def row(prompt: str, score: float | None, number: int = 0) -> EvaluationRow:
    statistics = {**dict.fromkeys(STATISTICS, 0.0), "jpeg_kb": 1.0}
    return EvaluationRow(f"r/00000/{number:06d}", prompt, 0, {"score.a": score, **statistics})


def sample_of(prompt: str, number: int, image: Image.Image) -> RolloutRow:
    name = f"r/00000/{number:06d}"
    return RolloutRow(name, 0, number, prompt, {}, 1, "p", "s", None, encode_image(image))


def test_a_gain_is_over_pairs_and_its_interval_over_prompts() -> None:
    before = [row("a cat", 1.0), row("a cat", 2.0), row("a dog", 5.0), row("a fox", 1.0)]
    after = [row("a cat", 2.0), row("a cat", 2.5), row("a dog", 4.5), row("a fox", None)]
    samples = [sample_of(each.prompt, i, flat(9)) for i, each in enumerate(after)]
    found = summarize(after, samples, before, [0.5, None, 0.25])
    by_prompt = [0.75, -0.5]
    low, high = scipy.stats.t.interval(
        0.95, 1, np.mean(by_prompt), scipy.stats.sem(by_prompt, ddof=1)
    )
    assert found["a/mean"] == pytest.approx(3.0)
    assert found["a/failed"] == 1
    assert found["a/gain"] == pytest.approx(0.125)
    assert (found["a/gain_low"], found["a/gain_high"]) == pytest.approx((low, high))
    assert found["a/wins"] == pytest.approx(2 / 3)
    assert found["kl_to_base"] == pytest.approx(0.375)
    assert found["images/jpeg_kb"] == 1.0
    assert (found["diversity"], found["repetition"]) == (0.0, 1.0)


def test_without_a_baseline_or_a_score_there_is_no_gain() -> None:
    samples = [sample_of("a cat", 0, flat(9))]
    assert not [n for n in summarize([row("a cat", 1.0)], samples) if "gain" in n]
    failed = summarize([row("a cat", None)], samples, [row("a cat", 1.0)])
    assert failed["a/failed"] == 1
    assert "a/mean" not in failed and "a/gain" not in failed


def test_rows_are_stored_as_they_are() -> None:
    samples = [sample_of("a cat", i, halves(0, 50 * i)) for i in range(3)]
    scores: dict[str, dict[str, float | None]] = {}
    scores["a"] = {s.sample_id: float(s.index) for s in samples}
    scores["b"] = {s.sample_id: None for s in samples}
    rows = evaluation_rows(samples, [7, 8, 9], scores)
    assert decode_evaluation(encode_evaluation(rows)) == rows
    assert [each.seed for each in rows] == [7, 8, 9]


def test_labels_are_names_without_modules_unless_two_clash() -> None:
    names = ["colorfulness", "mine.module:sharp", "other:sharp"]
    ids = ["colorfulness-1", "sharp-2", "sharp-3"]
    assert reward_labels(names, ids) == ["colorfulness", "sharp-2", "sharp-3"]
    assert reward_labels(names[:2], ids[:2]) == ["colorfulness", "sharp"]


@pytest.mark.parametrize(
    ("size", "count", "chosen"),
    [(3, 5, [0, 1, 2]), (10, 2, [2, 7]), (45, 1, [22]), (6, 3, [1, 3, 5])],
)
def test_prompts_are_spread_over_the_whole_set(size: int, count: int, chosen: list[int]) -> None:
    assert spread(size, count) == chosen


def test_images_of_two_prompts_share_no_noise() -> None:
    assert noise_seed("a cat", 0) != noise_seed("a dog", 0)
    assert noise_seed("a cat", 0) != noise_seed("a cat", 1)


def test_the_first_every_nth_and_the_last_checkpoint_are_due() -> None:
    config = EvaluationConfig(every=3)
    assert [e for e in range(2, 11) if is_due(config, e, first=2, end=10)] == [2, 5, 8, 10]


def spread_rows() -> list[EvaluationRow]:
    """Images whose statistics are half 0.4 and half 0.6: their standard deviation is 0.1."""
    return [EvaluationRow("r", "a cat", 0, dict.fromkeys(STATISTICS, v)) for v in (0.4, 0.6)]


HEALTHY = {
    **{f"images/{name}": 0.5 for name in STATISTICS},
    "own/failed": 0.0,
    "own/gain": 1.0,
    "own/gain_low": 0.5,
    "judge/failed": 0.0,
    "judge/gain": -0.1,
    "judge/gain_high": 0.1,
    "diversity": 0.15,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"judge/gain": -0.3, "judge/gain_high": -0.1}, "judge fell by 0.3 while own rose by 1"),
        (
            {"images/dark": 0.71},
            "share of dark pixels is 0.71, 2.1 standard deviations above the 0.5",
        ),
        ({"images/brightness": 0.29}, "brightness is 0.29, 2.1 standard deviations below"),
        ({"images/entropy": 0.81}, "entropy of colors is 0.81, 2.1 standard deviations above"),
        ({"diversity": 0.13}, "65% as diverse"),
        ({"kl_to_base": 1.1}, "KL divergence from the base model is 1.1, over 1"),
        ({"clip_fraction": 0.51}, "the clip fraction is 0.51, over 0.5"),
        ({"constant_prompts": 0.9}, "the share of prompts with one reward is 0.9, over 0.8"),
    ],
)
def test_an_alarm_names_what_looks_wrong(changes: dict[str, float], message: str) -> None:
    found, before, limits = {**HEALTHY, **changes}, {"diversity": 0.2}, GateConfig(most_kl=1.0)
    assert alarms("own", HEALTHY, before, spread_rows(), limits, HEALTHY) == []
    (alarm,) = alarms("own", found, before, spread_rows(), limits, found)
    assert message in alarm
    off = GateConfig(
        judges=False,
        statistics=(),
        least_diversity=None,
        most_clipped=None,
        most_constant=None,
    )
    assert alarms("own", found, before, spread_rows(), off, found) == []


def test_images_with_one_value_allow_a_few_pixels() -> None:
    rows = [EvaluationRow("r", "a cat", 0, dict.fromkeys(STATISTICS, 0.0)) for _ in range(3)]
    metrics = {f"images/{name}": 0.0 for name in STATISTICS}
    assert alarms("own", {**metrics, "images/dark": 0.039}, {}, rows, GateConfig()) == []
    assert alarms("own", {**metrics, "images/dark": 0.041}, {}, rows, GateConfig()) != []


def test_the_share_of_prompts_without_an_advantage_counts_those_sampled_twice() -> None:
    prompts = ["a", "a", "b", "b", "c", "d", "d"]
    assert constant_share(prompts, [1.0, 1.0, 1.0, 2.0, 5.0, 3.0, None]) == 0.5
    assert constant_share(["a", "b"], [1.0, 1.0]) is None


def test_the_champion_gained_most_without_an_alarm() -> None:
    first, low, high = Candidate(0, 1.0), Candidate(5, 2.0), Candidate(10, 3.0)
    cheats = Candidate(15, 9.0, ("diversity",))
    assert best_of([first, low, high, cheats]) == high
    assert best_of([first, high, Candidate(20, 3.0)]) == high  # of equals the earliest
    assert best_of([first, cheats]) is None
    assert best_of([first, Candidate(5, 1.0)]) is None
    assert best_of([Candidate(0, None), Candidate(5, None), low]) == low


def test_a_judge_that_falls_alone_is_no_sign_of_cheating() -> None:
    metrics = {**HEALTHY, "own/gain_low": -0.5, "judge/gain_high": -0.1}
    assert alarms("own", metrics, {}, spread_rows(), GateConfig()) == []
