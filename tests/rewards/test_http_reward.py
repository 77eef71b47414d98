"""The reward `http`: the scores of here from elsewhere, from services that die too."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from ddpo.errors import ConfigError, RewardError
from ddpo.rewards import load_reward, score_images
from ddpo.rewards.service import endpoints as endpoints_module
from ddpo.rewards.service.app import create_app
from ddpo.rewards.service.limits import Limits
from tests.rewards.fake_service import IDENTITY, IMAGES, PROMPTS, Fake, answer, load, same, scored
from tests.rewards.served import Sum, serving, wait_for
from tests.servers import free_port

pytestmark = pytest.mark.usefixtures("quick_and_unset")


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
        monkeypatch.setenv("DDPO_MINE", one)
        assert load_reward("http", {"endpoints_variable": "DDPO_MINE"}).identity == Sum.identity


@pytest.mark.parametrize(
    ("endpoints", "message"),
    [
        ((), "no endpoint; set `endpoints`.*DDPO_REWARD_ENDPOINTS"),
        (("http://me:hunter2@host",), "endpoint 0 of `endpoints` is not a plain address"),
        (("http://a", "ftp://b"), "endpoint 1 of `endpoints` is not a plain"),
        (("127.0.0.1:80",), "endpoint 0 of `endpoints` is not a plain"),
        (("http://a?key=hunter2",), "endpoint 0 of `endpoints` is not a plain"),
        (("http://a", "http://a/"), "twice"),
    ],
)
def test_endpoints_that_are_none_are_refused_unquoted(endpoints, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load(*endpoints)
    assert "hunter2" not in str(caught.value)


def test_it_needs_neither_torch_nor_a_web_server():
    code = (
        "import sys, ddpo.rewards.builtin.http; "
        "print({'torch', 'prefect', 'mlflow', 'fastapi', 'starlette', 'uvicorn'} & {*sys.modules})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


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
    command = [
        sys.executable,
        "-m",
        "ddpo_workflow.flows.cli",
        "serve-reward",
        "slow_reward_fixture:slow",
    ]
    with (folder / "log").open("ab") as log:
        return subprocess.Popen(
            [*command, "--param", "scale=3", "--port", str(port)],
            env={**os.environ, "PYTHONPATH": str(folder)},
            stdout=log,
            stderr=log,
        )


@pytest.mark.slow
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
        scoring.join(600)
        local = load_reward("slow_reward_fixture:slow", {"scale": 3.0})
        same(found[0], scored(local))
        assert reward.identity == local.identity
        second.terminate()
        assert second.wait(300) == -15
    finally:
        for process in (first, second):
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
    log = (tmp_path / "log").read_text()
    assert f"on {url}" in log and "ready: slow_reward_fixture-slow-" in log
    assert "Traceback" not in log


def test_next_endpoint_is_asked_where_one_is_away(clock):
    dead = f"http://127.0.0.1:{free_port()}"
    served = [Sum(), Sum()]
    with ExitStack() as stack:
        up = [stack.enter_context(serving(create_app(lambda s=s: s))) for s in served]
        for url in up:
            wait_for(url)
        reward = load(dead, *up, max_batch=1)
        same(scored(reward), score_images(Sum(), IMAGES, PROMPTS))
    assert not clock.waits
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
        reward.score._client._avoided_until.clear()  # as it is half a minute later
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


def test_service_that_is_away_is_said_in_bounded_time(clock):
    dead = [f"http://127.0.0.1:{free_port()}" for _ in range(2)]
    with pytest.raises(
        RewardError, match=r"no endpoint .*ConnectError.*ConnectError.*serve-reward"
    ):
        load(*dead, start_within_s=0.5)
    assert clock.waits and clock.monotonic() < 0.5


def test_tries_are_bounded_in_number(fake):
    planted, url = fake
    reward = load(url, retries=4)
    planted.status, planted.body = 503, b'{"detail": "7 requests are waiting"}'
    with pytest.raises(RewardError, match="503 7 requests are waiting"):
        scored(reward, 2)
    assert planted.asked.count("/score") == 5


def test_tries_are_bounded_in_time(fake, clock):
    planted, url = fake
    reward = load(url, retries=10**6, give_up_after_s=60.0)
    planted.status = 502
    with pytest.raises(RewardError, match="502"):
        scored(reward, 2)
    assert planted.asked.count("/score") == len(clock.waits) + 1 > 2
    # Another wait, of 15 s at most, would have been too long.
    assert 60.0 - 15.0 <= clock.monotonic() < 60.0


def test_waits_grow_are_jittered_and_bounded(monkeypatch, fake, clock):
    planted, url = fake
    reward = load(url, retries=14, give_up_after_s=1e6)
    planted.status = 503
    monkeypatch.setattr(endpoints_module, "_FIRST_WAIT_S", 0.25)
    with pytest.raises(RewardError):
        scored(reward, 2)
    steps = [min(15.0, 0.25 * 2**n) for n in range(14)]
    assert all(step / 2 <= wait <= step for wait, step in zip(clock.waits, steps, strict=True))
    assert len({wait / step for wait, step in zip(clock.waits, steps, strict=True)}) > 5


def test_service_that_asks_to_wait_is_obeyed(fake, clock):
    planted, url = fake
    reward = load(url, retries=1)
    planted.status, planted.headers = 503, {"Retry-After": "1"}
    with pytest.raises(RewardError, match="503"):
        scored(reward, 2)
    assert clock.waits == [1.0]


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
            thread.join(300)
    assert len(found) == 4
    for each in found:
        same(each, score_images(Sum(), IMAGES, PROMPTS))
