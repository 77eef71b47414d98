"""What is said of a service that is unavailable, and how it is waited for."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable

import pytest

from ddpo.basics import outages
from ddpo.basics.outages import Outage, patiently
from ddpo.rewards.service.endpoints import Endpoints, Patience, Service, Unavailable


class Away(Exception):
    """The service is unavailable."""


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list]:
    monkeypatch.setattr(outages, "SILENT_S", 0.0)
    monkeypatch.setattr(outages, "_FIRST_WAITS_S", (0.001,) * 100)
    return lambda: [record.getMessage() for record in caplog.records]


def failing(times: int) -> Callable[[], str]:
    left = [Away("no answer")] * times

    def call() -> str:
        if left:
            raise left.pop()
        return "answer"

    return call


def test_an_outage_is_mentioned_once_and_so_is_its_end(said: Callable[[], list]) -> None:
    outage = Outage("the store")
    for _ in range(2):
        assert patiently(failing(5), Away, outage, 60.0) == "answer"
    first = r"the store is unavailable \(no answer\); waiting for it until \d\d:\d\d:\d\d"
    assert len(said()) == 4
    for begins, ends in (said()[:2], said()[2:]):
        assert re.fullmatch(first, begins) and ends == "the store answers again"


def test_a_short_outage_is_not_mentioned(
    said: Callable[[], list], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outages, "SILENT_S", 60.0)
    assert patiently(failing(5), Away, Outage("the store"), 60.0) == "answer"
    assert said() == []


def test_without_patience_there_is_one_call_and_no_word(said: Callable[[], list]) -> None:
    with pytest.raises(Away):
        patiently(failing(1), Away, Outage("the store"), 0.0)
    assert said() == []


def test_patience_ends_and_other_errors_are_not_waited_for(said: Callable[[], list]) -> None:
    with pytest.raises(Away):
        patiently(failing(1000), Away, Outage("the store"), 0.01)
    with pytest.raises(ZeroDivisionError):
        patiently(lambda: 1 / 0, Away, Outage("the store"), 60.0)


def test_a_call_that_takes_long_is_mentioned_while_it_takes(said: Callable[[], list]) -> None:
    mentioned = threading.Event()

    class Watched(Outage):
        def goes_on(self, *words, **named) -> None:
            super().goes_on(*words, **named)
            mentioned.set()

    outage = Watched("the store")
    assert patiently(lambda: mentioned.wait(60), Away, outage, 60.0, slow_after_s=0.01)
    assert ["no answer for 0.01 s" in line for line in said()] == [True, False]


def test_a_reward_service_that_is_away_is_mentioned_with_the_time(said: Callable[[], list]) -> None:
    service = Service("the reward service", "Start it", "http://host:1", "NOT_SET", "DDPO_TOKEN_X")
    endpoints = Endpoints(("http://127.0.0.1:9",), service, Patience(1, 1, 9, 60))
    answers = iter([False, False, True])

    def ask(endpoint: str, seconds: float) -> str:
        if not next(answers):
            raise Unavailable("refused")
        return "scores"

    assert endpoints.first_answer(ask)[1] == "scores"
    begins, ends = said()
    assert begins.startswith("the reward service is unavailable (http://127.0.0.1:9: refused); ")
    assert "waiting for it until" in begins and ends == "the reward service answers again"
