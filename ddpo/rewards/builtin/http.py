"""A reward that a service computes: the client of `ddpo serve-reward`."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import httpx
import numpy as np
from PIL import Image
from pydantic import PositiveInt, StringConstraints, ValidationError

from ddpo.basics.images import encode_image
from ddpo.errors import RewardError
from ddpo.prompts.base import Prompt
from ddpo.rewards.base import Scores
from ddpo.rewards.columns import say_left_out
from ddpo.rewards.identity import RewardIdentity
from ddpo.rewards.service.client import ServedReward
from ddpo.rewards.service.endpoints import Files, NoAnswer
from ddpo.rewards.service.wire import (
    TOKEN_VARIABLE,
    IdentityMessage,
    ScoresMessage,
    describe_problems,
)

ENDPOINTS_VARIABLE = "DDPO_REWARD_ENDPOINTS"

_LOSSLESS_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "I;16"})
"""Modes that survive PNG unchanged; Pillow would round or reject the others."""
_IDENTITY_TIMEOUT_S = 5.0


@dataclass(kw_only=True, eq=False)
class HttpReward(ServedReward):
    """A reward that a service computes; its identity is the service's own.

    Building it asks the service for its identity, and every response must come from that identity.

    Endpoints are tried in turn, one batch each, with immediate failover to the next. If all are
    unavailable, they are tried again after a growing, jittered wait, `retries` times and for
    `give_up_after_s` at most. A rejected request and a malformed response are a `RewardError` at
    once.

    Raises:
        ConfigError: There is no endpoint, an address is not plain http, or the token is malformed.
        RewardError: The service is unavailable, or is not the expected reward.
    """

    needs: ClassVar[str] = (
        "a running reward service (`ddpo serve-reward NAME`), and DDPO_REWARD_TOKEN if it needs one"
    )

    endpoints_variable: str = ENDPOINTS_VARIABLE
    token_variable: str = TOKEN_VARIABLE
    """Environment variable with the bearer token, if the service requires one."""
    expected_digest: Annotated[str, StringConstraints(pattern="^[0-9a-f]{8,64}$")] | None = None
    """Digest of the identity that the service must have, or at least its first 8 digits; by default
    any identity is accepted."""
    max_batch: PositiveInt = 16
    """Images in one request."""

    def __post_init__(self) -> None:
        self._client = self._connect(
            what="the reward service",
            start="Start it with `ddpo serve-reward`",
            example="http://127.0.0.1:8100",
            token_parameter="token_variable",
        )
        self.identity = self._ask_identity()
        if self.expected_digest and not self.identity.digest.startswith(self.expected_digest):
            raise RewardError(
                f"the service is the reward {self.identity.reward_id} with the digest "
                f"{self.identity.digest}, but expected_digest is {self.expected_digest}; start the "
                "expected service, or change expected_digest"
            )

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        """Score B images, in batches of at most `max_batch`."""
        starts = range(0, len(images), self.max_batch)
        batches = [slice(start, start + self.max_batch) for start in starts]
        return _join([self._score(images[batch], prompts[batch]) for batch in batches])

    def _score(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        body = _multipart(images, prompts)
        try:
            endpoint, data = self._client.first_answer(
                lambda endpoint, seconds: self._request(endpoint, "/score", seconds, body)
            )
        except NoAnswer as error:
            raise self._client.error(str(error)) from error
        try:
            message = ScoresMessage.model_validate_json(data)
        except ValidationError as error:
            raise self._malformed(endpoint, "scores", error) from None
        self._check_identity(endpoint, self._identity(endpoint, message.identity), self.identity)
        if len(message.values) != len(images):
            raise self._client.error(
                f"{endpoint} returned {len(message.values)} scores for {len(images)} images"
            )
        with np.errstate(over="ignore"):  # becomes inf, which `Scores` rejects by sample
            values = np.array([math.nan if v is None else v for v in message.values], np.float32)
        try:
            # Their names are logged if they cannot be stored, and a service may echo its token.
            columns = {self._client.clean(name): c for name, c in message.columns.items()}
            return Scores(values, np.array(message.failed, bool), columns)
        except RewardError as error:
            raise self._client.error(f"{endpoint} returned invalid scores: {error}") from None

    def _ask_identity(self) -> RewardIdentity:
        """Return the identity of the first endpoint that answers; the others must share it."""

        def ask(endpoint: str, seconds: float) -> RewardIdentity:
            return self._read_identity(endpoint, self._request(endpoint, "/identity", seconds))

        try:
            first, identity = self._client.first_answer(
                ask, each_s=_IDENTITY_TIMEOUT_S, within_s=self.start_within_s
            )
        except NoAnswer as error:
            raise self._client.error(str(error)) from error
        for endpoint, other in self._client.other_answers(first, ask, each_s=_IDENTITY_TIMEOUT_S):
            self._check_identity(endpoint, other, identity)
        return identity

    def _request(
        self, endpoint: str, path: str, seconds: float, body: Files | None = None
    ) -> bytes:
        """Make one request to one endpoint.

        Raises:
            RewardError: It rejects the request. Status 500 counts: its reward raised.
            Unavailable: As `Endpoints.request`.
            NoAnswer: As `Endpoints.request`.
        """
        reply = self._client.request(endpoint, path, seconds, body)
        if reply.status == httpx.codes.OK:
            return reply.data
        if reply.status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise self._client.error(
                f"{endpoint} rejected the token ({reply.summary}): {self._client.token_state}"
            )
        way_out = ""
        if reply.status == httpx.codes.REQUEST_ENTITY_TOO_LARGE:
            way_out = "; set a smaller `max_batch`"
        error = self._client.error(f"{endpoint} answered {reply.summary}{way_out}")
        if reply.status == httpx.codes.INTERNAL_SERVER_ERROR:
            error.reason = reply.summary.removeprefix(f"{reply.status} ")
        raise error

    def _read_identity(self, endpoint: str, data: bytes) -> RewardIdentity:
        try:
            message = IdentityMessage.model_validate_json(data)
        except ValidationError as error:
            raise self._malformed(endpoint, "its identity", error) from None
        return self._identity(endpoint, message)

    def _identity(self, endpoint: str, message: IdentityMessage) -> RewardIdentity:
        identity = RewardIdentity(
            message.name, message.parameters, message.revisions, message.version
        )
        try:
            identity.digest  # noqa: B018  # fails, before it is cached, without canonical JSON
        except (TypeError, ValueError) as error:
            raise self._client.error(
                f"{endpoint} has an identity that is not plain JSON: {error}"
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
        raise self._client.error(
            f"{endpoint} has another identity than {expected.reward_id}, with which this reward "
            f"was built: {changed}. Start the service as it was, or start another run"
        )

    def _malformed(self, endpoint: str, what: str, error: ValidationError) -> RewardError:
        return self._client.error(
            f"{endpoint} did not answer with {what}: {describe_problems(error)}"
        )


def _multipart(images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Files:
    """Return a request body that can be sent repeatedly."""
    texts = [{"text": p.text, "metadata": dict(p.metadata)} for p in prompts]
    text = json.dumps(texts, allow_nan=False).encode()
    files: list[tuple[str, tuple[str | None, bytes, str]]]
    files = [("prompts", (None, text, "application/json"))]
    for index, image in enumerate(images):
        if image.mode not in _LOSSLESS_MODES:
            raise RewardError(
                f"image {index} has the mode {image.mode}, which PNG cannot carry unchanged; "
                "convert it to RGB before scoring it"
            )
        files.append(("images", (f"{index}.png", encode_image(image), "image/png")))
    return files


def _join(parts: Sequence[Scores]) -> Scores:
    """Concatenate the scores of consecutive batches, and the columns that all of them have."""
    columns: dict[str, list[Any]] = {}
    for name in dict.fromkeys(name for part in parts for name in part.columns):
        if all(name in part.columns for part in parts):
            columns[name] = [value for part in parts for value in part.columns[name]]
        else:
            say_left_out(name, "the service returned it for some batches only")
    values = [value for part in parts for value in part.values]
    failed = [flag for part in parts for flag in part.failed]
    return Scores(np.array(values, np.float32), np.array(failed, bool), columns)
