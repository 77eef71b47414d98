"""A service that answers what a test plants; and the reward `http` over any service."""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import numpy as np
from starlette.types import Receive, Scope, Send

from ddpo.prompts import Prompt
from ddpo.rewards import load_reward, score_images
from tests.rewards.served import pictures

IMAGES = pictures(10)
PROMPTS = [Prompt("fail" if i == 4 else f"cat {i}", {"é": [i, 1 / 3]}) for i in range(10)]
IDENTITY = {"name": "sum", "parameters": {}, "revisions": {}, "version": "1"}


def load(*endpoints: str, **parameters):
    return load_reward("http", {"endpoints": list(endpoints), **parameters})


def scored(reward, count=10):
    return score_images(reward, IMAGES[:count], PROMPTS[:count])


def same(found, local) -> None:
    np.testing.assert_array_equal(found.values, local.values)
    np.testing.assert_array_equal(found.failed, local.failed)
    assert found.columns.keys() == local.columns.keys()
    for name, column in local.columns.items():
        np.testing.assert_array_equal(np.array(found.columns[name]), np.array(column))


class Fake:
    """A service that answers what a test plants: by path a status, headers and a body."""

    def __init__(self, **score) -> None:
        good = {"values": [0.5, 2], "failed": [False, False], "columns": {}, "identity": IDENTITY}
        self.identity: dict = dict(IDENTITY)
        self.status = 200
        self.headers: dict[str, str] = {}
        self.body = json.dumps(good | score).encode()
        self.send_body: Callable | None = None
        self.asked: list[str] = []
        self.times: list[float] = []
        self.authorization: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            await receive()
            await send({"type": "lifespan.shutdown.complete"})
            return
        while (await receive()).get("more_body"):
            pass
        self.asked.append(scope["path"])
        self.times.append(time.monotonic())
        self.authorization.add(dict(scope["headers"]).get(b"authorization", b"").decode())
        asks_identity = scope["path"] == "/identity"
        status, headers = (200, {}) if asks_identity else (self.status, self.headers)
        body = json.dumps(self.identity).encode() if asks_identity else self.body
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await send({"type": "http.response.start", "status": status, "headers": pairs})
        if self.send_body and not asks_identity:
            await self.send_body(send)
        await send({"type": "http.response.body", "body": body})


def answer(**changed) -> bytes:
    good = {"values": [0.5, 2], "failed": [False, False], "columns": {}, "identity": IDENTITY}
    return json.dumps(good | changed).encode()
