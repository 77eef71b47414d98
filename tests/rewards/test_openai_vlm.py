"""The reward `openai_vlm` against a server that speaks the protocol, and one that does not."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from ddpo.errors import ConfigError, RewardError, RewardUnavailable
from ddpo.prompts import Prompt
from ddpo.rewards import Reward, load_reward, score_images
from ddpo.rewards import endpoints as endpoints_module
from ddpo.rewards.bert_recall import BertRecall
from ddpo.rewards.scoring import score_samples
from ddpo.rewards.vlm_tasks import QUESTION
from tests.rewards.tiny_models import PICTURES, PROMPTS
from tests.rewards.tiny_vlm import save_deberta
from tests.servers import free_port

MODEL = "llava"
KEY = "sk-canary-0123456789"
ASKED = Prompt("two cats", {"questions": ["How many?", "What?"], "answers": ["two", "cat"]})
REPLY = "2 cats"

Reply = tuple[int, dict[str, str], bytes]


def completion(text: str | None) -> Reply:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    body = {"id": "1", "object": "chat.completion", "model": MODEL, "choices": [choice]}
    return 200, {}, json.dumps(body).encode()


def refusal(status: int, **headers: str) -> Reply:
    said = {"error": {"message": f"no {status}", "type": "x"}}
    return status, {n.replace("_", "-"): v for n, v in headers.items()}, json.dumps(said).encode()


class Served:
    """What a server is told to answer, and what it was asked."""

    def __init__(self) -> None:
        self.models: Reply = (200, {}, self.listing({"id": MODEL, "root": "org/llava-7b"}))
        self.answer: Callable[[dict, int], Reply] = lambda body, number: completion(REPLY)
        self.asked: list[dict] = []
        self.times: list[float] = []
        self.authorization: set[str | None] = set()
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    @staticmethod
    def listing(*models: dict) -> bytes:
        return json.dumps({"object": "list", "data": list(models)}).encode()


@contextmanager
def serving(port: int = 0) -> Iterator[tuple[Served, str]]:
    served = Served()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.authorization.add(self.headers["Authorization"])
            self.reply(served.models if self.path == "/v1/models" else refusal(404))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions":
                self.reply(refusal(404))
                return
            with served.lock:
                served.authorization.add(self.headers["Authorization"])
                served.asked.append(body)
                served.times.append(time.monotonic())
                number = len(served.asked)
                served.at_once += 1
                served.most_at_once = max(served.most_at_once, served.at_once)
            try:
                reply = served.answer(body, number)
            finally:
                with served.lock:
                    served.at_once -= 1
            self.reply(reply)

        def reply(self, reply: Reply) -> None:
            status, headers, data = reply
            try:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                self.close_connection = True  # whoever asked is gone

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield served, f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def up() -> Iterator[tuple[Served, str]]:
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def deberta(tmp_path_factory):
    folder = tmp_path_factory.mktemp("deberta")
    save_deberta(folder)
    return str(folder)


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ("OPENAI_API_KEY", "DDPO_VLM_ENDPOINTS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(endpoints_module, "_FIRST_WAIT_S", 0.01)


def load(*addresses: str, **parameters):
    return load_reward(
        "openai_vlm",
        {"model": MODEL, "task": "vqa", "endpoints": list(addresses), **parameters},
    )


def scored(reward, count=3):
    return score_images(reward, PICTURES[:count], [ASKED] * count)


def shown(body: dict) -> int:
    """Return which of the pictures a request shows."""
    sent = np.asarray(sent_picture(body))
    return next(i for i, image in enumerate(PICTURES) if np.array_equal(sent, np.asarray(image)))


def sent_picture(body: dict) -> Image.Image:
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    start = "data:image/png;base64,"
    assert url.startswith(start)
    return Image.open(io.BytesIO(base64.b64decode(url[len(start) :])))


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
    served.answer = lambda *_: time.sleep(0.05) or completion(REPLY)
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
    with pytest.raises(RewardError, match="/models is no list of models: data"):
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
        (["localhost:8000"], "endpoint 0 of `endpoints` is no plain address"),
        (["http://a:1/v1", "http://u:secret@b/v1"], "endpoint 1 of `endpoints` is no plain"),
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


# Faults.


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
    "no-json": ((200, {}, b"<html>oops</html>"), r"no chat completion: the body: Invalid JSON"),
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
    assert "answered more than 5000 bytes" in scores.columns["vqa_error"][1]


def test_a_service_that_answers_no_question_at_all_is_an_error(up):
    served, url = up
    served.answer = lambda body, number: (200, {}, b"[]")
    with pytest.raises(RewardError, match=r"none of 6 questions was answered: .*no chat compl"):
        scored(load(url))


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"answered 401 no 401\. The API key in .*OPENAI_API_KEY is empty or not set"),
        (404, r"answered 404 no 404\. Check that the endpoint ends as .*serves 'llava'"),
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
        waiting.join(20)
        assert found[0].values.tolist() == [1, 1, 1]


# The key.


def test_the_key_is_sent_as_a_bearer_token_and_never_told(up, monkeypatch, caplog):
    served, url = up
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("MY_KEY", KEY)
    reward = load(url, key_variable="MY_KEY", retries=1)
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
    assert "another one than the service's" in texts[1]
    cut_in_its_midst = json.dumps({"message": "x" * 485 + KEY}).encode()
    served.answer = lambda *_: (401, {}, cut_in_its_midst)
    with pytest.raises(RewardError) as caught:
        scored(reward)
    texts.append(str(caught.value))
    assert not any(KEY[:8] in text for text in [*texts, caplog.text])


def test_a_key_in_the_place_of_its_variables_name_is_not_repeated(up):
    with pytest.raises(ConfigError, match=r"key_variable is no name.*name the variable") as caught:
        load(up[1], key_variable=KEY)
    assert KEY not in str(caught.value)
