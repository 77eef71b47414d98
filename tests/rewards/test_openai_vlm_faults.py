"""The reward `openai_vlm` against a server that fails, is away or repeats its key."""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from ddpo.errors import ConfigError, RewardError, RewardUnavailable
from ddpo.rewards.scoring import score_samples
from ddpo.rewards.service import endpoints as endpoints_module
from tests.rewards.fake_vlm import (
    ASKED,
    REPLY,
    Served,
    completion,
    load,
    refusal,
    scored,
    serving,
    shown,
)
from tests.rewards.tiny_models import PICTURES
from tests.servers import free_port

KEY = "sk-canary-0123456789"

pytestmark = pytest.mark.usefixtures("quick_and_unset")


@pytest.fixture
def up() -> Iterator[tuple[Served, str]]:
    with serving() as found:
        yield found


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_service_is_asked_again_when_it_says(up, status):
    served, url = up
    served.answer = lambda body, number: (
        refusal(status, Retry_After="1") if number == 1 else completion(REPLY)
    )
    scores = scored(load(url, at_once=1), 1)
    assert scores.values.tolist() == [1.0]
    assert len(served.asked) == 3
    assert served.times[1] - served.times[0] >= 1


def test_an_error_of_the_service_that_does_not_come_again_costs_nothing(up):
    served, url = up
    served.answer = lambda body, number: refusal(500) if number == 1 else completion(REPLY)
    assert scored(load(url, at_once=1)).values.tolist() == [1, 1, 1]


FAULTS = {
    "500": (refusal(500), r"answered 500 no 500"),
    "400": (refusal(400), r"answered 400 no 400"),
    "no-json": (
        (200, {}, b"<html>oops</html>"),
        r"not return a chat completion: the body: Invalid JSON",
    ),
    "no-choices": ((200, {}, b'{"choices": []}'), r"completion without choices"),
    "no-message": ((200, {}, b'{"choices": [{"text": "x"}]}'), r"choices.0.message: Field requ"),
    "no-text": ((200, {}, b'{"choices": [{"message": {"content": [1]}}]}'), r"valid string"),
    "empty": (completion(" \n"), r"the model's answer is empty"),
    "null": (completion(None), r"the model's answer is empty"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_picture_without_an_answer_fails_with_the_reason_and_no_other_does(up, fault):
    served, url = up
    reply, reason = FAULTS[fault]
    served.answer = lambda body, number: reply if shown(body) == 1 else completion(REPLY)
    scores = scored(load(url))
    assert scores.failed.tolist() == [False, True, False]
    assert scores.values[[0, 2]].tolist() == [1, 1]
    assert scores.columns["vqa_error"][0] == ""
    assert re.search(reason, scores.columns["vqa_error"][1])
    outcomes = score_samples(load(url), PICTURES[:3], [ASKED] * 3, tries=2)
    assert [outcome.value for outcome in outcomes] == [1, None, 1]


def test_a_picture_whose_answer_has_no_end_fails_and_no_other_does(up, monkeypatch):
    served, url = up
    endless = (200, {}, bytes(6000))
    served.answer = lambda body, number: endless if shown(body) == 1 else completion(REPLY)
    monkeypatch.setattr(endpoints_module, "_ANSWER_LIMIT_BYTES", 5000)
    scores = scored(load(url))
    assert scores.failed.tolist() == [False, True, False]
    assert "sent more than 5000 bytes" in scores.columns["vqa_error"][1]


def test_a_service_that_answers_no_question_at_all_is_an_error(up):
    served, url = up
    served.answer = lambda body, number: (200, {}, b"[]")
    with pytest.raises(
        RewardError, match=r"none of 6 questions was answered: .*not return a chat compl"
    ):
        scored(load(url))


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"answered 401 no 401\. Check the API key: .*OPENAI_API_KEY is empty or not set"),
        (404, r"answered 404 no 404\. Check that the endpoint's path is .*serves 'llava'"),
        (307, r"answered 307 .*Check that the endpoint"),
    ],
)
def test_wrong_settings_are_an_error_at_once(up, status, message):
    served, url = up
    served.answer = lambda body, number: refusal(status)
    with pytest.raises(RewardError, match=message):
        scored(load(url, at_once=1))
    assert len(served.asked) == 1


def test_a_slow_answer_is_given_up_and_another_endpoint_asked(up):
    slow, url = up
    ended = threading.Event()
    slow.answer = lambda *_: ended.wait(60) and completion("late")
    try:
        with serving() as (other, address):
            reward = load(url, address, timeout_s=1.0)
            assert scored(reward).values.tolist() == [1, 1, 1]
            assert len(slow.asked) >= 1 and len(other.asked) >= 6
        with pytest.raises(RewardUnavailable, match=r"no endpoint .* answered .*(Timeout|whole)"):
            scored(load(url, timeout_s=0.2, retries=0), 1)
    finally:
        ended.set()


def test_a_dead_endpoint_costs_nothing_while_another_is_alive(up):
    url = up[1]
    reward = load(f"http://127.0.0.1:{free_port()}/v1", url)
    assert scored(reward).values.tolist() == [1, 1, 1]
    assert reward.identity == load(url).identity


def test_a_service_that_is_gone_is_unavailable_and_one_that_returns_goes_on():
    port = free_port()
    with ExitStack() as first:
        _, url = first.enter_context(serving(port))
        reward = load(url, retries=2)
        patient = load(url, retries=200)
        assert scored(reward).values.tolist() == [1, 1, 1]
    with pytest.raises(RewardUnavailable, match=r"no endpoint of the served model answered"):
        scored(reward)
    with pytest.raises(RewardUnavailable):
        score_samples(reward, PICTURES[:2], [ASKED] * 2, tries=2)
    with pytest.raises(RewardUnavailable, match="DDPO_VLM_ENDPOINTS"):
        load(url, start_within_s=0.05)
    found: list = []
    waiting = threading.Thread(target=lambda: found.append(scored(patient)))
    waiting.start()
    time.sleep(0.1)
    with serving(port):
        waiting.join(300)
        assert found[0].values.tolist() == [1, 1, 1]


# The key.


def test_the_key_is_sent_as_a_bearer_token_and_never_told(up, monkeypatch, caplog):
    served, url = up
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("DDPO_MY_KEY", KEY)
    reward = load(url, key_variable="DDPO_MY_KEY", retries=1)
    scored(reward)
    assert served.authorization == {f"Bearer {KEY}"}
    said = json.dumps({"error": {"message": f"bad key {KEY}"}}).encode()
    texts = [repr(reward.identity)]
    for status in (401, 400, 500, 503):
        served.answer = lambda body, number, status=status: (status, {}, said)
        with pytest.raises(RewardError) as caught:
            scored(reward)
        texts.append(str(caught.value))
    assert all("bad key ***" in text for text in texts[1:])
    assert "does not match the service's" in texts[1]
    cut_in_its_midst = json.dumps({"message": "x" * 485 + KEY}).encode()
    served.answer = lambda *_: (401, {}, cut_in_its_midst)
    with pytest.raises(RewardError) as caught:
        scored(reward)
    texts.append(str(caught.value))
    assert not any(KEY[:8] in text for text in [*texts, caplog.text])


def test_a_key_in_the_place_of_its_variables_name_is_not_repeated(up):
    with pytest.raises(
        ConfigError, match=r"key_variable is not the name.*name the variable"
    ) as caught:
        load(up[1], key_variable=KEY)
    assert KEY not in str(caught.value)
