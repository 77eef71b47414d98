"""The endpoints of a service: asked in turn, with patience, and without telling its token."""

from __future__ import annotations

import itertools
import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from ddpo.basics.redaction import HIDDEN, hide_credentials
from ddpo.errors import ConfigError, RewardError, RewardUnavailable
from ddpo.rewards.service.wire import read_token

Files = Sequence[tuple[str, tuple[str | None, bytes, str]]]
"""The parts of a multipart body: a name; file name, bytes and media type."""

_ANSWER_LIMIT_BYTES = 64 * 1024**2
_AWAY_STATUS = frozenset({408, 425, 429, 502, 503, 504})
"""Answers of a service that is busy, loading or behind a proxy that does not reach it."""
_BROKEN_TRIES = 3
"""How often something is asked that endpoints answer with an error of their own."""
_FIRST_WAIT_S = 0.25
_LONGEST_WAIT_S = 15.0
_AVOIDED_S = 30.0
"""An endpoint that was away is asked last for so long."""
_SAID_LIMIT = 500

_logger = logging.getLogger(__name__)
_jitter = random.Random()  # its own: the module's generator belongs to whoever seeded it

Found = TypeVar("Found")


@dataclass(frozen=True)
class Service:
    """What is asked, in the words of messages, and the variables of the environment that count.

    Attributes:
        what: What it is, such as ``the reward service``.
        start: How a user starts it, as a message begins to say it.
        example: An address as one would write it.
        variable: Holds addresses that go before the config's, where it is set.
        token_variable: Holds the bearer token, if one is wanted.
        token_parameter: Name of the parameter that names `token_variable`.
    """

    what: str
    start: str
    example: str
    variable: str
    token_variable: str
    token_parameter: str


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
        said: Status and what the body says of an error, shortened and without the token.
    """

    status: int
    data: bytes
    said: str


class Endpoints:
    """Where a service answers; those that are away are asked again later.

    Another endpoint is asked first each time, the next one at once where one is away. Where all
    are, they are asked again after a growing, jittered wait, or what ``Retry-After`` says. What a
    reply is worth, the caller says. May be used by several threads at once.

    Args:
        given: Base addresses, as the config has them.
        service: What is asked.
        patience: How long an answer is waited for.

    Raises:
        ConfigError: No endpoint, or one that is no plain http address; no bearer token.
    """

    def __init__(self, given: Sequence[str], service: Service, patience: Patience) -> None:
        self.addresses = _addresses(given, service)
        self._service = service
        self._patience = patience
        self._token = read_token(service.token_variable, service.token_parameter)
        self._turns = itertools.count()  # one step of it cannot be torn apart by threads
        self._away_until: dict[str, float] = {}
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        # Whoever asks says how much is under way at once; nothing waits for a connection.
        limits = httpx.Limits(max_connections=None)
        self._client = httpx.Client(headers=headers, follow_redirects=False, limits=limits)

    @property
    def token_state(self) -> str:
        """What may be wrong with the token, in words that do not tell it."""
        has = "another one than the service's" if self._token else "empty or not set"
        return f"the environment variable {self._service.token_variable} is {has}"

    def in_turn(
        self, ask: Callable[[str, float], Found], *, each_s: float, within_s: float
    ) -> tuple[str, Found]:
        """Ask the endpoints in turn until one answers.

        Args:
            ask: Asks an endpoint, within seconds; raises `Away`, `NoAnswer` or what it likes.
            each_s: Seconds in which an endpoint must answer.
            within_s: Seconds after which all are given up.

        Returns:
            The endpoint that answered, and what ``ask`` returned.

        Raises:
            RewardUnavailable: All are away, as often or as long as they are asked.
            NoAnswer: One was reached, and has no answer; if it is `Broken`, after a few tries.
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
                    return endpoint, ask(endpoint, min(each_s, left_s))
                except Away as error:
                    reasons[endpoint] = str(error)
                    waits.append(error.retry_after_s)
                    self._note_away(endpoint)
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
            what, said = self._service.what, _together(reasons)
            _logger.warning("%s is away, trying again in %.1f s: %s", what, wait_s, said)
            time.sleep(wait_s)
        if broken:
            raise broken[-1]
        raise RewardUnavailable(
            f"no endpoint of {self._service.what} answered ({_together(reasons)}). "
            f"{self._service.start}, or say where it is: `endpoints` of the reward's parameters, "
            f"or the environment variable {self._service.variable}"
        )

    def others(
        self, first: str, ask: Callable[[str, float], Found], *, each_s: float
    ) -> Iterator[tuple[str, Found]]:
        """Ask all endpoints but one, once; those that do not answer are passed over.

        Yields:
            An endpoint, and what ``ask`` (as of `in_turn`, within ``each_s`` seconds) returned.
        """
        for endpoint in self.addresses:
            if endpoint == first:
                continue
            try:
                found = ask(endpoint, each_s)
            except (Away, NoAnswer) as error:
                self._note_away(endpoint)
                _logger.warning("%s of %s is away: %s", endpoint, self._service.what, error)
                continue
            yield endpoint, found

    def request(
        self, endpoint: str, path: str, seconds: float, body: bytes | Files | None = None
    ) -> Reply:
        """Ask one endpoint once.

        Args:
            endpoint: Its address.
            path: What is asked, below the address.
            seconds: In which the whole answer must be there.
            body: Of a POST: JSON, or the parts of a form; None for a GET.

        Raises:
            Away: It does not answer, or asks to come again later.
            NoAnswer: It answers without end.
        """
        deadline = time.monotonic() + seconds
        connect_s = min(self._patience.connect_timeout_s, seconds)
        sent: dict[str, Any] = {"timeout": httpx.Timeout(seconds, connect=connect_s)}
        if isinstance(body, bytes):
            sent |= {"content": body, "headers": {"Content-Type": "application/json"}}
        elif body is not None:
            sent["files"] = body
        method = "GET" if body is None else "POST"
        data = bytearray()
        try:
            with self._client.stream(method, endpoint + path, **sent) as response:
                for piece in response.iter_raw():
                    data += piece
                    if len(data) > _ANSWER_LIMIT_BYTES:
                        raise NoAnswer(f"{endpoint} answered more than {_ANSWER_LIMIT_BYTES} bytes")
                    if time.monotonic() > deadline:  # a timeout of httpx's is one for each piece
                        raise Away(f"its answer was not whole after {seconds:.0f} s")
        except httpx.TransportError as error:
            raise Away(self.clean(f"{type(error).__name__} {error}".strip())) from error
        # Cleaned before it is cut: half a token would not be found.
        status = response.status_code
        detail = "" if status == httpx.codes.OK else _detail(bytes(data))
        said = self.clean(f"{status} {detail}")[:_SAID_LIMIT].strip()
        if status in _AWAY_STATUS:
            raise Away(said, _retry_after_s(response.headers.get("Retry-After", "")))
        return Reply(status, bytes(data), said)

    def error(self, text: str) -> RewardError:
        """Return an error that says what an endpoint said, without the token."""
        return RewardError(self.clean(text))

    def clean(self, text: str) -> str:
        """Take the token out of a text: a service may repeat whatever it was sent."""
        return hide_credentials(text.replace(self._token, HIDDEN) if self._token else text)

    def _order(self) -> list[str]:
        """Return all endpoints, another one first each time; those lately away come last."""
        first = next(self._turns) % len(self.addresses)
        order = (*self.addresses[first:], *self.addresses[:first])
        now = time.monotonic()
        return sorted(order, key=lambda endpoint: self._away_until.get(endpoint, 0.0) > now)

    def _note_away(self, endpoint: str) -> None:
        self._away_until[endpoint] = time.monotonic() + _AVOIDED_S


def _addresses(given: Sequence[str], service: Service) -> tuple[str, ...]:
    variable = service.variable
    told = [part.strip() for part in os.environ.get(variable, "").split(",") if part.strip()]
    addresses = tuple(address.rstrip("/") for address in told or given)
    where = f"the environment variable {variable}" if told else "`endpoints`"
    if not addresses:
        raise ConfigError(
            f"{service.what} has no endpoint; set `endpoints` under the reward's `parameters`, "
            f"such as [{service.example}], or the environment variable {variable}"
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
                f"endpoint {number} of {where} is no plain address; expected http://host:port or "
                "https://host:port/path, without user, password, query or fragment"
            )
    if len(set(addresses)) != len(addresses):
        raise ConfigError(f"{where} names an endpoint twice: {', '.join(addresses)}")
    return addresses


def _together(reasons: dict[str, str]) -> str:
    return "; ".join(f"{endpoint}: {reason}" for endpoint, reason in reasons.items())


def _detail(data: bytes) -> str:
    """Return what an answer says of an error: FastAPI's, OpenAI's or vLLM's way."""
    text = data.decode("utf-8", "replace")
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(told, dict):
        return text
    error = told.get("error")
    told = error if isinstance(error, dict) else told
    return str(told.get("message") or told.get("detail") or error or text)


def _retry_after_s(header: str) -> float:
    """Return the seconds that a service asks to wait, as far as they are waited for."""
    return min(float(header), _LONGEST_WAIT_S) if re.fullmatch(r"\d{1,9}", header) else 0.0
