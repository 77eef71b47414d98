"""Services for the tests of both ends of a served reward."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ddpo.rewards.service import endpoints as endpoints_module
from ddpo.rewards.service.app import create_app
from tests.rewards.fake_service import Fake
from tests.rewards.served import SMALL, Sum, serving, wait_for


@pytest.fixture(scope="module")
def up() -> Iterator[str]:
    """A service of small limits, the same one for all that should not hurt it."""
    with serving(create_app(Sum, limits=SMALL)) as url:
        wait_for(url)
        yield url


@pytest.fixture
def reward() -> Sum:
    return Sum()


@pytest.fixture
def quick_and_unset(monkeypatch):
    """No token and no endpoints in the environment; a service that is away is soon asked again."""
    of_http = ("DDPO_REWARD_TOKEN", "DDPO_REWARD_ENDPOINTS")
    of_openai_vlm = ("OPENAI_API_KEY", "DDPO_VLM_ENDPOINTS")
    for name in (*of_http, *of_openai_vlm):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(endpoints_module, "_FIRST_WAIT_S", 0.01)


class Clock:
    """Time in which only waits between tries pass, so that no test depends on a machine's speed."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)

    def monotonic(self) -> float:
        return sum(self.waits)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(endpoints_module, "time", clock)
    own = endpoints_module.Endpoints.request

    def request(self, endpoint, path, seconds, body=None):
        # Real time, which what is left of the clock's must not bound.
        return own(self, endpoint, path, max(seconds, 30.0), body)

    monkeypatch.setattr(endpoints_module.Endpoints, "request", request)
    return clock


@pytest.fixture
def fake() -> Iterator[tuple[Fake, str]]:
    planted = Fake()
    with serving(planted) as url:
        yield planted, url
