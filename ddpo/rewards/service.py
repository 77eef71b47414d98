"""Any reward over HTTP: pictures in multipart, everything else JSON, nothing pickled.

What a request may be is bounded before it is taken in: the body is counted while it is read, a
picture's size is read from its header before it is decoded, and how many requests are held at once
is bounded too. What is over a bound is refused by a clear status, and the service goes on.
"""

from __future__ import annotations

import asyncio
import io
import ipaddress
import json
import logging
import math
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import uvicorn
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from PIL import Image, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import ddpo
from ddpo.errors import ConfigError, RewardError
from ddpo.prompts.base import Prompt
from ddpo.rewards.base import Reward, Scores
from ddpo.rewards.http import TOKEN_VARIABLE, IdentityMessage, ScoresMessage, read_token
from ddpo.rewards.identity import RewardIdentity
from ddpo.rewards.registry import load_reward
from ddpo.rewards.scoring import score_images
from ddpo.store.images import PIXEL_LIMIT

_MIB = 1024**2
_LONGEST_BOUNDARY = 70  # RFC 2046
_FORMATS = ("PNG", "JPEG")
_DRAIN_S = 2.0
_KEEP_ALIVE_S = 30
_SHUTDOWN_S = 30

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """What a service takes in.

    Attributes:
        images: Pictures in one request.
        image_bytes: Bytes of one encoded picture.
        image_pixels: Pixels of one picture.
        batch_pixels: Pixels of all pictures of one request.
        prompts_bytes: Bytes of a request's prompts with their metadata.
        body_bytes: Bytes of a request.
        body_seconds: Seconds in which a request must have come in.
        held_bytes: Bytes of all requests that are read, waiting or being scored.
        workers: Requests that are scored at the same time.
        queue: Requests that wait for it.
    """

    images: int = 64
    image_bytes: int = 16 * _MIB
    image_pixels: int = PIXEL_LIMIT
    batch_pixels: int = 64 * _MIB
    prompts_bytes: int = 4 * _MIB
    body_bytes: int = 64 * _MIB
    body_seconds: float = 60.0
    held_bytes: int = 1024 * _MIB
    workers: int = 1
    queue: int = 64


class PromptMessage(BaseModel):
    """What the picture of the same index was asked for."""

    model_config = ConfigDict(strict=True, extra="forbid")

    text: str = Field(min_length=1)
    """The words; not blank."""
    metadata: dict[str, JsonValue] = {}
    """What a reward knows about them beside the words."""


class Problem(BaseModel):
    """Why a request was refused."""

    detail: str


class Alive(BaseModel):
    """That the service answers."""

    alive: bool = True


class Ready(BaseModel):
    """That the reward is loaded."""

    ready: bool = True


_PROMPTS: TypeAdapter[list[PromptMessage]] = TypeAdapter(list[PromptMessage])
_bearer = HTTPBearer(auto_error=False, description=f"What {TOKEN_VARIABLE} holds.")

_PROBLEMS = {
    400: "The body is no multipart form.",
    401: "The token is missing or wrong.",
    408: "The body did not come in in time.",
    413: "A bound is exceeded: pictures, bytes or pixels.",
    415: "The body is of another type than multipart/form-data.",
    422: "Prompts or pictures that cannot be read, or not one prompt for each picture.",
    500: "The reward failed.",
    503: "The reward is being loaded, or the queue is full; come again after Retry-After.",
}


def create_app(
    load: Callable[[], Reward], *, token: str | None = None, limits: Limits | None = None
) -> FastAPI:
    """Build the service.

    Args:
        load: Makes the reward; called once, in the thread that will score, when the service starts.
        token: The bearer token that `/identity` and `/score` want; None lets everyone in.
        limits: What is taken in.

    Returns:
        The application. `/health` answers at once, the others once the reward is loaded.
    """
    limits = limits or Limits()
    scorer = _Scorer(load, limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with scorer.running():
            yield

    app = FastAPI(
        title="ddpo reward service",
        version=ddpo.__version__,
        lifespan=lifespan,
        separate_input_output_schemas=False,
    )
    app.add_middleware(_ReadToTheEnd, limit_bytes=limits.body_bytes)
    app.add_exception_handler(ClientDisconnect, _nobody_listens)
    guard = [Depends(_guard(token))] if token else []

    @app.get("/health")
    async def health() -> Alive:
        """Tell that the service is alive."""
        return Alive()

    @app.get("/ready", responses=_problems(503))
    async def ready() -> Ready:
        """Tell whether the reward is loaded."""
        scorer.reward()
        return Ready()

    @app.get("/identity", dependencies=guard, responses=_problems(401, 503))
    async def identity() -> IdentityMessage:
        """Tell what makes the scores the same scores."""
        return IdentityMessage.of(scorer.reward().identity)

    @app.post(
        "/score",
        dependencies=guard,
        response_model=ScoresMessage,
        responses=_problems(*_PROBLEMS),
        openapi_extra={"requestBody": _request_body(limits)},
    )
    async def score(request: Request) -> Response:
        """Score pictures, each drawn for the prompt of its own index."""
        scorer.reward()
        with scorer.slot() as held:
            batch = await _read_batch(request, limits, held)
            return Response(await scorer.score(batch, request), media_type="application/json")

    return app


def serve(
    name: str,
    parameters: Mapping[str, Any],
    *,
    host: str = "127.0.0.1",
    port: int = 8100,
    limits: Limits | None = None,
    say: Callable[[str], None] = _logger.info,
) -> None:
    """Serve a reward until the process is told to stop.

    Args:
        name: A registered reward or an import path.
        parameters: Its parameters.
        host: Address to listen on. One that other machines reach needs a token.
        port: Port to listen on; 0 takes a free one.
        limits: What is taken in.
        say: Gets a line when the service listens, and one when the reward is loaded.

    Raises:
        ConfigError: The reward cannot be named so, the address cannot be listened on, or other
            machines reach it and there is no token.
        RewardError: The reward could not be built.
    """
    token = read_token(TOKEN_VARIABLE)
    if token is None and not _is_loopback(host):
        raise ConfigError(
            f"{host!r} can be reached from other machines, and there is no token; set the "
            f"environment variable {TOKEN_VARIABLE} here and for the run, or listen on 127.0.0.1"
        )
    failures: list[Exception] = []

    def load() -> Reward:
        try:
            reward = load_reward(name, parameters)
        except Exception as error:
            failures.append(error)
            server.should_exit = True
            raise
        say(f"ready: {reward.identity.reward_id}")
        return reward

    app = create_app(load, token=token, limits=limits)
    server = uvicorn.Server(
        uvicorn.Config(
            app,
            http="h11",
            ws="none",
            lifespan="on",
            log_level="warning",
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_SHUTDOWN_S,
        )
    )
    with _listen(host, port) as listener:
        address = f"[{host}]" if ":" in host else host
        url = f"http://{address}:{listener.getsockname()[1]}"
        say(f"reward {name} on {url}, its API on {url}/docs")
        server.run(sockets=[listener])
    if failures:
        raise failures[0]


class _Scorer:
    """The reward and its queue: so many requests are scored at once, so many more are held."""

    def __init__(self, load: Callable[[], Reward], limits: Limits) -> None:
        self._load = load
        self._limits = limits
        self._admitted = 0
        self._held_bytes = 0
        self._executor: ThreadPoolExecutor
        self._loading: Future[Reward]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Load the reward and score until the block ends."""
        self._executor = ThreadPoolExecutor(self._limits.workers, thread_name_prefix="reward")
        self._loading = self._executor.submit(self._load)
        try:
            yield
        finally:
            self._executor.shutdown(wait=False, cancel_futures=True)

    def reward(self) -> Reward:
        """Return the reward; a request that comes before it is loaded is told to come again."""
        if not self._loading.done():
            raise _refusal(503, "the reward is being loaded", retry_after_s=1)
        error = self._loading.exception()
        if error is not None:
            raise _refusal(503, f"the reward could not be loaded: {error}")
        return self._loading.result()

    @contextmanager
    def slot(self) -> Iterator[Callable[[int], None]]:
        """Hold a place in the queue; the callable that it gives counts the bytes held there."""
        if self._admitted >= self._limits.workers + self._limits.queue:
            raise _refusal(503, f"{self._admitted} requests are waiting already", retry_after_s=1)
        self._admitted += 1
        mine = 0

        def hold(count: int) -> None:
            nonlocal mine
            if self._held_bytes + count > self._limits.held_bytes:
                raise _refusal(503, "the requests that wait fill the memory", retry_after_s=1)
            mine += count
            self._held_bytes += count

        try:
            yield hold
        finally:
            self._admitted -= 1
            self._held_bytes -= mine

    async def score(self, batch: _Batch, request: Request) -> bytes:
        """Score a batch when its turn comes, unless its client has gone by then."""
        job = self._executor.submit(_score, self.reward(), batch, self._limits)
        scored = asyncio.wrap_future(job)
        gone = asyncio.ensure_future(_disconnected(request.receive))
        try:
            await asyncio.wait({scored, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not scored.done() and job.cancel():
                raise ClientDisconnect
            return await scored
        finally:
            gone.cancel()


@dataclass(frozen=True)
class _Batch:
    """A request as it was read: encoded pictures, and a prompt for each."""

    images: Sequence[bytes | bytearray]
    prompts: Sequence[Prompt]


class _Form:
    """The parts of a multipart body, taken in by the piece and refused once they are too much."""

    def __init__(self, boundary: bytes, limits: Limits) -> None:
        self.images: list[bytearray] = []
        self.prompts: bytearray | None = None
        self.complete = False
        self._limits = limits
        self._part = bytearray()
        self._part_limit = 0
        self._part_name = ""
        self._field = self._value = self._disposition = b""
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_headers_finished": self._on_headers_finished,
                "on_part_data": self._on_part_data,
                "on_end": self._on_end,
            },
        )

    def write(self, piece: bytes) -> None:
        """Take in the next bytes of the body."""
        try:
            self._parser.write(piece)
        except FormParserError as error:
            raise _refusal(400, f"the body is no multipart form: {error}") from error

    def _on_part_begin(self) -> None:
        self._field = self._value = self._disposition = b""

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._field += data[start:end]

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _on_header_end(self) -> None:
        if self._field.lower() == b"content-disposition":
            self._disposition = self._value
        self._field = self._value = b""

    def _on_headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition.decode("latin-1"))
        name = options.get(b"name", b"").decode("latin-1")
        self._part = bytearray()
        if name == "images":
            if len(self.images) == self._limits.images:
                raise _refusal(
                    413, f"more than {self._limits.images} images in one request; send fewer"
                )
            self._part_name, self._part_limit = (
                f"image {len(self.images)}",
                self._limits.image_bytes,
            )
            self.images.append(self._part)
        elif name == "prompts":
            if self.prompts is not None:
                raise _refusal(422, "there are two parts 'prompts'; expected one JSON array of all")
            self._part_name, self._part_limit = "'prompts'", self._limits.prompts_bytes
            self.prompts = self._part
        else:
            raise _refusal(
                422, f"a part is called {name!r}; expected one 'prompts', and an 'images' for each"
            )

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if len(self._part) + end - start > self._part_limit:
            raise _refusal(413, f"{self._part_name} has more than {self._part_limit} bytes")
        self._part += data[start:end]

    def _on_end(self) -> None:
        self.complete = True


class _ReadToTheEnd:
    """Reads what is left of a body, bounded, before an answer that did not wait for it is sent.

    A server that closes a connection on which bytes are still coming in resets it, and its client
    then sees a broken connection in place of the answer.
    """

    def __init__(self, app: ASGIApp, limit_bytes: int) -> None:
        self._app = app
        self._limit_bytes = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        ended = False

        async def watched() -> Message:
            nonlocal ended
            message = await receive()
            ended = ended or not message.get("more_body", False)
            return message

        async def drain() -> None:
            left = self._limit_bytes
            while not ended and left > 0:
                left -= len((await watched()).get("body", b""))

        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start" and not ended:
                try:
                    await asyncio.wait_for(drain(), _DRAIN_S)
                except TimeoutError:
                    _logger.debug("a client was still sending %.0f s after its answer", _DRAIN_S)
            await send(message)

        await self._app(scope, watched, answer)


async def _read_batch(request: Request, limits: Limits, hold: Callable[[int], None]) -> _Batch:
    """Read a request, counting while it comes in."""
    kind, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary", b"")
    if kind != b"multipart/form-data" or "content-encoding" in request.headers:
        raise _refusal(
            415, "expected an unencoded multipart/form-data body with 'prompts' and 'images'"
        )
    if not 1 <= len(boundary) <= _LONGEST_BOUNDARY:
        raise _refusal(400, f"the boundary must have 1 to {_LONGEST_BOUNDARY} characters")
    too_long = f"the body has more than {limits.body_bytes} bytes; send fewer images at once"
    claimed = request.headers.get("content-length", "0")
    if claimed.isdecimal() and int(claimed) > limits.body_bytes:
        raise _refusal(413, too_long)
    form = _Form(boundary, limits)
    count = 0
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for piece in request.stream():
                count += len(piece)
                if count > limits.body_bytes:
                    raise _refusal(413, too_long)
                hold(len(piece))
                form.write(piece)
    except TimeoutError as error:
        raise _refusal(408, f"the body did not come in within {limits.body_seconds:g} s") from error
    if not form.complete:
        raise _refusal(400, "the body ends before its last boundary")
    if form.prompts is None or not form.images:
        raise _refusal(422, "expected a part 'prompts', and a part 'images' for each picture")
    prompts = _read_prompts(bytes(form.prompts))
    if len(prompts) != len(form.images):
        raise _refusal(
            422, f"{len(form.images)} images with {len(prompts)} prompts; give one for each"
        )
    return _Batch(form.images, prompts)


def _read_prompts(data: bytes) -> list[Prompt]:
    try:
        told = _PROMPTS.validate_json(data)
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, item['loc'])) or 'the part'}: {item['msg']}"
            for item in error.errors(include_url=False, include_input=False)[:3]
        )
        raise _refusal(
            422, f"'prompts' is no JSON array of {{text, metadata}} objects: {wrong}"
        ) from error
    prompts = []
    for index, message in enumerate(told):
        try:
            prompts.append(Prompt(message.text, message.metadata))
        except ConfigError as error:
            raise _refusal(422, f"prompt {index}: {error}") from error
    return prompts


def _score(reward: Reward, batch: _Batch, limits: Limits) -> bytes:
    """Decode and score a batch; return the answer's body. Runs in a thread."""
    images = _decode(batch.images, limits)
    try:
        scores = score_images(reward, images, batch.prompts)
        return _answer(scores, reward.identity)
    except RewardError as error:
        _logger.warning("%s", error, exc_info=True)
        raise _refusal(500, str(error)) from error
    except SystemExit as error:  # would end the service, not the request
        _logger.warning("the reward called exit", exc_info=True)
        raise _refusal(500, f"the reward called exit: {error}") from error


def _decode(files: Sequence[bytes | bytearray], limits: Limits) -> list[Image.Image]:
    """Decode pictures, once the sizes that all of them claim are known to be within bounds."""
    images: list[Image.Image] = []
    pixels = 0
    for index, data in enumerate(files):
        with _readable(index):
            images.append(Image.open(io.BytesIO(data), formats=_FORMATS))
        width, height = images[-1].size
        if width * height > limits.image_pixels:
            raise _refusal(
                413,
                f"image {index} is {width}x{height}, more than {limits.image_pixels} pixels",
            )
        pixels += width * height
    if pixels > limits.batch_pixels:
        raise _refusal(
            413,
            f"the images have {pixels} pixels together, more than {limits.batch_pixels}; send "
            "fewer at once",
        )
    for index, image in enumerate(images):
        with _readable(index):
            image.load()
    return images


@contextmanager
def _readable(index: int) -> Iterator[None]:
    """Make of whatever a decoder raises on damaged bytes one refusal that names the picture."""
    try:
        yield
    except Image.DecompressionBombError as error:
        raise _refusal(413, f"image {index} has far too many pixels: {error}") from error
    except UnidentifiedImageError as error:  # its own text is an address in memory
        raise _refusal(422, f"image {index} is neither PNG nor JPEG") from error
    except Exception as error:
        raise _refusal(422, f"image {index} cannot be decoded: {error}") from error


def _answer(scores: Scores, identity: RewardIdentity) -> bytes:
    """Return scores as JSON. A float32 is written out in full, so it comes back as it was."""
    message = {
        "values": [None if math.isnan(value) else value for value in scores.values.tolist()],
        "failed": scores.failed.tolist(),
        "columns": {
            name: [_plain(value) for value in column] for name, column in scores.columns.items()
        },
        "identity": {**asdict(identity), "digest": identity.digest},
    }
    try:
        return json.dumps(message, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise RewardError(
            f"a column of reward {identity.reward_id} holds what JSON cannot say ({error}); "
            "expected numbers or text"
        ) from error


def _plain(value: Any) -> Any:
    """Return a number of NumPy's or torch's as Python's; nan as None, which JSON has."""
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and math.isnan(value) else value


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _nobody_listens(request: Request, error: Exception) -> Response:
    """End a request whose client has gone, without a traceback in the log."""
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


def _refusal(status: int, detail: str, *, retry_after_s: int | None = None) -> HTTPException:
    sayable = detail.encode("utf-8", "replace").decode()  # a reward's message may not be Unicode
    headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}
    return HTTPException(status, sayable, headers)


def _problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    return {s: {"model": Problem, "description": _PROBLEMS[s]} for s in statuses}


def _request_body(limits: Limits) -> dict[str, Any]:
    """Return what OpenAPI says of a request, whose body is read here and not by FastAPI."""
    count = {"type": "array", "minItems": 1, "maxItems": limits.images}
    # What it refers to, any JSON value, is among the page's components by way of the answer.
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
                "description": f"A part each: PNG or JPEG, at most {limits.image_bytes} bytes and "
                f"{limits.image_pixels} pixels; {limits.batch_pixels} pixels together.",
            },
        },
    }
    encoding = {
        "prompts": {"contentType": "application/json"},
        "images": {"contentType": "image/png, image/jpeg"},
    }
    form = {"schema": schema, "encoding": encoding}
    return {"required": True, "content": {"multipart/form-data": form}}


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"cannot listen on port {port} of {host}: {error.strerror}; give another with --port "
            "or --host"
        ) from error
