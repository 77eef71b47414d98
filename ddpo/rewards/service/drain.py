"""Deliver a response to a client that is still sending its request."""

from __future__ import annotations

import asyncio
import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_DRAIN_S = 2.0

_logger = logging.getLogger(__name__)


class ReadToTheEnd:
    """Reads the rest of a body, up to a limit, before sending a response that did not wait for it.

    A server that closes a connection with unread bytes resets it, and the client sees a broken
    connection instead of the response.
    """

    def __init__(self, app: ASGIApp, limit_bytes: int) -> None:
        self._app = app
        self._limit_bytes = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the application handle a request, and send its response once the body is read."""
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
                    _logger.debug("a client was still sending %.0f s after the response", _DRAIN_S)
            await send(message)

        await self._app(scope, watched, answer)
