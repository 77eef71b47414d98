"""The reward `openai_vlm` against a server that speaks the protocol: requests, scores, identity."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator

import numpy as np
import pytest

from ddpo.errors import ConfigError, RewardError
from ddpo.prompts import Prompt
from ddpo.rewards import Reward, score_images
from ddpo.rewards.models.bert_recall import BertRecall
from ddpo.rewards.models.vlm_tasks import QUESTION
from tests.rewards.fake_vlm import (
    ASKED,
    MODEL,
    REPLY,
    Served,
    completion,
    load,
    refusal,
    scored,
    sent_picture,
    serving,
    shown,
)
from tests.rewards.tiny_models import PICTURES, PROMPTS
from tests.rewards.tiny_vlm import save_deberta
from tests.servers import free_port

pytestmark = pytest.mark.usefixtures("quick_and_unset")


@pytest.fixture
def up() -> Iterator[tuple[Served, str]]:
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def deberta(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deberta")
    save_deberta(folder)
    return str(folder)


# What is asked, and what comes of the answers.


def test_requests_are_chat_completions_with_the_picture_unchanged(up):
    served, url = up
    scored(load(url, max_new_tokens=7, at_once=1), 1)
    body = served.asked[0]
    assert {n: body[n] for n in ("model", "temperature", "max_tokens")} == {
        "model": MODEL,
        "temperature": 0,
        "max_tokens": 7,
    }
    assert [message["role"] for message in body["messages"]] == ["user"]
    assert body["messages"][0]["content"][1] == {"type": "text", "text": "How many?"}
    np.testing.assert_array_equal(np.asarray(sent_picture(body)), np.asarray(PICTURES[0]))
    assert [asked["messages"][0]["content"][1]["text"] for asked in served.asked] == [
        "How many?",
        "What?",
    ]


def test_vqa_is_the_share_of_right_answers_in_order(up):
    """Answers come back in any order; each belongs to its picture and question."""
    served, url = up

    def answer(body, number):
        time.sleep(0.02 * (number % 3))
        if body["messages"][0]["content"][1]["text"] == "How many?":
            return completion({0: "many", 1: "Two.", 2: "2"}[shown(body)])
        return completion("a cat" if shown(body) == 2 else "a dog")

    served.answer = answer
    scores = score_images(load(url), PICTURES, [ASKED, ASKED, ASKED, Prompt("a cat")])
    assert scores.values[:3].tolist() == [0.0, 0.5, 1.0]
    assert scores.failed.tolist() == [False, False, False, True]
    assert "no questions" in scores.columns["vqa_error"][3]
    told = json.loads(scores.columns["vqa_answers"][2])
    assert [each["answer"] for each in told] == ["2", "a cat"]


def test_alignment_is_the_recall_of_the_caption(up, deberta):
    served, url = up
    served.answer = lambda body, number: completion(f" a picture of {shown(body)} cats \n")
    reward = load(url, task="alignment", bert_model=deberta, bert_layer=3, device="cpu")
    scores = score_images(reward, PICTURES, PROMPTS)
    bert = BertRecall(deberta, None, 3, "cpu")
    for index, prompt in enumerate(PROMPTS):
        caption = f"a picture of {index} cats"
        assert scores.columns["caption"][index] == caption
        expected = bert.compare(caption, f"The image contains {prompt.text}").recall
        assert scores.values[index] == pytest.approx(expected, abs=1e-6)
    assert {b["messages"][0]["content"][1]["text"] for b in served.asked} == {QUESTION}


def test_requests_run_side_by_side_up_to_the_bound(up):
    served, url = up

    def answer(*_):
        """Answer once three have been asked at the same time, however long that takes."""
        deadline = time.monotonic() + 20
        while served.most_at_once < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        return completion(REPLY)

    served.answer = answer
    score_images(load(url, at_once=3), PICTURES * 2, [ASKED] * 8)
    assert len(served.asked) == 16
    assert served.most_at_once == 3


def test_no_pictures_are_no_scores(up):
    assert len(load(up[1])([], [])) == 0
    assert up[0].asked == []


# Identity.


def test_identity_is_the_task_and_the_model_behind_the_name(up, deberta):
    served, url = up
    reward = load(url)
    assert isinstance(reward, Reward)
    first = reward.identity
    assert re.fullmatch("openai_vlm-[0-9a-f]{8}", first.reward_id)
    assert first.revisions == {MODEL: "org/llava-7b"}
    assert first.parameters == {"model": MODEL, "task": "vqa", "max_new_tokens": 64}
    with serving() as (_, other):
        moved = load(other, url, at_once=2, timeout_s=9, retries=0, give_up_after_s=9)
        assert moved.identity == first
    served.models = (200, {}, Served.listing({"id": MODEL, "root": "org/another"}))
    assert load(url).identity.digest != first.digest
    compared = load(url, task="alignment", bert_model=deberta, bert_layer=3).identity
    assert compared.revisions.keys() == {MODEL, deberta}
    assert {"question", "template", "bert_layer"} <= compared.parameters.keys()


@pytest.mark.parametrize("models", [refusal(404), (200, {}, Served.listing())])
def test_a_service_that_lists_no_models_is_taken_at_its_word(up, models):
    served, url = up
    served.models = models
    assert load(url).identity.revisions == {MODEL: "unreported"}


def test_a_model_that_is_not_served_is_refused(up):
    served, url = up
    served.models = (200, {}, Served.listing({"id": "qwen"}, {"id": "pixtral"}))
    with pytest.raises(RewardError, match="does not serve 'llava'; it serves qwen, pixtral"):
        load(url)
    served.models = (200, {}, b'{"data": 3}')
    with pytest.raises(RewardError, match="/models is not a list of models: data"):
        load(url)


def test_endpoints_with_different_models_are_refused(up):
    with serving() as (other, address):
        other.models = (200, {}, Served.listing({"id": MODEL}))
        with pytest.raises(RewardError, match=r"serves .*start the same model everywhere"):
            load(up[1], address)


def test_settings_that_the_task_would_ignore_are_refused(up):
    with pytest.raises(ConfigError, match=r"question, bert_layer: the task 'vqa'"):
        load(up[1], question="What?", bert_layer=3)


@pytest.mark.parametrize(
    ("addresses", "message"),
    [
        ([], r"has no endpoint.*DDPO_VLM_ENDPOINTS"),
        (["localhost:8000"], "endpoint 0 of `endpoints` is not a plain address"),
        (["http://a:1/v1", "http://u:secret@b/v1"], "endpoint 1 of `endpoints` is not a plain"),
        (["http://a/v1", "http://a/v1/"], "names an endpoint twice"),
    ],
)
def test_addresses_that_are_none_are_refused(addresses, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(*addresses)
    assert "secret" not in str(caught.value)


def test_endpoints_come_from_the_environment_where_it_has_them(up, monkeypatch):
    monkeypatch.setenv("DDPO_VLM_ENDPOINTS", f" {up[1]}/ ,")
    assert scored(load(f"http://127.0.0.1:{free_port()}/v1")).values.tolist() == [1, 1, 1]
