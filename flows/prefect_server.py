"""Prefect's server while a run is in progress: it may be unavailable for a while."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import httpx
from prefect.client.orchestration import get_client

from ddpo.basics.outages import Outage
from ddpo.basics.redaction import hide_credentials

_BEAT_S = 1.5
_TIMEOUT_S = 3.0

_logger = logging.getLogger(__name__)

T = TypeVar("T")


@contextmanager
def watched_server() -> Iterator[None]:
    """Say within this context when Prefect's server stops and resumes answering."""
    address = str(get_client(sync_client=True).api_url).rstrip("/")
    left = threading.Event()
    thread = threading.Thread(target=_watch, args=[address, left], name="prefect", daemon=True)
    thread.start()
    try:
        yield
    finally:
        left.set()


def show(create: Callable[[], T]) -> T | None:
    """Create an artifact; if Prefect's server is unavailable, the run continues without it."""
    try:
        return create()
    except httpx.HTTPError as error:
        _logger.info("an artifact was not created in Prefect: %s", hide_credentials(str(error)))
        return None


def _watch(address: str, left: threading.Event) -> None:
    outage = Outage(f"Prefect's server at {hide_credentials(address)}")
    # One client, for its certificates take long to read; a connection may not outlive the server.
    limits = httpx.Limits(max_keepalive_connections=0)
    with httpx.Client(timeout=_TIMEOUT_S, limits=limits) as client:
        while not left.wait(_BEAT_S):
            try:
                client.get(f"{address}/health")
            except httpx.HTTPError as error:
                plan = "running tasks continue; what follows them waits for it for up to 8 minutes"
                outage.goes_on(type(error).__name__, plan)
            else:
                outage.ends()
