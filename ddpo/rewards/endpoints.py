"""The endpoints of a reward service, asked until one answers."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import time
from collections.abc import Iterator, Sequence

import httpx

from ddpo.errors import ConfigError, RewardError, RewardUnavailable
from ddpo.rewards.wire import read_token
from ddpo.secrets import HIDDEN, hide_credentials

Files = Sequence[tuple[str, tuple[str | None, bytes, str]]]
"""The parts of a multipart body: a name; file name, bytes and media type."""

_ANSWER_LIMIT_BYTES = 64 * 1024**2
_AWAY_STATUS = frozenset({408, 429, 502, 503, 504})
"""Answers of a service that is busy, loading or behind a proxy that does not reach it."""
_FIRST_WAIT_S = 0.25
_LONGEST_WAIT_S = 15.0
_AVOIDED_S = 30.0
"""An endpoint that was away is asked last for so long."""
_SAID_LIMIT = 500

_logger = logging.getLogger(__name__)
_jitter = random.Random()  # its own: the module's generator belongs to whoever seeded it


class _Away(Exception):
    """An endpoint did not answer, or asked to come again later."""

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class Endpoints:
    """Where a service answers; those that are away are asked again later.

    Another endpoint is asked first each time, the next one at once where one is away. Where all
    are, they are asked again after a growing, jittered wait.

    Args:
        given: Base addresses, as the config has them.
        variable: Environment variable that goes before them where it is set.
        token_variable: Environment variable that holds the bearer token, if the service wants one.
        connect_timeout_s: Seconds to reach an endpoint.
        retries: How often all are asked again.

    Raises:
        ConfigError: No endpoint, or one that is no plain http address; no bearer token.
    """

    def __init__(
        self,
        given: Sequence[str],
        *,
        variable: str,
        token_variable: str,
        connect_timeout_s: float,
        retries: int,
    ) -> None:
        self.addresses = _addresses(given, variable)
        self._variable = variable
        self._token_variable = token_variable
        self._token = read_token(token_variable)
        self._connect_timeout_s = connect_timeout_s
        self._retries = retries
        self._turn = 0
        self._away_until: dict[str, float] = {}
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        self._client = httpx.Client(headers=headers, follow_redirects=False)

    def ask(
        self, path: str, files: Files | None = None, *, each_s: float, within_s: float
    ) -> tuple[str, bytes]:
        """Ask the endpoints in turn until one answers.

        Args:
            path: Below an endpoint's address.
            files: The body of a POST; None for a GET.
            each_s: Seconds in which an endpoint must answer.
            within_s: Seconds after which all are given up.

        Returns:
            The endpoint that answered, and the body of its answer.

        Raises:
            RewardUnavailable: All are away, as often or as long as they are asked.
            RewardError: One refused, or its answer is beyond all bounds.
        """
        deadline = time.monotonic() + within_s
        reasons: dict[str, str] = {}
        for attempt in range(self._retries + 1):
            waits = []
            for endpoint in self._in_turn():
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    break
                try:
                    return endpoint, self._request(endpoint, path, files, min(each_s, left_s))
                except _Away as error:
                    reasons[endpoint] = str(error)
                    waits.append(error.retry_after_s)
                    self._note_away(endpoint)
            longest = min(_LONGEST_WAIT_S, _FIRST_WAIT_S * 2 ** min(attempt, 10))
            wait_s = max(min(waits, default=0.0), longest * _jitter.uniform(0.5, 1.0))
            if attempt == self._retries or time.monotonic() + wait_s >= deadline:
                break
            said = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
            _logger.warning("the reward service is away, trying again in %.1f s: %s", wait_s, said)
            time.sleep(wait_s)
        said = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
        raise RewardUnavailable(
            f"no endpoint of the reward service answered ({said}). Start it with `ddpo "
            "serve-reward`, or say where it is: `endpoints` of the reward's parameters, or the "
            f"environment variable {self._variable}"
        )

    def ask_others(self, first: str, path: str, *, each_s: float) -> Iterator[tuple[str, bytes]]:
        """Ask all endpoints but one, once; those that are away are passed over.

        Args:
            first: The one that is not asked.
            path: Below an endpoint's address.
            each_s: Seconds in which an endpoint must answer.

        Yields:
            An endpoint, and the body of its answer.

        Raises:
            RewardError: As `ask`.
        """
        for endpoint in self.addresses:
            if endpoint == first:
                continue
            try:
                data = self._request(endpoint, path, None, each_s)
            except _Away as error:
                self._note_away(endpoint)
                _logger.warning("%s of the reward service is away: %s", endpoint, error)
                continue
            yield endpoint, data

    def _in_turn(self) -> Iterator[str]:
        """Return all endpoints, another one first each time; those lately away come last."""
        first = self._turn % len(self.addresses)
        self._turn += 1
        order = (*self.addresses[first:], *self.addresses[:first])
        now = time.monotonic()
        return iter(sorted(order, key=lambda endpoint: self._away_until.get(endpoint, 0.0) > now))

    def _note_away(self, endpoint: str) -> None:
        self._away_until[endpoint] = time.monotonic() + _AVOIDED_S

    def _request(self, endpoint: str, path: str, files: Files | None, seconds: float) -> bytes:
        """Ask one endpoint once; return the body of its answer."""
        deadline = time.monotonic() + seconds
        timeout = httpx.Timeout(seconds, connect=min(self._connect_timeout_s, seconds))
        method = "GET" if files is None else "POST"
        try:
            with self._client.stream(
                method, endpoint + path, files=files, timeout=timeout
            ) as response:
                data = bytearray()
                for piece in response.iter_raw():
                    data += piece
                    if len(data) > _ANSWER_LIMIT_BYTES:
                        raise self.error(
                            f"{endpoint} answered more than {_ANSWER_LIMIT_BYTES} bytes, which no "
                            "scores take"
                        )
                    if time.monotonic() > deadline:  # a timeout of httpx's is one for each piece
                        raise _Away(f"its answer was not whole after {seconds:.0f} s")
        except httpx.TransportError as error:
            raise _Away(self._clean(f"{type(error).__name__} {error}".strip())) from error
        if response.status_code == httpx.codes.OK:
            return bytes(data)
        said = self._clean(f"{response.status_code} {_detail(bytes(data))}")[:_SAID_LIMIT].strip()
        if response.status_code in _AWAY_STATUS:
            raise _Away(said, _retry_after_s(response.headers.get("Retry-After", "")))
        if response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            has = "another one than the service's" if self._token else "empty or not set"
            raise self.error(
                f"{endpoint} refused the token ({said}): the environment variable "
                f"{self._token_variable} is {has}"
            )
        if response.status_code == httpx.codes.REQUEST_ENTITY_TOO_LARGE:
            said += "; a smaller `max_batch` sends less at once"
        raise self.error(f"{endpoint} answered {said}")

    def error(self, text: str) -> RewardError:
        """Return an error that says what an endpoint said, without the token."""
        return RewardError(self._clean(text))

    def _clean(self, text: str) -> str:
        """Take the token out of a text: a service may repeat whatever it was sent."""
        return hide_credentials(text.replace(self._token, HIDDEN) if self._token else text)


def _addresses(given: Sequence[str], variable: str) -> tuple[str, ...]:
    told = [part.strip() for part in os.environ.get(variable, "").split(",") if part.strip()]
    endpoints = tuple(endpoint.rstrip("/") for endpoint in told or given)
    where = f"the environment variable {variable}" if told else "`endpoints`"
    if not endpoints:
        raise ConfigError(
            "the reward 'http' has no endpoint; set `endpoints` under its `parameters`, such as "
            f"[http://127.0.0.1:8100], or the environment variable {variable}"
        )
    for number, endpoint in enumerate(endpoints):
        try:
            url = httpx.URL(endpoint)
            plain = url.scheme in ("http", "https") and url.host
            plain = plain and not (url.userinfo or url.query or url.fragment)
        except httpx.InvalidURL:
            plain = False
        if not plain:  # not quoted: a password may stand in it
            raise ConfigError(
                f"endpoint {number} of {where} is no plain address; expected http://host:port or "
                "https://host:port/path, without user, password, query or fragment"
            )
    if len(set(endpoints)) != len(endpoints):
        raise ConfigError(f"{where} names an endpoint twice: {', '.join(endpoints)}")
    return endpoints


def _detail(data: bytes) -> str:
    """Return what an answer says of an error."""
    try:
        return str(json.loads(data)["detail"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return data.decode("utf-8", "replace")


def _retry_after_s(header: str) -> float:
    """Return the seconds that a service asks to wait, as far as they are waited for."""
    return min(float(header), _LONGEST_WAIT_S) if re.fullmatch(r"\d{1,9}", header) else 0.0
