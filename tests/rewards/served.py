"""Any reward behind a real connection, and requests to it."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import httpx
import numpy as np
import pytest
import uvicorn
from PIL import Image
from starlette.types import ASGIApp

from ddpo.basics.images import encode_image
from ddpo.prompts import Prompt
from ddpo.rewards import RewardIdentity, Scores
from ddpo.rewards.service.limits import Limits

CLIENT = httpx.Client(timeout=300, limits=httpx.Limits(max_connections=None))
TOKEN = "canary-5f2b.c9~e8/d7+A="
SMALL = Limits(
    images=4,
    image_bytes=20_000,
    image_pixels=64 * 64,
    batch_pixels=3 * 64 * 64,
    prompts_bytes=2000,
    body_bytes=50_000,
)


@contextmanager
def serving(app: ASGIApp, port: int = 0) -> Iterator[str]:
    """Run an application on a loopback port until the block ends; gives its address."""
    config = uvicorn.Config(app, http="h11", ws="none", log_level="warning")
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", port)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started and thread.is_alive():
            time.sleep(0.005)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(300)
            assert not thread.is_alive()


class Sum:
    """Scores a picture by its bytes and its prompt, in numbers that float32 does not round well."""

    identity = RewardIdentity("sum", {"scale": 1.0, "words": ["a"]}, {"org/model": "abc"}, "3")

    def __init__(self) -> None:
        self.calls = 0
        self.at_once = 0
        self.most_at_once = 0
        self.go = threading.Event()
        self.go.set()

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Scores:
        self.calls += 1
        self.at_once += 1
        self.most_at_once = max(self.at_once, self.most_at_once)
        try:
            assert self.go.wait(300)
            text = " ".join(prompt.text for prompt in prompts)
            if "raise" in text:
                raise ValueError("no such \udcff thing")
            if "exit" in text:
                sys.exit(3)
            if "too few" in text:
                return Scores([0.0])
            odd = {"object": object(), "infinite": float("inf")}.get(prompts[0].text, "fine")
            sums = [float(np.asarray(image).astype(np.float64).sum()) for image in images]
            lengths = [len(json.dumps(dict(p.metadata)) + p.text) for p in prompts]
            values = [
                np.float32(s / 7 + length / 3) for s, length in zip(sums, lengths, strict=True)
            ]
            failed = [prompt.text == "fail" for prompt in prompts]
            columns = {
                "mode": [image.mode for image in images],
                "length": np.array(lengths),
                "share": [float("nan") if f else np.float32(1 / 3) for f in failed],
                "odd": [odd] * len(images),
            }
            return Scores(np.array(values), failed=np.array(failed), columns=columns)
        finally:
            self.at_once -= 1


def pictures(count: int, size: int = 16, seed: int = 0) -> list[Image.Image]:
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (count, size, size, 3), dtype=np.uint8)
    return [Image.fromarray(p) for p in pixels]


def form(images: Sequence[bytes], prompts: object) -> list:
    told = prompts if isinstance(prompts, bytes) else json.dumps(prompts).encode()
    parts = [("images", (f"{i}.png", data, "image/png")) for i, data in enumerate(images)]
    return [*parts, ("prompts", (None, told, "application/json"))]


def prompts_of(count: int, text: str = "a cat") -> list:
    return [{"text": text, "metadata": {"n": i}} for i in range(count)]


def post(url: str, images: Sequence[bytes], prompts: object, **more) -> httpx.Response:
    return CLIENT.post(f"{url}/score", files=form(images, prompts), **more)


def score(url: str, count: int = 2, text: str = "a cat", seed: int = 0) -> httpx.Response:
    images = [encode_image(i) for i in pictures(count, seed=seed)]
    return post(url, images, prompts_of(count, text))


def expected(count: int, text: str = "a cat", seed: int = 0) -> list[float]:
    prompts = [Prompt(p["text"], p["metadata"]) for p in prompts_of(count, text)]
    return Sum()(pictures(count, seed=seed), prompts).values.tolist()


def wait_for(url: str) -> None:
    """Wait until the reward behind an address is loaded."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if CLIENT.get(f"{url}/ready").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.02)
    raise AssertionError(f"{url} did not become ready")


GOOD = encode_image(pictures(1)[0])


def assert_says(answer: httpx.Response, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        raise ValueError(answer.json()["detail"])


def multipart(*parts: tuple[str, bytes], boundary: str = "xyz", end: str = "--\r\n") -> bytes:
    whole = b""
    for name, data in parts:
        head = f'--{boundary}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n'
        whole += head.encode() + data + b"\r\n"
    return whole + f"--{boundary}{end}".encode()


XYZ = "multipart/form-data; boundary=xyz"
TOLD = ("prompts", json.dumps(prompts_of(1)).encode())  # a part of a form, as `multipart` takes it
