"""Answers that reach a client which is still sending."""

from __future__ import annotations

import asyncio
import logging

from starlette.types import ASGIApp, Message, Receive, Scope, Send

_DRAIN_S = 2.0

_logger = logging.getLogger(__name__)


class ReadToTheEnd:
    """Reads what is left of a body, bounded, before an answer that did not wait for it is sent.

    A server that closes a connection on which bytes are still coming in resets it, and its client
    then sees a broken connection in place of the answer.
    """

    def __init__(self, app: ASGIApp, limit_bytes: int) -> None:
        self._app = app
        self._limit_bytes = limit_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let the application answer a request, and send the answer once its body is read."""
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
