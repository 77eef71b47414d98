"""Rewards as people write them: the same table in process and over HTTP, and never a night lost."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from PIL import Image

from ddpo.errors import RewardError
from ddpo.prompts import Prompt
from ddpo.rewards import RewardIdentity, Scores, load_reward, scoring
from ddpo.rewards.base import Reward
from ddpo.rewards.scoring import score_samples
from ddpo.rewards.service.app import create_app
from ddpo.store.keys import validate_reward_id
from ddpo.store.tables import RewardRow, decode_rewards, encode_rewards
from tests.rewards.served import pictures, serving, wait_for

COUNT = 6
IMAGES = pictures(COUNT)
PROMPTS = [Prompt(f"{number} cats", {"number": number}) for number in range(COUNT)]

WILD = """
import sys, time
import numpy as np
import torch
from ddpo.rewards import Scores

def number(image):
    return int(np.asarray(image)[0, 0, 0])

class Stateful:
    def __call__(self, images, prompts):
        self.numbers = [number(image) for image in images]
        return self.numbers

def slow(images, prompts):
    time.sleep(0.05)
    return [float(number(image)) for image in images]

def every_third(images, prompts):
    for prompt in prompts:
        if prompt.metadata["number"] % 3 == 0:
            raise ValueError(f"cannot look at {prompt}")
    return [float(number(image)) for image in images]

def float16(images, prompts):
    values = np.array([number(image) for image in images], np.float16)
    return Scores(values, columns={"half": values, "list": list(values)})

def meta(images, prompts):
    return torch.zeros(len(images), device="meta")

def tensors(images, prompts):
    return [torch.tensor(float(number(image)), requires_grad=True) for image in images]

def ints(images, prompts):
    return Scores([number(i) for i in images], columns={
        "n": [number(i) for i in images], "even": [number(i) % 2 == 0 for i in images],
        "caption": [None if number(i) % 2 else "even" for i in images],
        "gaps": [None if number(i) % 2 else number(i) for i in images],
        "my col": np.array([p.metadata["number"] for p in prompts]),
        "of objects": [object()] * len(images)})

def nan(images, prompts):
    return [float("nan") if p.metadata["number"] == 2 else 1.0 for p in prompts]

def nan_columns(images, prompts):
    return Scores([1.0] * len(images), columns={
        "share": [float("nan") if p.metadata["number"] == 2 else 3 for p in prompts],
        "none": [float("nan")] * len(images), "mixed": ["a", 1, None] * (len(images) // 3)})

def wrong_length(images, prompts):
    return [1.0]

def one_too_many(images, prompts):
    return [1.0] * (len(images) + 1)

def exits(images, prompts):
    sys.exit("no licence")

def ported(images, prompts, metadata):
    scores = [len(p.lower()) + m["number"] for p, m in zip(prompts, metadata)]
    return np.array(scores), {"words": [p.split()[0] for p in prompts], "count": 3}
"""
NAMES = [line.split("(")[0].split()[1].rstrip(":") for line in WILD.splitlines()
         if line.startswith(("def ", "class ")) and "number(" not in line]  # fmt: skip
BROKEN = {"meta": "meta", "one_too_many": "scores for", "exits": "SystemExit: no licence"}


@pytest.fixture
def wild(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "wild_rewards_fixture.py").write_text(WILD)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("wild_rewards_fixture", None)
    yield "wild_rewards_fixture"
    sys.modules.pop("wild_rewards_fixture", None)


def table(reward: Reward) -> bytes | str:
    """Return the table of a shard, or the one line that says why there is none."""
    try:
        outcomes = score_samples(reward, IMAGES, PROMPTS, tries=1)
    except RewardError as error:
        assert len(str(error).splitlines()) == 1, str(error)
        return str(error)
    rows = [
        RewardRow(f"r/00000/{index:06}", outcome.value, outcome.status, outcome.columns)
        for index, outcome in enumerate(outcomes)
    ]
    return encode_rewards(rows)


@pytest.mark.parametrize("name", NAMES)
def test_a_wild_reward_gives_the_same_table_in_process_and_over_http(
    name: str, wild: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DDPO_REWARD_ENDPOINTS", raising=False)
    reward = load_reward(f"{wild}:{name}", {})
    here = table(reward)
    with serving(create_app(lambda: reward)) as url:
        wait_for(url)
        there = [
            table(load_reward("http", {"endpoints": [url], "retries": 0, "max_batch": batch}))
            for batch in (COUNT, 4)
        ]
    if name in BROKEN:
        assert all(isinstance(told, str) and BROKEN[name] in told for told in
                   [here, *there])  # fmt: skip
        return
    assert isinstance(here, bytes) and there == [here] * 2, [here, *there]
    rows = decode_rewards(here)
    failing = {"every_third": {0, 3}, "nan": {2}}.get(name, set())
    assert {index for index, row in enumerate(rows) if row.reward is None} == failing
    assert all(("cannot look" in row.status or "nan" in row.status) == (i in failing)
               for i, row in enumerate(rows))  # fmt: skip


def test_integers_and_texts_keep_their_type(wild: str) -> None:
    data = table(load_reward(f"{wild}:ints", {}))
    assert isinstance(data, bytes)
    numbers = [int(np.asarray(image)[0, 0, 0]) for image in IMAGES]
    for number, row, index in zip(numbers, decode_rewards(data), range(COUNT), strict=True):
        expected: dict[str, object] = {"n": number, "even": int(number % 2 == 0), "my_col": index}
        if number % 2 == 0:
            expected |= {"caption": "even", "gaps": number}
        assert dict(row.columns) == expected
        assert {type(value) for value in row.columns.values()} <= {int, str}


def test_a_batch_that_cannot_be_scored_at_once_is_said_once(
    wild: str, caplog: pytest.LogCaptureFixture
) -> None:
    scoring._slow.clear()
    for _ in range(2):
        table(load_reward(f"{wild}:wrong_length", {}))
    (said,) = [text for text in caplog.messages if "one by one" in text]
    assert "returned 1 scores for 6 images" in said


numbers = st.one_of(
    st.floats(allow_nan=True), st.integers(), st.booleans(), st.none(), st.text(max_size=3)
)
arrays_of_any_kind = arrays.arrays(
    st.one_of(
        arrays.floating_dtypes(), arrays.integer_dtypes(), arrays.boolean_dtypes(),
        arrays.complex_number_dtypes(), arrays.unicode_string_dtypes(max_len=3),
    ),
    arrays.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=COUNT),
)  # fmt: skip
anything = st.one_of(
    numbers,
    st.lists(numbers, max_size=COUNT + 1),
    st.lists(numbers, min_size=COUNT, max_size=COUNT),
    st.lists(st.lists(numbers, max_size=2), min_size=COUNT, max_size=COUNT),
    arrays_of_any_kind,
    arrays_of_any_kind.filter(lambda a: a.dtype.kind in "fiub").map(
        lambda a: torch.tensor(a.astype(np.float32))
    ),
    st.binary(max_size=COUNT),
    st.dictionaries(st.text(max_size=3), numbers, max_size=2),
    st.just(torch.zeros(COUNT, device="meta")),
    st.builds(object),
)
columns = st.dictionaries(st.one_of(st.text(max_size=120), st.integers()), anything, max_size=4)


class Returns:
    """A reward that returns what it is given; for one image of several, the first."""

    identity = RewardIdentity("returns")

    def __init__(self, values: Any, columns: Mapping[Any, Any] | None) -> None:
        self.values, self.columns = values, columns

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Any:
        if self.columns is None:
            return self.values
        return Scores(self.values, columns=self.columns)  # pyright: ignore[reportArgumentType]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(values=anything, extra=st.none() | columns)
def test_whatever_a_reward_returns_is_stored_or_refused_in_one_line(
    values: Any, extra: Mapping[Any, Any] | None
) -> None:
    data = table(Returns(values, extra))
    assert isinstance(data, str) or len(decode_rewards(data)) == COUNT


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(extra=columns)
def test_whatever_columns_a_reward_has_its_scores_are_stored(extra: Mapping[Any, Any]) -> None:
    data = table(Returns([1.0] * COUNT, extra))
    assert isinstance(data, bytes)
    assert [row.reward for row in decode_rewards(data)] == [1.0] * COUNT


@pytest.mark.parametrize("name", ["_x:f", "ÄÖ:f", "9:f", "a" * 200, "奖励.模块:得分", ""])
def test_any_name_of_a_reward_is_a_place_in_the_store(name: str) -> None:
    assert validate_reward_id(RewardIdentity(name).reward_id)
