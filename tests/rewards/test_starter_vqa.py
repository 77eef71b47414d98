"""The judge's answers as a reward, on pictures whose scene is known."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from ddpo.errors import ConfigError
from ddpo.prompts import Prompt, load_prompts
from ddpo.rewards import load_reward, score_images
from ddpo.rewards.builtin import starter_vqa
from ddpo.starter import JUDGE_PATH
from ddpo.starter.judge import ACTIVITY_LABELS, COUNT_LABELS, NAME_LABELS, Judge
from ddpo.starter.render import Picture, draw
from ddpo.starter.scenes import SCENES, Kind, Scene, scenes


@pytest.fixture(scope="module")
def rendered() -> list[Picture]:
    """Two fresh renders of each kind of scene."""
    found: dict[Kind, list[Picture]] = {kind: [] for kind in Kind}
    index = 0
    while any(len(pictures) < 2 for pictures in found.values()):
        picture = draw(987, index, all_pairs=True)
        found[picture.scene.kind].append(picture)
        index += 1
    return [picture for pictures in found.values() for picture in pictures[:2]]


def images_of(pictures):
    return [Image.fromarray(picture.pixels) for picture in pictures]


def prompts_of(pictures):
    return [Prompt(picture.scene.prompt) for picture in pictures]


def score(images, prompts, **parameters):
    return score_images(load_reward("starter_vqa", parameters), images, prompts)


def test_a_picture_of_its_prompt_scores_near_one_and_each_head_is_told(rendered):
    scores = score(images_of(rendered), prompts_of(rendered))
    assert scores.values.min() > 0.9
    assert scores.columns["seen_species"] == [p.scene.name for p in rendered]
    assert scores.columns["seen_activity"] == [p.scene.activity or "none" for p in rendered]
    assert scores.columns["seen_count"] == [p.scene.count for p in rendered]
    assert scores.columns["vqa_error"] == [""] * len(rendered)


def test_the_reward_is_the_mean_probability_of_what_was_asked(rendered):
    images = images_of(rendered[:3])
    asked = [Scene("wolf"), Scene("cat", "playing chess"), Scene("bee", count=3)]
    prompts = [Prompt(scene.prompt) for scene in asked]
    found = Judge.load(JUDGE_PATH).look(images).probabilities
    expected = [
        (
            found["name"][i, NAME_LABELS.index(scene.name)],
            found["activity"][i, ACTIVITY_LABELS.index(scene.activity or "")],
            found["count"][i, COUNT_LABELS.index(scene.count)],
        )
        for i, scene in enumerate(asked)
    ]
    scores = score(images, prompts)
    np.testing.assert_allclose(scores.values, np.mean(expected, axis=1), atol=1e-5)
    for place, question in enumerate(("species", "activity", "count")):
        column = [each[place] for each in expected]
        np.testing.assert_allclose(scores.columns[f"p_{question}"], column, atol=1e-5)
        only = score(images, prompts, questions=[question])
        np.testing.assert_allclose(only.values, column, atol=1e-5)
        assert only.columns == scores.columns
    two = score(images, prompts, questions=["count", "species"]).values
    np.testing.assert_allclose(two, np.array(expected)[:, [0, 2]].mean(1), atol=1e-5)


def test_what_a_picture_does_not_show_costs_its_question(rendered):
    (doing,) = [p for p in rendered if p.scene.kind is Kind.ACTIVITY][:1]
    name = doing.scene.name
    prompts = [Prompt(doing.scene.prompt), Prompt(Scene(name).prompt), Prompt("an owl")]
    right, idle, other = score(images_of([doing] * 3), prompts).values
    assert right > 0.9
    assert idle == pytest.approx(2 / 3, abs=0.1)  # it should not be doing anything
    assert other == pytest.approx(1 / 3, abs=0.1)


def test_a_prompt_without_a_scene_fails_alone(rendered):
    image = images_of(rendered[:1])[0]
    prompts = [Prompt("five cats"), prompts_of(rendered)[0], Prompt("a city at night")]
    scores = score([image] * 3, prompts)
    assert scores.failed.tolist() == [True, False, True]
    assert "is not a scene" in scores.columns["vqa_error"][0]
    assert scores.columns["vqa_error"][1] == ""
    assert scores.columns["p_count"][0] is None
    assert scores.columns["seen_species"] == [rendered[0].scene.name] * 3


def test_every_prompt_of_the_starters_tasks_names_its_scene():
    for name, parameters, count in [
        ("simple_animals", {}, 45),
        ("simple_animals", {"article": False}, 45),
        ("animal_activities", {}, 135),
        ("counting", {"low": 1, "high": 4}, 180),
        ("starter_scenes", {}, 339),
    ]:
        found = {starter_vqa.scene_of(p.text) for p in load_prompts(name, parameters)}
        assert None not in found
        assert len(found) == count, name
    assert all(starter_vqa.scene_of(scene.prompt) == scene for scene in SCENES)
    assert starter_vqa.scene_of(" A  Cat\nriding a bike ") == Scene("cat", "riding a bike")
    assert starter_vqa.scene_of("one cat") == starter_vqa.scene_of("cat") == Scene("cat")
    assert starter_vqa.scene_of("one cats") is None


def test_company_changes_not_a_bit(rendered):
    images, prompts = images_of(rendered), prompts_of(rendered)
    together = score(images, prompts).values
    alone = [score([i], [p]).values[0] for i, p in zip(images, prompts, strict=True)]
    assert together.tolist() == alone


def test_threads_share_one_judge_and_agree(rendered, monkeypatch):
    starter_vqa._loaded_judge.cache_clear()
    loads = []
    load = Judge.load.__func__

    def slow_load(cls, folder):
        loads.append(folder)
        return load(cls, folder)

    monkeypatch.setattr(Judge, "load", classmethod(slow_load))
    images, prompts = images_of(rendered), prompts_of(rendered)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: score(images, prompts).values.tolist(), range(4)))
    assert found == [found[0]] * 4
    assert len(loads) == 1


def test_building_it_loads_no_model():
    code = """
import json, sys
from ddpo.rewards import load_reward
reward = load_reward("starter_vqa", {"questions": ["species"]})
print(json.dumps([reward.identity.revisions, sorted({"torch", "transformers"} & set(sys.modules))]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    revisions, loaded = json.loads(done.stdout)
    assert loaded == []
    assert revisions == {"starter judge": starter_vqa.judge_digest()}


def test_other_weights_or_questions_are_another_reward(tmp_path, monkeypatch):
    before = load_reward("starter_vqa", {}).identity.digest
    all_three = {"questions": ["species", "activity", "count"]}
    assert load_reward("starter_vqa", all_three).identity.digest == before
    assert load_reward("starter_vqa", {"questions": ["species"]}).identity.digest != before
    for path in JUDGE_PATH.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(starter_vqa, "JUDGE_PATH", tmp_path)
    assert load_reward("starter_vqa", {}).identity.digest == before
    (tmp_path / "training.json").write_bytes(b"other")  # how it came to be, not what it sees with
    assert load_reward("starter_vqa", {}).identity.digest == before
    seen = {before}
    for name in (
        "config.json",
        "heads.safetensors",
        "labels.json",
        "model.safetensors",
        "preprocessor_config.json",
    ):
        (tmp_path / name).write_bytes(b"other")
        seen.add(load_reward("starter_vqa", {}).identity.digest)
    assert len(seen) == 6


@pytest.mark.parametrize(
    ("questions", "message"),
    [
        ([], "at least 1 item"),
        (["colour"], "'species', 'activity' or 'count'"),
        (["count", "count"], "lists one twice"),
    ],
)
def test_questions_that_do_not_fit_are_refused(questions, message):
    with pytest.raises(ConfigError, match=message):
        load_reward("starter_vqa", {"questions": questions})


def prompts_named(**parameters):
    return [prompt.text for prompt in load_prompts("starter_scenes", parameters)]


def test_starter_scenes_may_leave_out_what_the_generator_never_saw():
    held_out = {scene.prompt for scene in scenes(Kind.ACTIVITY) if scene.held_out}
    assert len(held_out) == 27
    everything = prompts_named(kinds=["activity"])
    assert len(everything) == len(set(everything)) == 135
    seen = prompts_named(kinds=["activity"], held_out="without")
    unseen = prompts_named(kinds=["activity"], held_out="only")
    assert set(unseen) == held_out
    assert sorted([*seen, *unseen]) == sorted(everything)
    counts = prompts_named(kinds=["count"])
    assert len(counts) == 135
    assert {text.split()[0] for text in counts} == {"two", "three", "four"}
    assert len(prompts_named(kinds=["single", "other"])) == 45 + 24
    with pytest.raises(ConfigError, match="empty"):
        prompts_named(kinds=["count"], held_out="only")
