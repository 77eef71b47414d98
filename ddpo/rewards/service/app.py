"""The service as an ASGI application: routes, token and OpenAPI page."""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from pydantic import BaseModel
from starlette.requests import ClientDisconnect

from ddpo.basics.version import VERSION
from ddpo.rewards.base import Reward
from ddpo.rewards.service.drain import ReadToTheEnd
from ddpo.rewards.service.form import read_batch
from ddpo.rewards.service.limits import Limits
from ddpo.rewards.service.scorer import Scorer
from ddpo.rewards.service.wire import TOKEN_VARIABLE, IdentityMessage, PromptMessage, ScoresMessage


class Problem(BaseModel):
    """Why a request was rejected."""

    detail: str


class Alive(BaseModel):
    """The service is running."""

    alive: bool = True


class Ready(BaseModel):
    """The reward is loaded."""

    ready: bool = True


_bearer = HTTPBearer(auto_error=False, description=f"The value of {TOKEN_VARIABLE}.")

_PROBLEMS = {
    400: "The body is not a multipart form.",
    401: "The token is missing or wrong.",
    408: "The body did not arrive in time.",
    413: "A limit is exceeded: images, bytes or pixels.",
    415: "The body is not multipart/form-data.",
    422: "Prompts or images cannot be read, or their numbers differ.",
    500: "The reward failed.",
    503: "The reward is being loaded, or the queue is full; retry after Retry-After.",
}


def create_app(
    load: Callable[[], Reward], *, token: str | None = None, limits: Limits | None = None
) -> FastAPI:
    """Build the service. `/health` answers at once, the other routes once the reward is loaded.

    Args:
        load: Builds the reward; called once, when the service starts, in the thread that scores.
        token: The bearer token required by `/identity` and `/score`; None admits everyone.
        limits: Bounds of a request.
    """
    limits = limits or Limits()
    scorer = Scorer(load, limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with scorer.running():
            yield

    app = FastAPI(
        title="ddpo reward service",
        version=VERSION,
        lifespan=lifespan,
        separate_input_output_schemas=False,
    )
    # An oversized body is rejected unread; up to twice the limit, the client still gets the answer.
    app.add_middleware(ReadToTheEnd, limit_bytes=2 * limits.body_bytes)
    app.add_exception_handler(ClientDisconnect, _client_gone)
    guard = [Depends(_guard(token))] if token else []

    @app.get("/health")
    async def health() -> Alive:
        """Say that the service is running."""
        return Alive()

    @app.get("/ready", responses=_problems(503))
    async def ready() -> Ready:
        """Say whether the reward is loaded."""
        scorer.reward()
        return Ready()

    @app.get("/identity", dependencies=guard, responses=_problems(401, 503))
    async def identity() -> IdentityMessage:
        """Return the reward's identity: what decides its scores."""
        return IdentityMessage.of(scorer.reward().identity)

    @app.post(
        "/score",
        dependencies=guard,
        response_model=ScoresMessage,
        responses=_problems(*_PROBLEMS),
        openapi_extra={"requestBody": _request_body(limits)},
    )
    async def score(request: Request) -> Response:
        """Score images, each generated for the prompt with the same index."""
        scorer.reward()
        with scorer.slot() as held:
            batch = await read_batch(request, limits, held)
            return Response(await scorer.score(batch, request), media_type="application/json")

    return app


async def _client_gone(request: Request, error: Exception) -> Response:
    """End a request whose client has disconnected, without a traceback in the log."""
    return Response(status_code=400)


def _guard(token: str) -> Callable[..., None]:
    def check(
        credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)],
    ) -> None:
        given = credentials.credentials if credentials else ""
        if not secrets.compare_digest(given.encode(), token.encode()):
            raise HTTPException(
                401,
                f"the token is {'wrong' if given else 'missing'}; expected the header "
                "'Authorization: Bearer TOKEN'",
                {"WWW-Authenticate": "Bearer"},
            )

    return check


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {s: {"model": Problem, "description": _PROBLEMS[s]} for s in statuses}


def _request_body(limits: Limits) -> dict[str, Any]:
    """Return the OpenAPI description of a request, whose body FastAPI does not parse itself."""
    count = {"type": "array", "minItems": 1, "maxItems": limits.images}
    # Its reference, any JSON value, is among the page's components because the answer has it.
    prompt = PromptMessage.model_json_schema(ref_template="#/components/schemas/{model}")
    del prompt["$defs"]
    schema = {
        "type": "object",
        "required": ["prompts", "images"],
        "additionalProperties": False,
        "properties": {
            "prompts": {**count, "items": prompt, "description": "A JSON array, in one part."},
            "images": {
                **count,
                "items": {"type": "string", "format": "binary"},
                "description": f"One part each: PNG or JPEG, at most {limits.image_bytes} bytes "
                f"and {limits.image_pixels} pixels; {limits.batch_pixels} pixels in total.",
            },
        },
    }
    encoding = {
        "prompts": {"contentType": "application/json"},
        "images": {"contentType": "image/png, image/jpeg"},
    }
    form = {"schema": schema, "encoding": encoding}
    return {"required": True, "content": {"multipart/form-data": form}}
