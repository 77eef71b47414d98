"""A reward that a service computes: the client of `ddpo serve-reward`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, TypeVar

import httpx
import numpy as np
from PIL import Image
from pydantic import (
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    StringConstraints,
    ValidationError,
)

from ddpo.basics.images import encode_image
from ddpo.errors import RewardError
from ddpo.prompts.base import Prompt
from ddpo.rewards.base import Scores
from ddpo.rewards.identity import RewardIdentity
from ddpo.rewards.service.endpoints import Endpoints, Files, NoAnswer, Patience, Service
from ddpo.rewards.service.wire import TOKEN_VARIABLE, IdentityMessage, ScoresMessage, what_is_wrong

ENDPOINTS_VARIABLE = "DDPO_REWARD_ENDPOINTS"

_LOSSLESS_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})
"""What PNG gives back as it was; Pillow would round or refuse the others."""
_IDENTITY_TIMEOUT_S = 5.0

Found = TypeVar("Found")


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

    needs: ClassVar[str] = (
        "a running reward service (`ddpo serve-reward NAME`), and DDPO_REWARD_TOKEN if it wants one"
    )

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
        service = Service(
            what="the reward service",
            start="Start it with `ddpo serve-reward`",
            example="http://127.0.0.1:8100",
            variable=endpoints_variable,
            token_variable=token_variable,
            token_parameter="token_variable",
        )
        self._patience = Patience(connect_timeout_s, timeout_s, retries, give_up_after_s)
        self._endpoints = Endpoints(endpoints, service, self._patience)
        self._max_batch = max_batch
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
        body = _multipart(images, prompts)
        endpoint, data = self._in_turn(
            lambda endpoint, seconds: self._request(endpoint, "/score", seconds, body),
            each_s=self._patience.timeout_s,
            within_s=self._patience.give_up_after_s,
        )
        try:
            told = ScoresMessage.model_validate_json(data)
        except ValidationError as error:
            raise self._no_answer(endpoint, "scores", error) from None
        self._check_identity(endpoint, self._identity(endpoint, told.identity), self.identity)
        if len(told.values) != len(images):
            raise self._endpoints.error(
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
            raise self._endpoints.error(
                f"{endpoint} answered scores that do not fit: {error}"
            ) from None

    def _ask_identity(self, within_s: float) -> RewardIdentity:
        """Return the identity of the first endpoint that answers; the others must have it too."""

        def ask(endpoint: str, seconds: float) -> RewardIdentity:
            return self._read_identity(endpoint, self._request(endpoint, "/identity", seconds))

        first, identity = self._in_turn(ask, each_s=_IDENTITY_TIMEOUT_S, within_s=within_s)
        for endpoint, other in self._endpoints.others(first, ask, each_s=_IDENTITY_TIMEOUT_S):
            self._check_identity(endpoint, other, identity)
        return identity

    def _in_turn(
        self, ask: Callable[[str, float], Found], *, each_s: float, within_s: float
    ) -> tuple[str, Found]:
        try:
            return self._endpoints.in_turn(ask, each_s=each_s, within_s=within_s)
        except NoAnswer as error:
            raise self._endpoints.error(str(error)) from error

    def _request(
        self, endpoint: str, path: str, seconds: float, body: Files | None = None
    ) -> bytes:
        """Ask one endpoint once; what it refuses is an error at once, 500 too: its reward raised.

        Raises:
            RewardError: It refuses.
            Away: As `Endpoints.request`.
            NoAnswer: As `Endpoints.request`.
        """
        reply = self._endpoints.request(endpoint, path, seconds, body)
        if reply.status == httpx.codes.OK:
            return reply.data
        if reply.status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise self._endpoints.error(
                f"{endpoint} refused the token ({reply.said}): {self._endpoints.token_state}"
            )
        way_out = ""
        if reply.status == httpx.codes.REQUEST_ENTITY_TOO_LARGE:
            way_out = "; a smaller `max_batch` sends less at once"
        raise self._endpoints.error(f"{endpoint} answered {reply.said}{way_out}")

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
            raise self._endpoints.error(
                f"{endpoint} has an identity that is no JSON: {error}"
            ) from None
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
        raise self._endpoints.error(
            f"{endpoint} has another identity than {expected.reward_id}, which this reward was "
            f"built on: {changed}. Start the service as it was, or start another run"
        )

    def _no_answer(self, endpoint: str, what: str, error: ValidationError) -> RewardError:
        return self._endpoints.error(
            f"{endpoint} did not answer with {what} but with something else: {what_is_wrong(error)}"
        )


def _multipart(images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Files:
    """Return a request body that can be sent as often as needed."""
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
    return files


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
