"""Round-robin client for a service's endpoints, with failover and backoff; hides its token."""

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

from ddpo.basics.loopback import never_proxy_loopback
from ddpo.basics.outages import Outage, clock
from ddpo.basics.redaction import HIDDEN, hide_credentials
from ddpo.errors import ConfigError, RewardError, RewardUnavailable
from ddpo.rewards.service.wire import read_token

Files = Sequence[tuple[str, tuple[str | None, bytes, str]]]
"""The parts of a multipart body, as httpx takes them: field; file name, bytes, media type."""

_ANSWER_LIMIT_BYTES = 64 * 1024**2
_UNAVAILABLE_STATUS = frozenset({408, 425, 429, 502, 503, 504})
"""Statuses of a service that is busy, still loading, or behind a proxy that cannot reach it."""
_SERVER_ERROR_TRIES = 3
"""How often a request is made that the endpoints answer with a server error."""
_FIRST_WAIT_S = 0.25
_LONGEST_WAIT_S = 15.0
_AVOIDED_S = 30.0
"""For how long an endpoint that was unavailable is tried last."""
_DETAIL_LIMIT = 500  # characters of an error response in a message

_logger = logging.getLogger(__name__)
_jitter = random.Random()  # not the module's generator, which belongs to whoever seeded it

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Service:
    """What a service is called in messages, and which environment variables configure it."""

    what: str
    """What it is, such as ``the reward service``."""
    start: str
    """How a user starts it: the beginning of a sentence."""
    example: str
    """An example of an address."""
    variable: str
    """Environment variable with addresses that override those of the config."""
    token_variable: str
    """Environment variable with the bearer token, if one is required."""


@dataclass(frozen=True)
class Patience:
    """How long to wait for a service."""

    connect_timeout_s: float
    """Seconds to connect to an endpoint."""
    timeout_s: float
    """Seconds in which an endpoint must respond, including time in its queue."""
    retries: int
    """How often all endpoints are tried again."""
    give_up_after_s: float
    """Seconds after which a request fails."""


class Unavailable(Exception):
    """An endpoint did not respond, or asked to be tried again later."""

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class NoAnswer(Exception):
    """An endpoint responded, but not with an answer to the request."""


class ServerError(NoAnswer):
    """An endpoint responded with a server error, which may be transient."""


@dataclass(frozen=True)
class Reply:
    """An endpoint's response."""

    status: int
    """The HTTP status."""
    data: bytes
    """The body."""
    summary: str
    """The status and the error detail in the body, shortened and without the token."""


class Endpoints:
    """The endpoints of a service, tried in turn.

    Each request starts with another endpoint and fails over to the next immediately. If all are
    unavailable, they are tried again after a growing, jittered wait, or after the time given by
    ``Retry-After``. The caller decides what counts as an answer. Safe to use from several threads.

    Args:
        given: Base addresses, from the config.
        service: What the service is.
        patience: How long to wait for it.

    Raises:
        ConfigError: There is no endpoint, an address is not plain http, or the token is malformed.
    """

    def __init__(self, given: Sequence[str], service: Service, patience: Patience) -> None:
        self.addresses = _addresses(given, service)
        self.patience = patience
        self._service = service
        self._token = read_token(service.token_variable)
        self._outage = Outage(service.what)
        self._turns = itertools.count()  # next() is atomic
        self._avoided_until: dict[str, float] = {}
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        # Callers bound their own concurrency; no request waits for a connection.
        limits = httpx.Limits(max_connections=None)
        never_proxy_loopback()
        self._client = httpx.Client(headers=headers, follow_redirects=False, limits=limits)

    @property
    def connection(self) -> tuple[str, ...]:
        """The addresses, and the token if there is one."""
        return (*self.addresses, self._token or "")

    @property
    def token_state(self) -> str:
        """What may be wrong with the token, without revealing it."""
        state = "does not match the service's" if self._token else "is empty or not set"
        return f"the environment variable {self._service.token_variable} {state}"

    def first_answer(
        self,
        ask: Callable[[str, float], Answer],
        *,
        each_s: float | None = None,
        within_s: float | None = None,
    ) -> tuple[str, Answer]:
        """Try the endpoints in turn until one answers.

        Args:
            ask: Asks an endpoint, given its address and a time limit in seconds. Raises
                `Unavailable` or `NoAnswer`; anything else it raises is passed on.
            each_s: Seconds in which one endpoint must answer; by default the patience's.
            within_s: Seconds after which to stop trying; by default the patience's.

        Returns:
            The endpoint that answered, and what ``ask`` returned.

        Raises:
            RewardUnavailable: All endpoints stayed unavailable.
            NoAnswer: An endpoint was reached but gave no answer; a `ServerError` after a few tries.
        """
        each_s = self.patience.timeout_s if each_s is None else each_s
        within_s = self.patience.give_up_after_s if within_s is None else within_s
        deadline, plan = time.monotonic() + within_s, f"waiting for it until {clock(within_s)}"
        reasons: dict[str, str] = {}
        server_errors: list[ServerError] = []
        for attempt in itertools.count():
            waits: list[float] = []
            for endpoint in self._order():
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    break
                try:
                    answer = ask(endpoint, min(each_s, left_s))
                except Unavailable as error:
                    reasons[endpoint] = str(error)
                    waits.append(error.retry_after_s)
                    self._avoid(endpoint)
                except ServerError as error:
                    reasons[endpoint] = str(error)
                    waits.append(0.0)
                    server_errors.append(error)
                    if len(server_errors) == _SERVER_ERROR_TRIES:
                        raise
                else:
                    self._outage.ends()
                    return endpoint, answer
            longest = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** min(attempt, 10))
            wait_s = max(min(waits, default=0.0), longest * _jitter.uniform(0.5, 1.0))
            if attempt == self.patience.retries or time.monotonic() + wait_s >= deadline:
                break
            self._outage.goes_on(_together(reasons), plan)
            time.sleep(wait_s)
        if server_errors:
            raise server_errors[-1]
        raise RewardUnavailable(
            f"no endpoint of {self._service.what} answered ({_together(reasons)}). "
            f"{self._service.start}, or say where it runs: `endpoints` in the reward's parameters, "
            f"or the environment variable {self._service.variable}"
        )

    def other_answers(
        self, first: str, ask: Callable[[str, float], Answer], *, each_s: float
    ) -> Iterator[tuple[str, Answer]]:
        """Ask every endpoint but one, once; skip those that give no answer.

        Yields:
            An endpoint, and what ``ask`` (as in `first_answer`) returned within ``each_s`` seconds.
        """
        for endpoint in self.addresses:
            if endpoint == first:
                continue
            try:
                answer = ask(endpoint, each_s)
            except (Unavailable, NoAnswer) as error:
                self._avoid(endpoint)
                _logger.warning("%s of %s is unavailable: %s", endpoint, self._service.what, error)
                continue
            yield endpoint, answer

    def request(
        self, endpoint: str, path: str, seconds: float, body: bytes | Files | None = None
    ) -> Reply:
        """Make one request to one endpoint.

        Args:
            endpoint: Its address.
            path: Path below the address.
            seconds: Time limit for the whole response.
            body: Body of a POST: JSON, or the parts of a form; None for a GET.

        Raises:
            Unavailable: It does not respond, or asks to be tried again later.
            NoAnswer: The response exceeds the size limit.
        """
        deadline = time.monotonic() + seconds
        connect_s = min(self.patience.connect_timeout_s, seconds)
        arguments: dict[str, Any] = {"timeout": httpx.Timeout(seconds, connect=connect_s)}
        if isinstance(body, bytes):
            arguments |= {"content": body, "headers": {"Content-Type": "application/json"}}
        elif body is not None:
            arguments["files"] = body
        method = "GET" if body is None else "POST"
        data = bytearray()
        try:
            with self._client.stream(method, endpoint + path, **arguments) as response:
                for piece in response.iter_raw():
                    data += piece
                    if len(data) > _ANSWER_LIMIT_BYTES:
                        raise NoAnswer(f"{endpoint} sent more than {_ANSWER_LIMIT_BYTES} bytes")
                    if time.monotonic() > deadline:  # httpx's timeout is per read
                        raise Unavailable(f"its response was incomplete after {seconds:.0f} s")
        except httpx.TransportError as error:
            raise Unavailable(self.clean(f"{type(error).__name__} {error}".strip())) from error
        # Clean before cutting: half a token would not be recognised.
        status = response.status_code
        detail = "" if status == httpx.codes.OK else _detail(bytes(data))
        summary = self.clean(f"{status} {detail}")[:_DETAIL_LIMIT].strip()
        if status in _UNAVAILABLE_STATUS:
            raise Unavailable(summary, _retry_after_s(response.headers.get("Retry-After", "")))
        return Reply(status, bytes(data), summary)

    def error(self, text: str) -> RewardError:
        """Return an error that may quote an endpoint, with the token removed."""
        return RewardError(self.clean(text))

    def clean(self, text: str) -> str:
        """Remove the token from a text: a service may echo whatever it was sent."""
        return hide_credentials(text.replace(self._token, HIDDEN) if self._token else text)

    def _order(self) -> list[str]:
        """Return all endpoints, rotated by one each time; recently unavailable ones come last."""
        first = next(self._turns) % len(self.addresses)
        order = (*self.addresses[first:], *self.addresses[:first])
        now = time.monotonic()
        return sorted(order, key=lambda endpoint: self._avoided_until.get(endpoint, 0.0) > now)

    def _avoid(self, endpoint: str) -> None:
        self._avoided_until[endpoint] = time.monotonic() + _AVOIDED_S


def _addresses(given: Sequence[str], service: Service) -> tuple[str, ...]:
    variable = service.variable
    override = [part.strip() for part in os.environ.get(variable, "").split(",") if part.strip()]
    addresses = tuple(address.rstrip("/") for address in override or given)
    where = f"the environment variable {variable}" if override else "`endpoints`"
    if not addresses:
        raise ConfigError(
            f"{service.what} has no endpoint; set `endpoints` in the reward's `parameters`, such "
            f"as [{service.example}], or the environment variable {variable}"
        )
    for number, address in enumerate(addresses):
        try:
            url = httpx.URL(address)
            plain = url.scheme in ("http", "https") and url.host
            plain = plain and not (url.userinfo or url.query or url.fragment)
        except httpx.InvalidURL:
            plain = False
        if not plain:  # not quoted: it may contain a password
            raise ConfigError(
                f"endpoint {number} of {where} is not a plain address; expected http://host:port "
                "or https://host:port/path, without user, password, query or fragment"
            )
    if len(set(addresses)) != len(addresses):
        raise ConfigError(f"{where} names an endpoint twice: {', '.join(addresses)}")
    return addresses


def _together(reasons: dict[str, str]) -> str:
    return "; ".join(f"{endpoint}: {reason}" for endpoint, reason in reasons.items())


def _detail(data: bytes) -> str:
    """Return the error detail of a response, in the form of FastAPI, OpenAI or vLLM."""
    text = data.decode("utf-8", "replace")
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return text
    if not isinstance(body, dict):
        return text
    error = body.get("error")
    body = error if isinstance(error, dict) else body
    return str(body.get("message") or body.get("detail") or error or text)


def _retry_after_s(header: str) -> float:
    """Return the seconds that a service asks to wait, up to the longest wait."""
    return min(float(header), _LONGEST_WAIT_S) if re.fullmatch(r"\d{1,9}", header) else 0.0
