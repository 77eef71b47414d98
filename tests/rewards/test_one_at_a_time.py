"""A reward need not be written for threads: it is built once, and called by one at a time."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from ddpo.basics.images import encode_image
from ddpo.basics.once import once_property
from ddpo.errors import ConfigError
from ddpo.prompts import Prompt
from ddpo.rewards import load_reward, score_images
from ddpo.rewards.service import endpoints as endpoints_module
from ddpo.rewards.service.app import create_app
from ddpo.rewards.service.limits import Limits
from tests.rewards.served import post, prompts_of, serving, wait_for

THREADS = 4

OWN = """
import threading, time

built = []
together = threading.Barrier(2)
_seen = []

class Stateful:
    '''Keeps its batch in itself while it works, as many rewards do.'''

    def __init__(self, offset: int = 0):
        time.sleep(0.05)
        built.append(self)
        self.offset = offset

    def __call__(self, images, prompts):
        self.images = images
        time.sleep(0.02)
        return [image.getpixel((0, 0))[0] + self.offset for image in self.images]

def stateful(images, prompts, offset: int = 0):
    global _seen
    _seen = images
    time.sleep(0.02)
    return [image.getpixel((0, 0))[0] for image in _seen]

class Safe(Stateful):
    thread_safe = True

    def __call__(self, images, prompts):
        together.wait(300)
        return [0.0] * len(images)

class Unclear(Stateful):
    thread_safe = "yes"

class Changing(Stateful):
    @property
    def revisions(self):
        return {"model": "the same"}
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "own_threads_fixture.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("own_threads_fixture", None)
    yield "own_threads_fixture"
    sys.modules.pop("own_threads_fixture", None)


def at_once(calls: Sequence[Callable[[], object]]) -> list[object]:
    """Make calls from as many threads, all at the same moment."""
    start = threading.Barrier(len(calls))

    def call(made: Callable[[], object]) -> object:
        start.wait()
        return made()

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(call, calls))


def shard(number: int) -> list[Image.Image]:
    return [Image.new("RGB", (8, 8), (10 * number + index, 0, 0)) for index in range(3)]


def scores(reward: object, number: int) -> list[float]:
    found = score_images(reward, shard(number), [Prompt("a cat")] * 3)  # pyright: ignore
    return found.values.tolist()


def right(number: int) -> list[float]:
    return [10.0 * number + index for index in range(3)]


@pytest.mark.parametrize("name", ["Stateful", "stateful"])
def test_a_reward_that_keeps_its_batch_scores_each_sample_of_its_own(own: str, name: str) -> None:
    reward = load_reward(f"{own}:{name}", {})
    found = at_once([lambda n=n: scores(reward, n) for n in range(THREADS)])
    assert found == [right(number) for number in range(THREADS)]


def test_two_rewards_of_one_function_take_turns_too(own: str) -> None:
    rewards = [load_reward(f"{own}:stateful", {"offset": n}) for n in range(THREADS)]
    found = at_once([lambda n=n: scores(rewards[n], n) for n in range(THREADS)])
    assert found == [right(number) for number in range(THREADS)]


def test_components_of_weighted_sums_take_turns(own: str) -> None:
    sums = load_reward("weighted", {"rewards": [{"name": f"{own}:Stateful"}]})
    found = at_once([lambda n=n: scores(sums, n) for n in range(THREADS)])
    assert found == [right(number) for number in range(THREADS)]


def test_a_served_reward_is_called_by_one_worker_at_a_time(own: str) -> None:
    app = create_app(lambda: load_reward(f"{own}:Stateful", {}), limits=Limits(workers=THREADS))
    with serving(app) as url:
        wait_for(url)

        def ask(number: int) -> list[float]:
            answer = post(url, [encode_image(i) for i in shard(number)], prompts_of(3))
            return answer.json()["values"]

        found = at_once([lambda n=n: ask(n) for n in range(THREADS)])
    assert found == [right(number) for number in range(THREADS)]


def test_a_reward_that_says_so_is_called_by_several_threads(own: str) -> None:
    reward = load_reward(f"{own}:Safe", {})
    assert at_once([lambda: scores(reward, 0)] * 2) == [[0.0] * 3] * 2  # each waits for the other


def test_thread_safe_is_a_yes_or_no(own: str) -> None:
    with pytest.raises(ConfigError, match="`thread_safe` must be True or False; it is 'yes'"):
        load_reward(f"{own}:Unclear", {})


@pytest.mark.parametrize("name", ["Stateful", "Changing"])
def test_threads_that_ask_first_share_one_reward(own: str, name: str) -> None:
    first, *others = at_once([lambda: load_reward(f"{own}:{name}", {})] * THREADS)
    assert all(other is first for other in others)
    if name == "Stateful":
        assert len(sys.modules[own].built) == 1
    assert load_reward(f"{own}:{name}", {"offset": 0}) is first  # a default that is spelled out
    assert load_reward(f"{own}:{name}", {"offset": 1}) is not first


def test_a_reward_nobody_uses_is_not_kept(own: str) -> None:
    load_reward(f"{own}:Stateful", {})
    load_reward(f"{own}:Stateful", {})
    assert len(sys.modules[own].built) == 2


def test_a_served_reward_elsewhere_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endpoints_module, "_FIRST_WAIT_S", 0.01)
    monkeypatch.delenv("DDPO_REWARD_TOKEN", raising=False)
    app = create_app(lambda: load_reward("jpeg_compressibility", {}))
    with serving(app) as here, serving(app) as there:
        rewards = []
        for url in (here, here, there):
            wait_for(url)
            monkeypatch.setenv("DDPO_REWARD_ENDPOINTS", url)
            rewards.append(load_reward("http", {}))
    assert rewards[0] is rewards[1] and rewards[0] is not rewards[2]
    assert rewards[0].identity == rewards[2].identity


def test_a_once_property_is_computed_by_one_thread() -> None:
    computed = []

    class Holder:
        @once_property
        def value(self) -> object:
            computed.append(threading.get_ident())
            threading.Event().wait(0.05)
            return object()

    holder = Holder()
    first, *others = at_once([lambda: holder.value] * THREADS)
    assert len(computed) == 1 and all(other is first for other in others)
    assert isinstance(Holder.value, once_property)
