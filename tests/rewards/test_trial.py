"""What a reward of the user's own returns is known before its run starts."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from ddpo.errors import UnusableScores
from ddpo.prompts import Prompt
from ddpo.rewards import load_reward, trial
from ddpo.rewards.service.app import create_app
from ddpo.rewards.trial import try_out
from ddpo.runs import start_run
from tests.rewards.served import serving, wait_for
from tests.tiny import tiny_config

PROMPTS = [Prompt("a cat", {"n": 1}), Prompt("a dog")]

OWN = """
import numpy as np, threading

seen = []
go = threading.Event()

def fine(images, prompts):
    seen.append(([image.size for image in images], prompts))
    return [1.0] * len(images)

def pairs(images, prompts):
    return np.zeros((len(images), 2))

def words(images, prompts):
    return ["good"] * len(images)

def records(images, prompts):
    return {"reward": [1.0] * len(images)}

def complexes(images, prompts):
    return np.ones(len(images)) * 1j

def nothing(images, prompts):
    pass

async def later(images, prompts):
    return [1.0] * len(images)

def average(images, prompts):
    return [1.0] * (len(images) + 1)

def picky(images, prompts):
    raise ValueError("no face")

def single(images, prompts):
    return [1.0]

def slow(images, prompts):
    go.wait()
    return [1.0] * len(images)
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "own_trial_fixture.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("own_trial_fixture", None)
    trial._tried.clear()
    yield "own_trial_fixture"
    sys.modules.pop("own_trial_fixture", None)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pairs", r"not \[2, 2\]"),
        ("words", "cannot convert values to an array of numbers"),
        ("records", "cannot convert values"),
        ("complexes", "they are complex"),
        ("nothing", "returned None; return one number per image"),
        ("later", "a coroutine; write it as a plain function"),
        ("average", "3 scores for 2 images"),
    ],
)
def test_a_run_of_a_reward_that_returns_no_scores_is_refused_before_its_name_is_taken(
    own: str, name: str, message: str, tiny_model: Path, tmp_path: Path
) -> None:
    store = {"root": str(tmp_path / "store")}
    config = tiny_config(tiny_model, storage=store, reward={"name": f"{own}:{name}"})
    with pytest.raises(UnusableScores, match=message) as told:
        start_run(config, "r")
    assert "before the run starts" in str(told.value) and "\n" not in str(told.value)
    assert not list((tmp_path / "store").rglob("run.json"))


def test_it_is_asked_once_about_images_as_the_run_samples_them(own: str) -> None:
    reward = load_reward(f"{own}:fine", {})
    for _ in range(2):
        try_out(reward, PROMPTS, (24, 16))
    assert sys.modules[own].seen == [([(24, 16)] * 2, PROMPTS)]


def test_what_it_raises_is_shown_and_no_reason_to_refuse(
    own: str, caplog: pytest.LogCaptureFixture
) -> None:
    try_out(load_reward(f"{own}:picky", {}), PROMPTS)
    assert any("no face" in said and "before the run starts" in said for said in caplog.messages)
    try_out(load_reward(f"{own}:single", {}), PROMPTS)  # one by one, which is said


def test_a_component_of_a_sum_and_a_served_reward_are_tried_out(
    own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("DDPO_REWARD_ENDPOINTS", raising=False)
    with pytest.raises(UnusableScores, match="not"):
        try_out(load_reward("weighted", {"rewards": [{"name": f"{own}:pairs"}]}), PROMPTS)
    seen = sys.modules[own].seen
    with serving(create_app(lambda: load_reward(f"{own}:fine", {}))) as url:
        wait_for(url)
        try_out(load_reward("http", {"endpoints": [url]}), PROMPTS)
    assert len(seen) == 1


def test_rewards_that_come_with_the_project_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "score_samples", pytest.fail)
    try_out(load_reward("jpeg_compressibility", {}), PROMPTS)
    try_out(load_reward("weighted", {"rewards": [{"name": "colorfulness"}]}), PROMPTS)


def test_a_slow_reward_is_not_waited_for(own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "PATIENCE_S", 0.05)
    try_out(load_reward(f"{own}:slow", {}), PROMPTS)
    assert [thread for thread in threading.enumerate() if thread.name == "trial"]
    sys.modules[own].go.set()
