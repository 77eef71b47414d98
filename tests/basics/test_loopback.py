"""Servers on this machine are reached without a proxy, whichever client asks."""

from __future__ import annotations

import os
import urllib.request

import pytest
import requests
from httpx._utils import get_environment_proxies

from ddpo.basics.loopback import never_proxy_loopback

LOOPBACK = ("127.0.0.1", "localhost")


@pytest.fixture(autouse=True)
def without_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        for spelled in (name, name.upper()):
            # Set first, so that what is set here is undone after the test.
            monkeypatch.setenv(spelled, "")
            monkeypatch.delenv(spelled)


@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
@pytest.mark.parametrize("exempt", ["", "intern.example", "127.0.0.1, intern.example"])
def test_loopback_is_exempt_and_other_hosts_are_as_before(
    variable: str, exempt: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "http://proxy.example:3128")
    if exempt:
        monkeypatch.setenv("NO_PROXY", exempt)
    for _ in range(2):  # once more changes nothing
        never_proxy_loopback()
        for host in LOOPBACK:
            assert urllib.request.proxy_bypass(f"{host}:8000")
            assert not requests.utils.get_environ_proxies(f"http://{host}:8000/api")
        assert get_environment_proxies()["all://127.0.0.1"] is None
        assert not urllib.request.proxy_bypass("other.example")
        assert bool(urllib.request.proxy_bypass("intern.example")) == ("intern" in exempt)
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"]


def test_nothing_changes_without_a_proxy_or_where_all_hosts_are_exempt(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    never_proxy_loopback()
    assert "NO_PROXY" not in os.environ and "no_proxy" not in os.environ
    monkeypatch.setenv("HTTP_PROXY", "http://proxy.example:3128")
    monkeypatch.setenv("NO_PROXY", "*")
    never_proxy_loopback()
    assert os.environ["NO_PROXY"] == "*" and "no_proxy" not in os.environ
