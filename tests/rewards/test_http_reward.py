"""The reward `http` against real services, services that die, and services that answer nonsense."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from starlette.types import Receive, Scope, Send

from ddpo.errors import ConfigError, RewardError
from ddpo.prompts import Prompt
from ddpo.rewards import RewardIdentity, load_reward, score_images
from ddpo.rewards import endpoints as endpoints_module
from ddpo.rewards.service import Limits, create_app
from tests.rewards.test_service import TOKEN, Sum, pictures, serving, wait_for
from tests.servers import free_port

IMAGES = pictures(10)
PROMPTS = [Prompt("fail" if i == 4 else f"cat {i}", {"é": [i, 1 / 3]}) for i in range(10)]
IDENTITY = {"name": "sum", "parameters": {}, "revisions": {}, "version": "1"}


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    monkeypatch.delenv("DDPO_REWARD_TOKEN", raising=False)
    monkeypatch.delenv("DDPO_REWARD_ENDPOINTS", raising=False)
    monkeypatch.setattr(endpoints_module, "_FIRST_WAIT_S", 0.01)


def load(*endpoints: str, **parameters):
    return load_reward("http", {"endpoints": list(endpoints), **parameters})


def scored(reward, count=10):
    return score_images(reward, IMAGES[:count], PROMPTS[:count])


def same(found, local) -> None:
    np.testing.assert_array_equal(found.values, local.values)
    np.testing.assert_array_equal(found.failed, local.failed)
    assert found.columns.keys() == local.columns.keys()
    for name, column in local.columns.items():
        np.testing.assert_array_equal(np.array(found.columns[name]), np.array(column))


class Fake:
    """A service that answers what a test plants: by path a status, headers and a body."""

    def __init__(self, **score) -> None:
        good = {"values": [0.5, 2], "failed": [False, False], "columns": {}, "identity": IDENTITY}
        self.identity: dict = dict(IDENTITY)
        self.status = 200
        self.headers: dict[str, str] = {}
        self.body = json.dumps(good | score).encode()
        self.send_body: Callable | None = None
        self.asked: list[str] = []
        self.times: list[float] = []
        self.authorization: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        while (await receive()).get("more_body"):
            pass
        self.asked.append(scope["path"])
        self.times.append(time.monotonic())
        self.authorization.add(dict(scope["headers"]).get(b"authorization", b"").decode())
        asks_identity = scope["path"] == "/identity"
        status, headers = (200, {}) if asks_identity else (self.status, self.headers)
        body = json.dumps(self.identity).encode() if asks_identity else self.body
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        if self.send_body and not asks_identity:
            await self.send_body(send)
        await send({"type": "http.response.body", "body": body})


@pytest.fixture
def fake() -> Iterator[tuple[Fake, str]]:
    planted = Fake()
    with serving(planted) as url:
        yield planted, url


# The same as here.


@pytest.mark.parametrize("max_batch", [3, 10])
def test_scores_through_http_are_the_local_ones_and_so_is_the_identity(max_batch):
    served = Sum()
    with serving(create_app(lambda: served)) as url:
        reward = load(url, max_batch=max_batch)
        assert reward.identity == Sum.identity
        assert reward.identity.reward_id == Sum.identity.reward_id
        same(scored(reward), score_images(Sum(), IMAGES, PROMPTS))
    assert served.calls == {3: 4, 10: 1}[max_batch]


def test_registered_rewards_score_alike_here_and_there():
    for name in ("jpeg_compressibility", "jpeg_incompressibility"):
        local = load_reward(name, {})
        with serving(create_app(lambda local=local: local)) as url:
            reward = load(url)
            assert reward.identity.digest == local.identity.digest
            same(scored(reward), scored(local))


def test_no_pictures_are_no_scores(fake):
    planted, url = fake
    assert len(load(url)([], [])) == 0
    assert planted.asked == ["/identity"]


def test_picture_that_png_would_change_is_refused(fake):
    reward = load(fake[1])
    with pytest.raises(RewardError, match=r"image 1 has the mode CMYK.*convert it to RGB"):
        score_images(reward, [IMAGES[0], IMAGES[1].convert("CMYK")], PROMPTS[:2])


def test_address_is_no_part_of_the_identity_and_comes_from_the_environment(monkeypatch):
    with serving(create_app(Sum)) as one, serving(create_app(Sum)) as other:
        assert load(one).identity == load(other + "/", max_batch=1, timeout_s=9).identity
        gone = f"http://127.0.0.1:{free_port()}"
        monkeypatch.setenv("DDPO_REWARD_ENDPOINTS", f"{other}, {one}")
        assert load(gone).identity == Sum.identity
        monkeypatch.setenv("MINE", one)
        assert load_reward("http", {"endpoints_variable": "MINE"}).identity == Sum.identity


@pytest.mark.parametrize(
    ("endpoints", "message"),
    [
        ((), "no endpoint; set `endpoints`.*DDPO_REWARD_ENDPOINTS"),
        (("http://me:hunter2@host",), "endpoint 0 of `endpoints` is no plain address"),
        (("http://a", "ftp://b"), "endpoint 1 of `endpoints` is no plain"),
        (("127.0.0.1:80",), "endpoint 0 of `endpoints` is no plain"),
        (("http://a?key=hunter2",), "endpoint 0 of `endpoints` is no plain"),
        (("http://a", "http://a/"), "twice"),
    ],
)
def test_endpoints_that_are_none_are_refused_unquoted(endpoints, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(*endpoints)
    assert "hunter2" not in str(caught.value)


# Services that are away.


OWN = """
import time
import numpy as np
def slow(images, prompts, scale: float = 1.0):
    time.sleep(0.05 * len(images))
    return [scale * np.asarray(image).astype(np.float64).sum() / 7 for image in images]
"""


def start(folder: Path, port: int) -> subprocess.Popen[bytes]:
    """Start the command that a user types."""
    (folder / "slow_reward_fixture.py").write_text(OWN)
    command = [sys.executable, "-m", "flows.cli", "serve-reward", "slow_reward_fixture:slow"]
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [*command, "--param", "scale=3", "--port", str(port)],
            env={**os.environ, "PYTHONPATH": str(folder)},
            stdout=log,
            stderr=log,
        )


def test_service_killed_and_started_again_costs_a_delay_only(tmp_path, monkeypatch):
    monkeypatch.setattr(endpoints_module, "_LONGEST_WAIT_S", 0.5)
    monkeypatch.syspath_prepend(tmp_path)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    first = start(tmp_path, port)
    second = None
    try:
        wait_for(url)
        reward = load(url, max_batch=1, give_up_after_s=120, retries=10_000)
        found = []
        scoring = threading.Thread(target=lambda: found.append(scored(reward)))
        scoring.start()
        time.sleep(0.2)
        first.kill()  # in the midst of a batch
        first.wait()
        time.sleep(0.3)
        assert scoring.is_alive() and not found
        second = start(tmp_path, port)
        scoring.join(120)
        local = load_reward("slow_reward_fixture:slow", {"scale": 3.0})
        same(found[0], scored(local))
        assert reward.identity == local.identity
        second.terminate()
        assert second.wait(30) == -15
    finally:
        for process in (first, second):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
    log = (tmp_path / "log").read_text()
    assert f"on {url}" in log and "ready: slow_reward_fixture-slow-" in log
    assert "Traceback" not in log


def test_next_endpoint_is_asked_where_one_is_away():
    dead = f"http://127.0.0.1:{free_port()}"
    served = [Sum(), Sum()]
    with ExitStack() as stack:
        up = [stack.enter_context(serving(create_app(lambda s=s: s))) for s in served]
        for url in up:
            wait_for(url)
        began = time.monotonic()
        reward = load(dead, *up, max_batch=1)
        same(scored(reward), score_images(Sum(), IMAGES, PROMPTS))
        assert time.monotonic() - began < 10
    assert served[0].calls + served[1].calls == 10
    assert min(served[0].calls, served[1].calls) >= 3  # in turn


def test_endpoint_that_was_away_is_asked_last_for_a_while(fake):
    planted, url = fake
    planted.status, planted.identity = 503, {**IDENTITY}
    good = Fake(values=[1.0], failed=[False])
    with serving(good) as other:
        reward = load(url, other, max_batch=1)
        assert scored(reward, 6).values.tolist() == [1.0] * 6
        assert (planted.asked.count("/score"), good.asked.count("/score")) == (1, 6)
        reward.score._endpoints._away_until.clear()  # as it is half a minute later
        planted.status, planted.body = 200, answer(values=[2.0], failed=[False])
        assert sorted(scored(reward, 4).values.tolist()) == [1.0, 1.0, 2.0, 2.0]


def test_endpoint_that_dies_between_batches_is_passed_over():
    served = Sum()
    with serving(create_app(lambda: served)) as stays:
        with serving(create_app(Sum)) as dies:
            wait_for(stays)
            wait_for(dies)
            reward = load(dies, stays, max_batch=2)
        same(scored(reward), score_images(Sum(), IMAGES, PROMPTS))
    assert served.calls == 5


def test_service_that_is_away_is_said_in_bounded_time():
    dead = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    began = time.monotonic()
    with pytest.raises(
        RewardError, match=r"no endpoint .*ConnectError.*ConnectError.*serve-reward"
    ):
        load(*dead, start_within_s=0.5)
    assert time.monotonic() - began < 5


def test_tries_are_bounded_in_number(fake):
    planted, url = fake
    reward = load(url, retries=4)
    planted.status, planted.body = 503, b'{"detail": "7 requests are waiting"}'
    with pytest.raises(RewardError, match="503 7 requests are waiting"):
        scored(reward, 2)
    assert planted.asked.count("/score") == 5


def test_tries_are_bounded_in_time(fake):
    planted, url = fake
    reward = load(url, retries=10**6, give_up_after_s=0.6)
    planted.status = 502
    began = time.monotonic()
    with pytest.raises(RewardError, match="502"):
        scored(reward, 2)
    assert time.monotonic() - began < 5
    assert 2 <= planted.asked.count("/score") < 50


def test_waits_grow_are_jittered_and_bounded(monkeypatch, fake):
    planted, url = fake
    reward = load(url, retries=14, give_up_after_s=1e6)
    planted.status = 503
    waits: list[float] = []
    monkeypatch.setattr(endpoints_module.time, "sleep", waits.append)
    monkeypatch.setattr(endpoints_module, "_FIRST_WAIT_S", 0.25)
    with pytest.raises(RewardError):
        scored(reward, 2)
    steps = [min(15.0, 0.25 * 2**n) for n in range(14)]
    assert all(step / 2 <= wait <= step for wait, step in zip(waits, steps, strict=True))
    assert len({wait / step for wait, step in zip(waits, steps, strict=True)}) > 5


def test_service_that_asks_to_wait_is_obeyed(fake):
    planted, url = fake
    reward = load(url, retries=1)
    planted.status, planted.headers = 503, {"Retry-After": "1"}
    with pytest.raises(RewardError, match="503"):
        scored(reward, 2)
    assert planted.times[-1] - planted.times[-2] >= 1


def test_full_queue_is_waited_out():
    served = Sum()
    with serving(create_app(lambda: served, limits=Limits(queue=0))) as url:
        wait_for(url)
        reward = load(url, max_batch=2)
        found: list = []
        threads = [threading.Thread(target=lambda: found.append(scored(reward))) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(found) == 4
    for each in found:
        same(each, score_images(Sum(), IMAGES, PROMPTS))


# Services that answer nonsense.


def answer(**changed) -> bytes:
    good = {"values": [0.5, 2], "failed": [False, False], "columns": {}, "identity": IDENTITY}
    return json.dumps(good | changed).encode()


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (answer(values=[1.0]), "1 scores for 2 images"),
        (answer(values=[1.0, 2.0, 3.0], failed=[False] * 3), "3 scores for 2 images"),
        (answer(values=[[1.0], [2.0]]), "values.0: Input should be a valid number"),
        (answer(values=1.0), "values: Input should be a valid array"),
        (answer(values=["1", 2.0]), "values.0: Input should be a valid number"),
        (answer(values=[True, 2.0]), "values.0: Input should be a valid number"),
        (answer(values=[float("nan"), 2.0]), "values.0: Input should be a finite number"),
        (answer(values=[1.0, float("-inf")]), "values.1: Input should be a finite number"),
        (answer(values=[1.0, 1e300]), "sample 1 of 2 has the reward inf"),
        (answer(values=[1.0, None]), "sample 1 of 2 has the reward nan"),
        (answer(failed=[False]), r"failed must be bool \[2\]"),
        (answer(failed=[0, 1]), "failed.0: Input should be a valid boolean"),
        (answer(columns={"caption": ["a"]}), "'caption' needs 2 values"),
        (answer(columns={"caption": "ab"}), "columns.caption: Input should be a valid array"),
        (answer(columns={"reward": [1, 2]}), "'reward'.*rename"),
        (answer(identity=IDENTITY | {"version": 1}), "identity.version: Input should be a valid"),
        (answer(identity=None), "identity: Input should be"),
        (b'{"values": [1, 2]}', "failed: Field required"),
        (b"<html>", "the body: Invalid JSON"),
        (b"", "the body: Invalid JSON"),
        (b"\xff\xfe", "the body: Invalid JSON"),
        (b"[" * 10_000, "the body: Invalid JSON"),
    ],
)
def test_answer_of_a_wrong_shape_is_refused_at_once_by_name(fake, body, message):
    planted, url = fake
    reward = load(url)
    assert scored(reward, 2).values.tolist() == [0.5, 2]
    planted.body = body
    with pytest.raises(RewardError, match=rf"reward sum-\w{{8}}: {url} .*{message}"):
        scored(reward, 2)
    assert planted.asked.count("/score") == 2


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (
            500,
            b'{"detail": "reward x raised ValueError: no"}',
            "answered 500 reward x raised Value",
        ),
        (413, b'{"detail": "more than 4 images"}', "413 more than 4.*smaller `max_batch`"),
        (422, b'{"detail": "image 3"}', "422 image 3"),
        (404, b"nothing here", "404 nothing here"),
        (307, b"", "307"),
        (500, b"x" * 10_000, r"500 x{496}$"),
    ],
)
def test_what_a_service_refuses_is_said_and_not_tried_again(fake, status, body, message):
    planted, url = fake
    reward = load(url)
    planted.status, planted.body, planted.headers = status, body, {"Location": "/elsewhere"}
    with pytest.raises(RewardError, match=message):
        scored(reward, 2)
    assert planted.asked == ["/identity", "/score"]


def test_reward_that_raises_there_is_an_error_here(caplog):
    # What is logged is no Unicode, and pytest's processes tell each other what was logged.
    caplog.set_level(logging.CRITICAL, "ddpo.rewards.service")
    with serving(create_app(Sum)) as url:
        reward = load(url)
        with pytest.raises(RewardError, match=r"500 reward sum-.* raised ValueError: no such"):
            score_images(reward, IMAGES[:1], [Prompt("raise")])
        same(scored(reward), score_images(Sum(), IMAGES, PROMPTS))


def test_columns_that_change_between_batches_are_refused(fake):
    planted, url = fake
    reward = load(url, max_batch=2)
    bodies = iter([answer(columns={"a": [1, 2]}), answer(columns={"b": [1, 2]})])

    async def another(send: Send) -> None:
        planted.body = next(bodies)
        await send({"type": "http.response.body", "body": planted.body, "more_body": True})
        planted.body = b""

    planted.send_body = another
    planted.body = b""
    with pytest.raises(RewardError, match=r"columns \['a'\] for one batch and \['b'\]"):
        scored(reward, 4)


def test_answer_that_never_ends_is_given_up(fake, monkeypatch):
    planted, url = fake
    reward = load(url, timeout_s=0.3, retries=0)

    async def drip(send: Send) -> None:
        for _ in range(30):
            await send({"type": "http.response.body", "body": b" ", "more_body": True})
            await asyncio.sleep(0.05)

    planted.send_body = drip
    began = time.monotonic()
    with pytest.raises(RewardError, match="not whole after"):
        scored(reward, 2)
    assert time.monotonic() - began < 1.4

    async def flood(send: Send) -> None:
        for _ in range(100):
            await send({"type": "http.response.body", "body": bytes(1000), "more_body": True})

    planted.send_body = flood
    monkeypatch.setattr(endpoints_module, "_ANSWER_LIMIT_BYTES", 5000)
    with pytest.raises(RewardError, match="more than 5000 bytes"):
        scored(load(url), 2)


# Which reward it is.


def test_identity_that_changes_is_an_error_that_says_what_changed(fake):
    planted, url = fake
    reward = load(url)
    for changed, message in (
        ({"version": "2"}, "version is '2', not '1'"),
        ({"parameters": {"scale": 1}}, r"parameters is \{'scale': 1\}, not \{\}"),
        ({"name": "other"}, "name is 'other', not 'sum'"),
        ({"parameters": {"x": float("nan")}}, "identity that is no JSON"),
    ):
        planted.body = answer(identity=IDENTITY | changed)
        with pytest.raises(RewardError, match=message):
            scored(reward, 2)


def test_numbers_of_another_kind_are_another_identity(fake):
    planted, url = fake
    planted.identity["parameters"] = {"scale": 1}
    reward = load(url)
    planted.body = answer(identity=IDENTITY | {"parameters": {"scale": 1.0}})
    with pytest.raises(RewardError, match=r"is \{'scale': 1.0\}, not \{'scale': 1\}"):
        scored(reward, 2)


def test_endpoints_of_two_rewards_are_refused_when_it_is_built(fake):
    _, url = fake
    with serving(create_app(Sum)) as other:
        wait_for(other)
        with pytest.raises(RewardError, match=r"another identity than sum-.*version is"):
            load(url, other)


def test_expected_digest_is_held_to(fake):
    _, url = fake
    digest = RewardIdentity("sum").digest
    for given in (digest, digest[:8]):
        assert load(url, expected_digest=given).identity.digest == digest
    with pytest.raises(RewardError, match=f"of digest {digest}, and expected_digest is 01234567"):
        load(url, expected_digest="01234567")
    with pytest.raises(ConfigError, match="expected_digest"):
        load(url, expected_digest="0123")


@pytest.mark.parametrize("told", [{"name": "x"}, {"name": 3, "version": "1"}, [], "x"])
def test_what_tells_no_identity_is_no_service(fake, told):
    planted, url = fake
    planted.identity = told
    with pytest.raises(RewardError, match=rf"{url} did not answer with its identity"):
        load(url)


# The token.


def test_token_goes_to_the_service_and_nowhere_else(fake, monkeypatch, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    planted, url = fake
    monkeypatch.setenv("DDPO_REWARD_TOKEN", f"{TOKEN}\n")
    reward = load(url, retries=1)
    assert scored(reward, 2).values.tolist() == [0.5, 2]
    assert planted.authorization == {f"Bearer {TOKEN}"}
    echo = f"you sent Bearer {TOKEN}"
    said = []
    for status, body in (
        (500, json.dumps({"detail": echo}).encode()),
        (500, (b"x" * 485) + TOKEN.encode()),  # cut off in its midst
        (503, echo.encode()),
        (401, echo.encode()),
        (200, json.dumps({TOKEN: 1}).encode()),
        (200, answer(columns={TOKEN: [1]})),
        (200, answer(identity=IDENTITY | {"name": TOKEN})),
    ):
        planted.status, planted.body = status, body
        with pytest.raises(RewardError) as caught:
            scored(reward, 2)
        said += [str(caught.value), repr(caught.value.__dict__), repr(caught.value.__cause__)]
    planted.identity = {"name": TOKEN, "version": {TOKEN: 1}}
    with pytest.raises(RewardError) as caught:
        load(url)
    everything = " ".join(
        [*said, str(caught.value), caplog.text, *capfd.readouterr(), repr(reward)]
    )
    assert TOKEN not in everything and TOKEN[:10] not in everything
    assert "you sent Bearer ***" in everything


def test_wrong_or_missing_token_names_the_variable(monkeypatch):
    with serving(create_app(Sum, token=TOKEN)) as url:
        wait_for(url)
        with pytest.raises(RewardError, match="variable DDPO_REWARD_TOKEN is empty or not set"):
            load(url)
        monkeypatch.setenv("MINE", "not-that-one")
        with pytest.raises(RewardError, match=r"the token is wrong.*variable MINE is another one"):
            load(url, token_variable="MINE")
        monkeypatch.setenv("MINE", TOKEN)
        same(
            scored(load(url, token_variable="MINE"), 3),
            score_images(Sum(), IMAGES[:3], PROMPTS[:3]),
        )


@pytest.mark.parametrize("name", [TOKEN, "hunter2", "a b", ""])
def test_token_in_the_place_of_its_variable_is_not_quoted(name):
    with pytest.raises(ConfigError, match="token_variable is no name") as caught:
        load("http://127.0.0.1:1", token_variable=name)
    assert not name or name not in str(caught.value)


def test_redirect_does_not_take_the_token_along(monkeypatch):
    thief = Fake()
    monkeypatch.setenv("DDPO_REWARD_TOKEN", TOKEN)
    with serving(thief) as there, serving(planted := Fake()) as url:
        planted.status, planted.headers = 307, {"Location": f"{there}/score"}
        with pytest.raises(RewardError, match="answered 307"):
            scored(load(url), 2)
    assert thief.asked == []


def test_it_needs_no_torch():
    code = "import sys, ddpo.rewards.http; print({'torch', 'prefect', 'mlflow'} & {*sys.modules})"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"
