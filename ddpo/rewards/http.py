"""A reward that a service computes: the client of `ddpo serve-reward`."""

from __future__ import annotations

import json
import logging
import math
import os
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import httpx
import numpy as np
from PIL import Image
from pydantic import (
    BaseModel,
    ConfigDict,
    FiniteFloat,
    JsonValue,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    ValidationError,
)

from ddpo.errors import ConfigError, RewardError, RewardUnavailable
from ddpo.prompts.base import Prompt
from ddpo.rewards.base import Scores
from ddpo.rewards.identity import RewardIdentity
from ddpo.secrets import HIDDEN, hide_credentials
from ddpo.store.images import encode_image

TOKEN_VARIABLE = "DDPO_REWARD_TOKEN"
ENDPOINTS_VARIABLE = "DDPO_REWARD_ENDPOINTS"

_ANSWER_LIMIT_BYTES = 64 * 1024**2
_AWAY_STATUS = frozenset({408, 429, 502, 503, 504})
"""Answers of a service that is busy, loading or behind a proxy that does not reach it."""
_LOSSLESS_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})
"""What PNG gives back as it was; Pillow would round or refuse the others."""
_IDENTITY_TIMEOUT_S = 5.0
_FIRST_WAIT_S = 0.25
_LONGEST_WAIT_S = 15.0
_AVOIDED_S = 30.0
"""An endpoint that was away is asked last for so long."""
_SAID_LIMIT = 500

_logger = logging.getLogger(__name__)
_jitter = random.Random()  # its own: the module's generator belongs to whoever seeded it


class IdentityMessage(BaseModel):
    """A reward's identity, as a service tells it."""

    model_config = ConfigDict(strict=True)

    name: str
    parameters: dict[str, JsonValue] = {}
    revisions: dict[str, str] = {}
    version: str
    digest: str = ""
    """The sha256 of the other four, for people; a client computes its own."""

    @classmethod
    def of(cls, identity: RewardIdentity) -> IdentityMessage:
        """Return what a service tells of an identity."""
        return cls(
            name=identity.name,
            parameters=dict(identity.parameters),
            revisions=dict(identity.revisions),
            version=identity.version,
            digest=identity.digest,
        )


class ScoresMessage(BaseModel):
    """The scores of B pictures, as a service tells them. JSON has no nan: null stands for it."""

    model_config = ConfigDict(strict=True)

    values: list[FiniteFloat | None]
    """Rewards [B], float32 written out in full; null where the sample failed."""
    failed: list[bool]
    """Samples that could not be scored, [B]."""
    columns: dict[str, list[JsonValue]] = {}
    """The reward's own findings by name, [B] each; null is nan."""
    identity: IdentityMessage
    """What scored them."""


def read_token(variable: str) -> str | None:
    """Return the bearer token that an environment variable holds.

    Args:
        variable: Its name.

    Returns:
        The token without white space around it, or None where the variable is unset or empty.

    Raises:
        ConfigError: No name of a variable, or no bearer token (RFC 6750). Neither is quoted: a
            token may have been put in the place of a name.
    """
    if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", variable):
        raise ConfigError(
            "token_variable is no name of an environment variable (capitals, digits, '_'); name "
            "the variable that holds the token, and never write the token itself into a config"
        )
    token = os.environ.get(variable, "").strip()
    if token and not re.fullmatch(r"[A-Za-z0-9._~+/-]+=*", token):
        raise ConfigError(
            f"the environment variable {variable} holds what is no bearer token; expected letters, "
            "digits and - . _ ~ + /, with = at the end only"
        )
    return token or None


@dataclass(frozen=True)
class _Multipart:
    """A request body that can be sent as often as needed."""

    files: list[tuple[str, tuple[str | None, bytes, str]]]

    @classmethod
    def of(cls, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> _Multipart:
        told = [{"text": p.text, "metadata": dict(p.metadata)} for p in prompts]
        text = json.dumps(told, allow_nan=False).encode()
        files: list[tuple[str, tuple[str | None, bytes, str]]]
        files = [("prompts", (None, text, "application/json"))]
        for index, image in enumerate(images):
            if image.mode not in _LOSSLESS_MODES:
                raise RewardError(
                    f"image {index} has the mode {image.mode}, which PNG cannot carry unchanged; "
                    "convert it to RGB before it is scored"
                )
            files.append(("images", (f"{index}.png", encode_image(image), "image/png")))
        return cls(files)


class _Away(Exception):
    """An endpoint did not answer, or asked to come again later."""

    def __init__(self, reason: str, retry_after_s: float = 0.0) -> None:
        super().__init__(reason)
        self.retry_after_s = retry_after_s


class HttpReward:
    """A reward that a service computes; its identity is the service's own.

    Building it asks the service for its identity, and every answer has to come from that identity.
    Where the service runs is no part of it: a service may be killed, started again, moved or given
    a second endpoint, and all that it costs is the delay.

    The endpoints are asked in turn, a batch each; the next one at once where one is away. Where all
    are, they are asked again after a growing, jittered wait, `retries` times and for
    `give_up_after_s` at most. What a service refuses, and what is no answer of the right shape, is
    a `RewardError` at once.

    Args:
        endpoints: Base addresses, ``http://host:port`` with an optional path.
        endpoints_variable: Environment variable that, where it is set, holds the endpoints,
            separated by commas, and goes before `endpoints`: a service moves while the config
            stays. Of several such rewards each needs a variable of its own.
        token_variable: Environment variable that holds the bearer token, if the service wants one.
        expected_digest: Digest of the identity that the service must have, or 8 or more of its
            first digits; by default any.
        max_batch: Pictures in one request.
        connect_timeout_s: Seconds to reach an endpoint.
        timeout_s: Seconds in which an endpoint must answer a batch, its queue included.
        retries: How often all endpoints are asked again for a batch.
        give_up_after_s: Seconds after which a batch is given up.
        start_within_s: Seconds that building it waits for the service to be there.

    Raises:
        ConfigError: No endpoint, or one that is no plain http address; no bearer token.
        RewardError: The service is away, or is another reward than expected.
    """

    def __init__(
        self,
        endpoints: tuple[str, ...] = (),
        *,
        endpoints_variable: str = ENDPOINTS_VARIABLE,
        token_variable: str = TOKEN_VARIABLE,
        expected_digest: Annotated[str, StringConstraints(pattern="^[0-9a-f]{8,64}$")]
        | None = None,
        max_batch: PositiveInt = 16,
        connect_timeout_s: PositiveFloat = 5.0,
        timeout_s: PositiveFloat = 120.0,
        retries: NonNegativeInt = 60,
        give_up_after_s: PositiveFloat = 600.0,
        start_within_s: PositiveFloat = 15.0,
    ) -> None:
        self._endpoints = _endpoints(endpoints, endpoints_variable)
        self._endpoints_variable = endpoints_variable
        self._token_variable = token_variable
        self._token = read_token(token_variable)
        self._max_batch = max_batch
        self._connect_timeout_s = connect_timeout_s
        self._timeout_s = timeout_s
        self._retries = retries
        self._give_up_after_s = give_up_after_s
        self._turn = 0
        self._away_until: dict[str, float] = {}
        headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        self._client = httpx.Client(headers=headers, follow_redirects=False)
        self.identity = self._ask_identity(start_within_s)
        if expected_digest and not self.identity.digest.startswith(expected_digest):
            raise RewardError(
                f"the service is the reward {self.identity.reward_id} of digest "
                f"{self.identity.digest}, and expected_digest is {expected_digest}; start the one "
                "that is expected, or expect the one that is there"
            )

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """Score B images, in batches of at most `max_batch`."""
        starts = range(0, len(images), self._max_batch)
        cuts = [slice(start, start + self._max_batch) for start in starts]
        return _join([self._score(images[cut], prompts[cut]) for cut in cuts])

    def _score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        body = _Multipart.of(images, prompts)
        endpoint, data = self._ask(
            "/score", body, each_s=self._timeout_s, within_s=self._give_up_after_s
        )
        try:
            told = ScoresMessage.model_validate_json(data)
        except ValidationError as error:
            raise self._no_answer(endpoint, "scores", error) from None
        self._check_identity(endpoint, self._identity(endpoint, told.identity), self.identity)
        if len(told.values) != len(images):
            raise self._error(
                f"{endpoint} answered {len(told.values)} scores for {len(images)} images"
            )
        with np.errstate(over="ignore"):  # becomes inf, which `Scores` refuses by sample
            values = np.array([math.nan if v is None else v for v in told.values], np.float32)
        columns = {
            name: [math.nan if value is None else value for value in column]
            for name, column in told.columns.items()
        }
        try:
            return Scores(values, np.array(told.failed, bool), columns)
        except RewardError as error:
            raise self._error(f"{endpoint} answered scores that do not fit: {error}") from None

    def _ask_identity(self, within_s: float) -> RewardIdentity:
        """Return the identity of the first endpoint that answers; the others must have it too."""
        first, data = self._ask("/identity", None, each_s=_IDENTITY_TIMEOUT_S, within_s=within_s)
        identity = self._read_identity(first, data)
        for endpoint in self._endpoints:
            if endpoint == first:
                continue
            try:
                data = self._request(endpoint, "/identity", None, _IDENTITY_TIMEOUT_S)
            except _Away as error:
                self._note_away(endpoint)
                _logger.warning("%s of the reward service is away: %s", endpoint, error)
                continue
            self._check_identity(endpoint, self._read_identity(endpoint, data), identity)
        return identity

    def _read_identity(self, endpoint: str, data: bytes) -> RewardIdentity:
        try:
            told = IdentityMessage.model_validate_json(data)
        except ValidationError as error:
            raise self._no_answer(endpoint, "its identity", error) from None
        return self._identity(endpoint, told)

    def _identity(self, endpoint: str, told: IdentityMessage) -> RewardIdentity:
        identity = RewardIdentity(told.name, told.parameters, told.revisions, told.version)
        try:
            identity.digest  # noqa: B018  # cached there; fails on what has no canonical JSON
        except (TypeError, ValueError) as error:
            raise self._error(f"{endpoint} has an identity that is no JSON: {error}") from None
        return identity

    def _check_identity(
        self, endpoint: str, found: RewardIdentity, expected: RewardIdentity
    ) -> None:
        if found.digest == expected.digest:
            return
        changed = "; ".join(
            f"{part} is {getattr(found, part)!r}, not {getattr(expected, part)!r}"
            for part in ("name", "parameters", "revisions", "version")
            if repr(getattr(found, part)) != repr(getattr(expected, part))
        )
        raise self._error(
            f"{endpoint} has another identity than {expected.reward_id}, which this reward was "
            f"built on: {changed}. Start the service as it was, or start another run"
        )

    def _ask(
        self, path: str, body: _Multipart | None, *, each_s: float, within_s: float
    ) -> tuple[str, bytes]:
        """Ask the endpoints in turn until one answers; return it, and what it answered."""
        deadline = time.monotonic() + within_s
        reasons: dict[str, str] = {}
        for attempt in range(self._retries + 1):
            waits = []
            for endpoint in self._in_turn():
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    break
                try:
                    return endpoint, self._request(endpoint, path, body, min(each_s, left_s))
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
            f"environment variable {self._endpoints_variable}"
        )

    def _in_turn(self) -> Iterator[str]:
        """Return all endpoints, another one first each time; those lately away come last."""
        first = self._turn % len(self._endpoints)
        self._turn += 1
        order = (*self._endpoints[first:], *self._endpoints[:first])
        now = time.monotonic()
        return iter(sorted(order, key=lambda endpoint: self._away_until.get(endpoint, 0.0) > now))

    def _note_away(self, endpoint: str) -> None:
        self._away_until[endpoint] = time.monotonic() + _AVOIDED_S

    def _request(self, endpoint: str, path: str, body: _Multipart | None, seconds: float) -> bytes:
        """Ask one endpoint once; return the body of its answer."""
        deadline = time.monotonic() + seconds
        timeout = httpx.Timeout(seconds, connect=min(self._connect_timeout_s, seconds))
        method, files = ("GET", None) if body is None else ("POST", body.files)
        try:
            with self._client.stream(
                method, endpoint + path, files=files, timeout=timeout
            ) as response:
                data = bytearray()
                for piece in response.iter_raw():
                    data += piece
                    if len(data) > _ANSWER_LIMIT_BYTES:
                        raise self._error(
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
            raise self._error(
                f"{endpoint} refused the token ({said}): the environment variable "
                f"{self._token_variable} is {has}"
            )
        if response.status_code == httpx.codes.REQUEST_ENTITY_TOO_LARGE:
            said += "; a smaller `max_batch` sends less at once"
        raise self._error(f"{endpoint} answered {said}")

    def _no_answer(self, endpoint: str, what: str, error: ValidationError) -> RewardError:
        wrong = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'the body'}: {item['msg']}"
            for item in error.errors(include_url=False, include_input=False)[:3]
        )
        return self._error(
            f"{endpoint} did not answer with {what} but with something else: {wrong}"
        )

    def _error(self, text: str) -> RewardError:
        return RewardError(self._clean(text))

    def _clean(self, text: str) -> str:
        """Take the token out of a text: a service may repeat whatever it was sent."""
        return hide_credentials(text.replace(self._token, HIDDEN) if self._token else text)


def _endpoints(given: Sequence[str], variable: str) -> tuple[str, ...]:
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


def _join(parts: Sequence[Scores]) -> Scores:
    """Put the scores of consecutive batches together."""
    columns: dict[str, list[Any]] = {name: [] for part in parts[:1] for name in part.columns}
    for part in parts:
        if part.columns.keys() != columns.keys():
            raise RewardError(
                f"the service answered the columns {sorted(columns)} for one batch and "
                f"{sorted(part.columns)} for another; expected the same for all"
            )
        for name, column in part.columns.items():
            columns[name] += column
    values = [value for part in parts for value in part.values]
    failed = [each for part in parts for each in part.failed]
    return Scores(np.array(values, np.float32), np.array(failed, bool), columns)
