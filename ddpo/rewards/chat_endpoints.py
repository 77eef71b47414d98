"""Endpoints of a served model: asked in turn, with patience, and without telling its key."""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import httpx

from ddpo.errors import ConfigError, RewardError, RewardUnavailable
from ddpo.rewards.wire import read_token
from ddpo.secrets import HIDDEN, hide_credentials

ERROR_STATUS = 400
"""From here on a status says that something went wrong."""

_ANSWER_LIMIT_BYTES = 4 * 1024**2
_AWAY_STATUS = frozenset({408, 425, 429, 502, 503, 504})
"""Answers of an endpoint that is busy, loading or behind a proxy that does not reach it."""
_NOT_THERE = 501  # what an endpoint does not have will not be there later
_BROKEN_TRIES = 3
"""How often something is asked that endpoints answer with an error of their own (500)."""
_FIRST_WAIT_S = 0.25
_LONGEST_WAIT_S = 15.0
_AVOIDED_S = 30.0
"""An endpoint that was away is asked last for so long."""
_SAID_LIMIT = 300

_logger = logging.getLogger(__name__)
_jitter = random.Random()  # its own: the module's generator belongs to whoever seeded it

Found = TypeVar("Found")


@dataclass(frozen=True)
class Patience:
    """How long an answer is waited for.

    Attributes:
        connect_timeout_s: Seconds to reach an endpoint.
        timeout_s: Seconds in which it must answer a request, its queue included.
        retries: How often all endpoints are asked again.
        give_up_after_s: Seconds after which a request is given up.
    """

    connect_timeout_s: float
    timeout_s: float
    retries: int
    give_up_after_s: float


class Away(Exception):
    """An endpoint did not answer, or asked to come again later."""

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class NoAnswer(Exception):
    """An endpoint is there, and gave no answer to what it was asked."""


class Broken(NoAnswer):
    """It answered with an error of its own, which may not come again."""


@dataclass(frozen=True)
class Reply:
    """What an endpoint answered.

    Attributes:
        status: The HTTP status.
        data: The body.
    """

    status: int
    data: bytes

    @property
    def said(self) -> str:
        """Status and what the body says of an error, shortened."""
        return f"{self.status} {_detail(self.data)}"[:_SAID_LIMIT].strip()


class Endpoints:
    """Asks several endpoints in turn, the next one at once where one is away.

    Where all are away, they are asked again after a growing, jittered wait, or what `Retry-After`
    says. May be used by several threads at once.

    Args:
        addresses: Base addresses, such as ``http://127.0.0.1:8000/v1``.
        addresses_variable: Environment variable that goes before `addresses` where it is set.
        key_variable: Environment variable that holds the API key, if one is wanted.
        connections: Requests that may be under way side by side.
        patience: How long an answer is waited for.

    Raises:
        ConfigError: No endpoint, or one that is no plain http address; no usable key.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        addresses_variable: str,
        key_variable: str,
        connections: int,
        patience: Patience,
    ) -> None:
        self.addresses = _read_addresses(addresses, addresses_variable)
        self._addresses_variable = addresses_variable
        self._key_variable = key_variable
        self._key = read_token(key_variable)
        self._patience = patience
        self._turns = itertools.count()  # one step of it cannot be torn apart by threads
        self._away_until: dict[str, float] = {}
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._client = httpx.Client(
            headers=headers,
            follow_redirects=False,
            limits=httpx.Limits(max_connections=connections),
        )

    @property
    def key_state(self) -> str:
        """What may be wrong with the key, in words that do not tell it."""
        has = "another one than the service's" if self._key else "empty or not set"
        return f"The API key in the environment variable {self._key_variable} is {has}"

    def in_turn(
        self, ask: Callable[[str, float], Found], *, each_s: float, within_s: float
    ) -> Found:
        """Ask the endpoints in turn until one answers.

        Args:
            ask: Asks an endpoint, within seconds; raises `Away` or `NoAnswer`.
            each_s: Seconds for one endpoint.
            within_s: Seconds for all of it.

        Returns:
            What ``ask`` returned.

        Raises:
            RewardUnavailable: No endpoint can be reached.
            NoAnswer: One was reached, and has no answer.
        """
        deadline = time.monotonic() + within_s
        reasons: dict[str, str] = {}
        broken: list[Broken] = []
        for attempt in itertools.count():
            waits: list[float] = []
            for endpoint in self._order():
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    break
                try:
                    return ask(endpoint, min(each_s, left_s))
                except Away as error:
                    reasons[endpoint] = str(error)
                    waits.append(error.retry_after_s)
                    self.note_away(endpoint)
                except Broken as error:
                    reasons[endpoint] = str(error)
                    waits.append(0.0)
                    broken.append(error)
                    if len(broken) == _BROKEN_TRIES:
                        raise
            longest = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** min(attempt, 10))
            wait_s = max(min(waits, default=0.0), longest * _jitter.uniform(0.5, 1.0))
            if attempt == self._patience.retries or time.monotonic() + wait_s >= deadline:
                break
            _logger.warning("served model: trying again in %.1f s: %s", wait_s, _together(reasons))
            time.sleep(wait_s)
        if broken:
            raise broken[-1]
        raise RewardUnavailable(
            f"no endpoint of the served model answered ({_together(reasons)}). Start it, or say "
            "where it is: `endpoints` of the reward's parameters, or the environment variable "
            f"{self._addresses_variable}"
        )

    def request(self, endpoint: str, path: str, body: bytes | None, seconds: float) -> Reply:
        """Ask one endpoint once: POST with a body of JSON, GET without.

        Raises:
            Away: It does not answer, or asks to come again later.
            NoAnswer: It answers with an error of its own, or without end.
        """
        deadline = time.monotonic() + seconds
        connect_s = min(self._patience.connect_timeout_s, seconds)
        timeout = httpx.Timeout(seconds, connect=connect_s, pool=None)
        method = "GET" if body is None else "POST"
        headers = None if body is None else {"Content-Type": "application/json"}
        data = bytearray()
        try:
            with self._client.stream(
                method, endpoint + path, content=body, headers=headers, timeout=timeout
            ) as response:
                for piece in response.iter_raw():
                    data += piece
                    if len(data) > _ANSWER_LIMIT_BYTES:
                        raise NoAnswer(f"{endpoint} answered more than {_ANSWER_LIMIT_BYTES} bytes")
                    if time.monotonic() > deadline:  # a timeout of httpx's is one for each piece
                        raise Away(f"its answer was not whole after {seconds:.0f} s")
        except httpx.TransportError as error:
            raise Away(self.clean(f"{type(error).__name__} {error}".strip())) from error
        reply = Reply(response.status_code, bytes(data))
        if reply.status in _AWAY_STATUS:
            after_s = _retry_after_s(response.headers.get("Retry-After", ""))
            raise Away(self.clean(reply.said), after_s)
        if reply.status >= httpx.codes.INTERNAL_SERVER_ERROR and reply.status != _NOT_THERE:
            raise Broken(self.clean(f"{endpoint} answered {reply.said}"))
        return reply

    def note_away(self, endpoint: str) -> None:
        """Have an endpoint asked last for a while."""
        self._away_until[endpoint] = time.monotonic() + _AVOIDED_S

    def error(self, text: str) -> RewardError:
        """Return an error whose text does not tell the key."""
        return RewardError(self.clean(text))

    def clean(self, text: str) -> str:
        """Take the key out of a text: a service may repeat whatever it was sent."""
        return hide_credentials(text.replace(self._key, HIDDEN) if self._key else text)

    def _order(self) -> list[str]:
        """Return all endpoints, another one first each time; those lately away come last."""
        first = next(self._turns) % len(self.addresses)
        order = (*self.addresses[first:], *self.addresses[:first])
        now = time.monotonic()
        return sorted(order, key=lambda endpoint: self._away_until.get(endpoint, 0.0) > now)


def _read_addresses(given: Sequence[str], variable: str) -> tuple[str, ...]:
    told = [part.strip() for part in os.environ.get(variable, "").split(",") if part.strip()]
    addresses = tuple(address.rstrip("/") for address in told or given)
    where = f"the environment variable {variable}" if told else "`endpoints`"
    if not addresses:
        raise ConfigError(
            "the served model has no endpoint; set `endpoints` under the reward's `parameters`, "
            f"such as [http://127.0.0.1:8000/v1], or the environment variable {variable}"
        )
    for number, address in enumerate(addresses):
        try:
            url = httpx.URL(address)
            plain = url.scheme in ("http", "https") and url.host
            plain = plain and not (url.userinfo or url.query or url.fragment)
        except httpx.InvalidURL:
            plain = False
        if not plain:  # not quoted: a password may stand in it
            raise ConfigError(
                f"endpoint {number} of {where} is no plain address; expected http://host:port/v1 "
                "or https://host/path, without user, password, query or fragment"
            )
    if len(set(addresses)) != len(addresses):
        raise ConfigError(f"{where} names an endpoint twice: {', '.join(addresses)}")
    return addresses


def _together(reasons: dict[str, str]) -> str:
    return "; ".join(f"{endpoint}: {reason}" for endpoint, reason in reasons.items())


def _detail(data: bytes) -> str:
    """Return what an answer says of an error: OpenAI's, vLLM's or FastAPI's way."""
    text = data.decode("utf-8", "replace")
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(told, dict):
        return text
    error = told.get("error")
    if isinstance(error, dict):
        told = error
    return str(told.get("message") or told.get("detail") or error or text)


def _retry_after_s(header: str) -> float:
    """Return the seconds that a service asks to wait, as far as they are waited for."""
    return min(float(header), _LONGEST_WAIT_S) if re.fullmatch(r"\d{1,9}", header) else 0.0
