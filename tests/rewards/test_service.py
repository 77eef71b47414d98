"""The reward service over real connections: what it answers, to whom, and many at once."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
from PIL import Image

from ddpo.basics.images import encode_image
from ddpo.errors import ConfigError, RewardError
from ddpo.prompts import Prompt
from ddpo.rewards import score_images
from ddpo.rewards.service.app import create_app
from ddpo.rewards.service.limits import Limits
from ddpo.rewards.service.serving import serve
from tests.rewards.served import (
    CLIENT,
    GOOD,
    TOKEN,
    Sum,
    expected,
    form,
    pictures,
    post,
    prompts_of,
    score,
    serving,
    wait_for,
)

# What it answers.


def test_scores_through_http_are_the_local_ones_to_the_bit(up):
    images = pictures(3)
    prompts = [Prompt("a"), Prompt("fail", {"q": ["é", 1.1, None]}), Prompt("c")]
    local = score_images(Sum(), images, prompts)
    told = [{"text": p.text, "metadata": dict(p.metadata)} for p in prompts]
    answer = post(up, [encode_image(i) for i in images], told).json()
    np.testing.assert_array_equal(np.float32(answer["values"][::2]), local.values[::2])
    assert answer["values"][1] is None
    assert answer["failed"] == [False, True, False]
    assert answer["columns"]["length"] == local.columns["length"]
    assert answer["columns"]["share"] == [float(np.float32(1 / 3)), None, float(np.float32(1 / 3))]
    assert answer["identity"] == CLIENT.get(f"{up}/identity").json()
    assert answer["identity"]["digest"] == Sum.identity.digest


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1"])
def test_png_arrives_in_its_own_mode(up, mode):
    image = pictures(1)[0].convert(mode)
    answer = post(up, [encode_image(image)], prompts_of(1)).json()
    assert answer["columns"]["mode"] == [mode]
    local = Sum()([image], [Prompt("a cat", {"n": 0})])
    np.testing.assert_array_equal(np.float32(answer["values"]), local.values)


def test_jpeg_is_read_as_pillow_reads_it(up):
    buffer = io.BytesIO()
    pictures(1)[0].save(buffer, "JPEG")
    answer = post(up, [buffer.getvalue()], prompts_of(1)).json()
    local = Sum()([Image.open(buffer)], [Prompt("a cat", {"n": 0})])
    np.testing.assert_array_equal(np.float32(answer["values"]), local.values)


def test_it_is_alive_before_it_is_ready():
    loads = threading.Event()

    def load() -> Sum:
        assert loads.wait(300)
        return Sum()

    with serving(create_app(load)) as url:
        assert CLIENT.get(f"{url}/health").status_code == 200
        for answer in (CLIENT.get(f"{url}/ready"), CLIENT.get(f"{url}/identity"), score(url)):
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
            assert "being loaded" in answer.json()["detail"]
        loads.set()
        wait_for(url)
        assert score(url).json()["values"] == expected(2)


def test_reward_that_cannot_be_loaded_is_said_and_ends_serve():
    def load() -> Sum:
        raise RewardError("no weights")

    with serving(create_app(load)) as url:
        while "being loaded" in (answer := CLIENT.get(f"{url}/ready")).text:
            time.sleep(0.01)
        assert (answer.status_code, "no weights" in answer.text) == (503, True)
    with pytest.raises(ConfigError, match="did you mean 'jpeg_compressibility'"):
        serve("jpeg_compressability", {}, port=0)


def test_it_imports_no_torch_and_no_orchestration():
    heavy = {"torch", "prefect", "mlflow"}
    code = f"import sys, ddpo.rewards.service.serving; print({heavy} & {{*sys.modules}})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


# The token.


@pytest.mark.parametrize(
    "header", [None, f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Bearer", "Bearer é", TOKEN]
)
def test_without_the_right_token_there_are_no_scores_and_no_identity(header, caplog):
    caplog.set_level(logging.DEBUG)
    headers = {} if header is None else {"Authorization": header.encode()}
    with serving(create_app(Sum, token=TOKEN)) as url:
        wait_for(url)  # open to all, as is /health
        assert CLIENT.get(f"{url}/health").status_code == 200
        for answer in (
            CLIENT.get(f"{url}/identity", headers=headers),
            post(url, [GOOD], prompts_of(1), headers=headers),
        ):
            assert answer.status_code == 401
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert TOKEN not in answer.text
        right = {"Authorization": f"Bearer {TOKEN}"}
        assert post(url, [GOOD], prompts_of(1), headers=right).json()["values"] == expected(1)
        assert TOKEN not in CLIENT.get(f"{url}/openapi.json").text
    assert TOKEN not in caplog.text


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "example.org"])
def test_nothing_but_loopback_is_served_without_a_token(host, monkeypatch):
    monkeypatch.delenv("DDPO_REWARD_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="no token; set the environment variable DDPO_REWARD_TO"):
        serve("jpeg_compressibility", {}, host=host, port=0)
    monkeypatch.setenv("DDPO_REWARD_TOKEN", " ")
    with pytest.raises(ConfigError, match="no token"):
        serve("jpeg_compressibility", {}, host=host, port=0)


def test_token_that_no_header_carries_is_refused_unquoted(monkeypatch):
    monkeypatch.setenv("DDPO_REWARD_TOKEN", f"{TOKEN} {TOKEN}")
    with pytest.raises(ConfigError, match="not hold a bearer token") as caught:
        serve("jpeg_compressibility", {}, port=0)
    assert TOKEN not in str(caught.value)


def test_port_that_is_taken_is_said(up):
    with pytest.raises(ConfigError, match=r"cannot listen on port \d+ of 127.0.0.1: .*in use"):
        serve("jpeg_compressibility", {}, port=urlsplit(up).port or 0)


# Many at once.


def test_64_requests_at_once_are_all_answered_rightly_and_scored_one_at_a_time(reward):
    with serving(create_app(lambda: reward)) as url, ThreadPoolExecutor(64) as pool:
        wait_for(url)
        reward.go.clear()
        answers = [pool.submit(score, url, 1 + n % 5, f"cat {n}", seed=n) for n in range(64)]
        time.sleep(0.3)
        reward.go.set()
        for n, answer in enumerate(answers):
            assert answer.result().json()["values"] == expected(1 + n % 5, f"cat {n}", seed=n)
    assert (reward.calls, reward.most_at_once) == (64, 1)


def test_workers_score_at_the_same_time(reward):
    limits = Limits(workers=3)
    with serving(create_app(lambda: reward, limits=limits)) as url, ThreadPoolExecutor(8) as pool:
        wait_for(url)
        reward.go.clear()
        answers = [pool.submit(score, url) for _ in range(8)]
        while reward.at_once < 3:
            time.sleep(0.01)
        reward.go.set()
        assert all(answer.result().json()["values"] == expected(2) for answer in answers)
    assert reward.most_at_once == 3


def test_full_queue_is_said_at_once_and_frees_itself(reward):
    limits = Limits(queue=2)
    with serving(create_app(lambda: reward, limits=limits)) as url, ThreadPoolExecutor(8) as pool:
        wait_for(url)
        reward.go.clear()
        pending = [pool.submit(score, url) for _ in range(8)]
        while sum(answer.done() for answer in pending) < 5:
            time.sleep(0.01)
        refused = [answer.result() for answer in pending if answer.done()]
        assert {(r.status_code, r.headers["Retry-After"]) for r in refused} == {(503, "1")}
        reward.go.set()
        statuses = sorted(answer.result().status_code for answer in pending)
        assert statuses == [200] * 3 + [503] * 5
        assert score(url).json()["values"] == expected(2)


def test_requests_that_wait_hold_a_bounded_memory(reward):
    limits = Limits(held_bytes=3000)
    with serving(create_app(lambda: reward, limits=limits)) as url, ThreadPoolExecutor(1) as pool:
        wait_for(url)
        reward.go.clear()
        first = pool.submit(score, url)
        while not reward.at_once:
            time.sleep(0.01)
        assert "filled the memory" in score(url).text
        reward.go.set()
        assert first.result().json()["values"] == expected(2)
        assert score(url).json()["values"] == expected(2)


def test_request_whose_client_has_gone_is_not_scored(reward):
    with serving(create_app(lambda: reward)) as url, ThreadPoolExecutor(1) as pool:
        wait_for(url)
        reward.go.clear()
        first = pool.submit(score, url)
        while not reward.at_once:
            time.sleep(0.01)
        with pytest.raises(httpx.ReadTimeout):
            CLIENT.post(f"{url}/score", files=form([GOOD], prompts_of(1)), timeout=0.3)
        time.sleep(0.2)
        reward.go.set()
        assert first.result().status_code == 200
        assert score(url).status_code == 200
    assert reward.calls == 2
