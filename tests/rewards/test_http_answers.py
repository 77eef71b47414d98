"""The reward `http` against services that answer nonsense, or are another reward; its token."""

from __future__ import annotations

import asyncio
import json
import logging
import threading

import pytest
from starlette.types import Send

from ddpo.errors import ConfigError, RewardError
from ddpo.prompts import Prompt
from ddpo.rewards import RewardIdentity, score_images
from ddpo.rewards.columns import say_left_out
from ddpo.rewards.service import endpoints as endpoints_module
from ddpo.rewards.service.app import create_app
from tests.rewards.fake_service import IDENTITY, IMAGES, PROMPTS, Fake, answer, load, same, scored
from tests.rewards.served import TOKEN, Sum, serving, wait_for

pytestmark = pytest.mark.usefixtures("quick_and_unset")


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
        (answer(columns={"caption": "ab"}), "columns.caption: Input should be a valid array"),
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


def test_only_columns_of_all_batches_are_kept(fake, caplog):
    say_left_out.cache_clear()
    planted, url = fake
    reward = load(url, max_batch=2)
    columns = ({"a": [1, 2], "c": ["x", None]}, {"b": [1, 2], "c": [None, "y"]})
    bodies = iter([answer(columns=given) for given in columns])

    async def another(send: Send) -> None:
        planted.body = next(bodies)
        await send({"type": "http.response.body", "body": planted.body, "more_body": True})
        planted.body = b""

    planted.send_body = another
    planted.body = b""
    assert scored(reward, 4).columns == {"c": ["x", None, None, "y"]}
    assert [f"'{name}'" in said for name, said in zip("ab", caplog.messages, strict=True)]


def test_answer_that_never_ends_is_given_up(fake, clock, monkeypatch):
    planted, url = fake
    reward = load(url, timeout_s=30, retries=0)
    given_up = threading.Event()

    async def drip(send: Send) -> None:
        while not given_up.is_set():
            await send({"type": "http.response.body", "body": b" ", "more_body": True})
            clock.sleep(10)
            await asyncio.sleep(0.01)

    planted.send_body = drip
    try:
        with pytest.raises(RewardError, match="incomplete after 30 s"):
            scored(reward, 2)
    finally:
        given_up.set()

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
        ({"parameters": {"x": float("nan")}}, "identity that is not plain JSON"),
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
    with pytest.raises(
        RewardError, match=f"with the digest {digest}, but expected_digest is 01234567"
    ):
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
        (200, answer(identity=IDENTITY | {"name": TOKEN})),
    ):
        planted.status, planted.body = status, body
        with pytest.raises(RewardError) as caught:
            scored(reward, 2)
        said += [str(caught.value), repr(caught.value.__dict__), repr(caught.value.__cause__)]
    planted.status, planted.body = 200, answer(columns={TOKEN: [1]})  # logged: it has one value
    assert scored(reward, 2).columns == {}
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
        monkeypatch.setenv("DDPO_T", "not-that-one")
        with pytest.raises(
            RewardError, match=r"the token is wrong.*variable DDPO_T does not match"
        ):
            load(url, token_variable="DDPO_T")
        monkeypatch.setenv("DDPO_T", TOKEN)
        same(
            scored(load(url, token_variable="DDPO_T"), 3),
            score_images(Sum(), IMAGES[:3], PROMPTS[:3]),
        )


@pytest.mark.parametrize("name", [TOKEN, "hunter2", "a b", ""])
def test_token_in_the_place_of_its_variable_is_not_quoted(name):
    with pytest.raises(ConfigError, match="token_variable is not the name") as caught:
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
