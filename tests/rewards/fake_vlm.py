"""A server that speaks OpenAI's protocol as a test tells it to; and `openai_vlm` over it."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from PIL import Image

from ddpo.prompts import Prompt
from ddpo.rewards import load_reward, score_images
from tests.rewards.tiny_models import PICTURES

MODEL = "llava"
ASKED = Prompt("two cats", {"questions": ["How many?", "What?"], "answers": ["two", "cat"]})
REPLY = "2 cats"

Reply = tuple[int, dict[str, str], bytes]


def completion(text: str | None) -> Reply:
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    body = {"id": "1", "object": "chat.completion", "model": MODEL, "choices": [choice]}
    return 200, {}, json.dumps(body).encode()


def refusal(status: int, **headers: str) -> Reply:
    said = {"error": {"message": f"no {status}", "type": "x"}}
    return status, {n.replace("_", "-"): v for n, v in headers.items()}, json.dumps(said).encode()


class Served:
    """What a server is told to answer, and what it was asked."""

    def __init__(self) -> None:
        self.models: Reply = (200, {}, self.listing({"id": MODEL, "root": "org/llava-7b"}))
        self.answer: Callable[[dict, int], Reply] = lambda body, number: completion(REPLY)
        self.asked: list[dict] = []
        self.times: list[float] = []
        self.authorization: set[str | None] = set()
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    @staticmethod
    def listing(*models: dict) -> bytes:
        return json.dumps({"object": "list", "data": list(models)}).encode()


@contextmanager
def serving(port: int = 0) -> Iterator[tuple[Served, str]]:
    served = Served()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            served.authorization.add(self.headers["Authorization"])
            self.reply(served.models if self.path == "/v1/models" else refusal(404))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != "/v1/chat/completions":
                self.reply(refusal(404))
                return
            with served.lock:
                served.authorization.add(self.headers["Authorization"])
                served.asked.append(body)
                served.times.append(time.monotonic())
                number = len(served.asked)
                served.at_once += 1
                served.most_at_once = max(served.most_at_once, served.at_once)
            try:
                reply = served.answer(body, number)
            finally:
                with served.lock:
                    served.at_once -= 1
            self.reply(reply)

        def reply(self, reply: Reply) -> None:
            status, headers, data = reply
            try:
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except OSError:
                self.close_connection = True  # whoever asked is gone

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", port), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield served, f"http://127.0.0.1:{server.server_address[1]}/v1"
        finally:
            server.shutdown()
            thread.join()


def load(*addresses: str, **parameters):
    return load_reward(
        "openai_vlm",
        {"model": MODEL, "task": "vqa", "endpoints": list(addresses), **parameters},
    )


def scored(reward, count=3):
    return score_images(reward, PICTURES[:count], [ASKED] * count)


def shown(body: dict) -> int:
    """Return which of the pictures a request shows."""
    sent = np.asarray(sent_picture(body))
    return next(i for i, image in enumerate(PICTURES) if np.array_equal(sent, np.asarray(image)))


def sent_picture(body: dict) -> Image.Image:
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    start = "data:image/png;base64,"
    assert url.startswith(start)
    return Image.open(io.BytesIO(base64.b64decode(url[len(start) :])))
