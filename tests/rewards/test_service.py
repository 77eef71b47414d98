"""The reward service over real connections: what it answers, refuses, and survives."""

from __future__ import annotations

import gzip
import io
import json
import logging
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from urllib.parse import urlsplit

import httpx
import numpy as np
import pytest
import schemathesis
import uvicorn
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from starlette.types import ASGIApp

from ddpo.errors import ConfigError, RewardError
from ddpo.prompts import Prompt
from ddpo.rewards import RewardIdentity, Scores, score_images, service
from ddpo.rewards.service import Limits, create_app, drain, serve
from ddpo.rewards.service import form as form_reader
from ddpo.store.images import encode_image

CLIENT = httpx.Client(timeout=30, limits=httpx.Limits(max_connections=None))
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
            thread.join(20)
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
            assert self.go.wait(20)
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


@pytest.fixture(scope="module")
def up() -> Iterator[str]:
    """A service of small limits, the same one for all that should not hurt it."""
    with serving(create_app(Sum, limits=SMALL)) as url:
        wait_for(url)
        yield url


@pytest.fixture
def reward() -> Sum:
    return Sum()


# What it answers.


def test_scores_through_http_are_the_local_ones_to_the_bit(up):
    images = pictures(3)
    prompts = [Prompt("a"), Prompt("fail", {"q": ["é", 1.1, None]}), Prompt("c")]
    local = score_images(Sum(), images, prompts)
    told = [{"text": p.text, "metadata": dict(p.metadata)} for p in prompts]
    answer = post(up, [encode_image(i) for i in images], told).json()
    np.testing.assert_array_equal(np.float32(answer["values"][::2]), local.values[::2])
    assert answer["values"][1] is None
    assert answer["failed"] == [False, True, False]
    assert answer["columns"]["length"] == local.columns["length"]
    assert answer["columns"]["share"] == [float(np.float32(1 / 3)), None, float(np.float32(1 / 3))]
    assert answer["identity"] == CLIENT.get(f"{up}/identity").json()
    assert answer["identity"]["digest"] == Sum.identity.digest


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "1"])
def test_png_arrives_in_its_own_mode(up, mode):
    image = pictures(1)[0].convert(mode)
    answer = post(up, [encode_image(image)], prompts_of(1)).json()
    assert answer["columns"]["mode"] == [mode]
    local = Sum()([image], [Prompt("a cat", {"n": 0})])
    np.testing.assert_array_equal(np.float32(answer["values"]), local.values)


def test_jpeg_is_read_as_pillow_reads_it(up):
    buffer = io.BytesIO()
    pictures(1)[0].save(buffer, "JPEG")
    answer = post(up, [buffer.getvalue()], prompts_of(1)).json()
    local = Sum()([Image.open(buffer)], [Prompt("a cat", {"n": 0})])
    np.testing.assert_array_equal(np.float32(answer["values"]), local.values)


def test_it_is_alive_before_it_is_ready():
    loads = threading.Event()

    def load() -> Sum:
        assert loads.wait(20)
        return Sum()

    with serving(create_app(load)) as url:
        assert CLIENT.get(f"{url}/health").status_code == 200
        for answer in (CLIENT.get(f"{url}/ready"), CLIENT.get(f"{url}/identity"), score(url)):
            assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")
            assert "being loaded" in answer.json()["detail"]
        loads.set()
        wait_for(url)
        assert score(url).json()["values"] == expected(2)


def test_reward_that_cannot_be_loaded_is_said_and_ends_serve():
    def load() -> Sum:
        raise RewardError("no weights")

    with serving(create_app(load)) as url:
        while "being loaded" in (answer := CLIENT.get(f"{url}/ready")).text:
            time.sleep(0.01)
        assert (answer.status_code, "no weights" in answer.text) == (503, True)
    with pytest.raises(ConfigError, match="did you mean 'jpeg_compressibility'"):
        serve("jpeg_compressability", {}, port=0)


def test_it_imports_no_torch_and_no_orchestration():
    code = (
        "import sys, ddpo.rewards.service; print({'torch', 'prefect', 'mlflow'} & {*sys.modules})"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


# What it refuses, and goes on.


GOOD = encode_image(pictures(1)[0])


def png_of(width: int, height: int) -> bytes:
    """A small file that claims a size."""
    header = b"IHDR" + struct.pack(">II", width, height) + GOOD[24:29]
    return GOOD[:12] + header + struct.pack(">I", zlib.crc32(header)) + GOOD[33:]


def gif() -> bytes:
    buffer = io.BytesIO()
    pictures(1)[0].save(buffer, "GIF")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("images", "prompts", "status", "message"),
    [
        ([GOOD, b"garbage"], prompts_of(2), 422, "image 1 is neither PNG nor JPEG"),
        ([GOOD, b""], prompts_of(2), 422, "image 1 is neither"),
        ([gif()], prompts_of(1), 422, "image 0 is neither"),
        ([GOOD, GOOD[: len(GOOD) // 2]], prompts_of(2), 422, "image 1 cannot be decoded"),
        ([GOOD, GOOD[:33]], prompts_of(2), 422, "image 1 is neither"),
        ([GOOD, png_of(10_000, 10_000)], prompts_of(2), 413, "image 1 is 10000x10000"),
        ([png_of(20_000, 20_000)], prompts_of(1), 413, "image 0 has far too many pixels"),
        ([png_of(64, 64)] * 4, prompts_of(4), 413, "16384 pixels together"),
        ([GOOD, GOOD + bytes(20_000)], prompts_of(2), 413, "image 1 has more than 20000 bytes"),
        ([GOOD] * 5, prompts_of(5), 413, "more than 4 images"),
        ([GOOD], prompts_of(1, "a" * 2000), 413, "'prompts' has more than 2000 bytes"),
        ([GOOD], prompts_of(2), 422, "1 images with 2 prompts"),
        ([], prompts_of(1), 422, "expected a part 'prompts'"),
        ([GOOD], b"{", 422, "no JSON array.*the part: Invalid JSON"),
        ([GOOD], b'["a cat"]', 422, "no JSON array.*0: Input should be"),
        ([GOOD], b'{"text": "a"}', 422, "no JSON array"),
        ([GOOD], [{"text": 1}], 422, "0.text: Input should be a valid string"),
        ([GOOD], [{"text": "a", "meta": {}}], 422, "0.meta: Extra inputs"),
        ([GOOD], [{"text": " "}], 422, "prompt 0: .*some words"),
        ([GOOD], b'[{"text": "a", "metadata": {"x": NaN}}]', 422, "prompt 0: .*plain JSON"),
        ([GOOD], b'[{"text": "\\ud800"}]', 422, "no JSON array"),
        ([GOOD], b'[{"text": "a\xff"}]', 422, "no JSON array"),
        ([GOOD], b"[" * 1500, 422, "no JSON array"),
        (
            [GOOD],
            b'[{"text":"a","metadata":{"x":' + b"[" * 300 + b"]" * 300 + b"}}]",
            422,
            "no JSON",
        ),
    ],
)
def test_what_cannot_be_scored_is_refused_and_the_service_goes_on(
    up, images, prompts, status, message
):
    answer = post(up, images, prompts)
    assert answer.status_code == status, answer.text
    assert_says(answer, message)
    assert score(up).json()["values"] == expected(2)


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
PROMPTS = ("prompts", json.dumps(prompts_of(1)).encode())


@pytest.mark.parametrize(
    ("headers", "body", "status", "message"),
    [
        ({"Content-Type": "application/json"}, b"{}", 415, "multipart/form-data"),
        ({}, b"", 415, "multipart/form-data"),
        (
            {"Content-Type": XYZ, "Content-Encoding": "gzip"},
            gzip.compress(b"a", mtime=0),
            415,
            "unencoded",
        ),
        ({"Content-Type": "multipart/form-data"}, b"", 400, "boundary"),
        ({"Content-Type": f"multipart/form-data; boundary={'x' * 71}"}, b"", 400, "1 to 70"),
        ({"Content-Type": XYZ}, b"", 400, "ends before its last boundary"),
        ({"Content-Type": XYZ}, b"garbage", 400, "no multipart form"),
        ({"Content-Type": XYZ}, multipart(PROMPTS, ("images", GOOD), end=""), 400, "ends before"),
        ({"Content-Type": XYZ}, multipart(PROMPTS, PROMPTS), 422, "two parts 'prompts'"),
        ({"Content-Type": XYZ}, multipart(PROMPTS, ("picture", GOOD)), 422, "called 'picture'"),
        ({"Content-Type": XYZ}, b"--xyz\r\n\r\na\r\n--xyz--\r\n", 422, "called ''"),
        ({"Content-Type": XYZ}, multipart(), 422, "expected a part 'prompts'"),
        ({"Content-Type": XYZ}, bytes(50_001), 413, "more than 50000 bytes"),
    ],
)
def test_body_that_is_no_form_is_refused(up, headers, body, status, message):
    answer = CLIENT.post(f"{up}/score", headers=headers, content=body)
    assert answer.status_code == status, answer.text
    assert_says(answer, message)
    assert score(up).json()["values"] == expected(2)


def test_a_form_is_read_however_it_is_cut(up):
    body = multipart(("images", GOOD), PROMPTS, ("images", b"\r\n--xy"))
    for size in (1, 2, 7, 64, len(body)):
        read = form_reader.Form(b"xyz", SMALL)
        for start in range(0, len(body), size):
            read.write(body[start : start + size])
        assert (read.complete, read.images, read.prompts) == (True, [GOOD, b"\r\n--xy"], PROMPTS[1])
    body = multipart(("images", GOOD), PROMPTS)
    pieces = (body[start : start + 7] for start in range(0, len(body), 7))  # sent chunked
    answer = CLIENT.post(f"{up}/score", headers={"Content-Type": XYZ}, content=pieces)
    assert answer.json()["values"] == expected(1)


@contextmanager
def connection(url: str, headers: str) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", urlsplit(url).port), timeout=10) as open_:
        head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: {XYZ}\r\n{headers}\r\n\r\n"
        open_.sendall(head.encode())
        yield open_


@pytest.mark.parametrize("sizes", [[20_001], [19_000, 19_000, 19_000]])
def test_too_long_a_body_is_refused_while_it_comes_in(up, sizes, monkeypatch):
    monkeypatch.setattr(drain, "_DRAIN_S", 0.2)
    with connection(up, "Transfer-Encoding: chunked") as sending:
        for size in sizes:
            piece = multipart(("images", bytes(size)), end="")[: -len("--xyz")]
            sending.sendall(f"{len(piece):x}\r\n".encode() + piece + b"\r\n")
        assert b"413" in sending.recv(100)  # with no end in sight
    assert score(up).json()["values"] == expected(2)


def test_too_long_a_body_is_refused_by_what_it_claims(up, monkeypatch):
    monkeypatch.setattr(drain, "_DRAIN_S", 0.2)
    with connection(up, "Content-Length: 10000000000") as claiming:
        assert b"413" in claiming.recv(100)  # before a byte of it


@pytest.mark.parametrize(
    ("header", "size", "status"),
    [("X: y", 3_900_000, b"401"), (f"Authorization: Bearer {TOKEN}", 7_000_000, b"413")],
)
def test_client_that_sends_all_before_it_listens_gets_the_answer_and_no_reset(
    header, size, status, monkeypatch
):
    monkeypatch.setattr(drain, "_DRAIN_S", 30.0)  # a busy machine is slow to read on
    with serving(create_app(Sum, limits=replace(SMALL, body_bytes=4_000_000), token=TOKEN)) as url:
        wait_for(url)
        with connection(url, f"{header}\r\nConnection: close\r\nContent-Length: {size}") as sending:
            sending.sendall(bytes(size))
            assert status in sending.recv(100)


def test_body_that_does_not_come_in_time_is_given_up(monkeypatch):
    monkeypatch.setattr(drain, "_DRAIN_S", 0.1)
    with serving(create_app(Sum, limits=replace(SMALL, body_seconds=0.2))) as url:
        wait_for(url)
        with connection(url, "Content-Length: 1000") as sending:
            assert b"408" in sending.recv(100)
        assert score(url).json()["values"] == expected(2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("raise", r"reward sum-\w{8} raised ValueError: no such \? thing"),
        ("exit", "the reward called exit: 3"),
        ("too few", "returned 1 scores for 2 images"),
        ("object", "a column of reward sum-.*JSON cannot say"),
        ("infinite", "a column of reward sum-.*JSON cannot say"),
    ],
)
def test_reward_that_fails_is_answered_by_its_message_alone(up, text, message, caplog):
    # What is logged is no Unicode either, and pytest's processes tell each other what was logged.
    caplog.set_level(logging.CRITICAL, service.__name__)
    answer = score(up, text=text)
    assert answer.status_code == 500
    assert_says(answer, message)
    assert "Traceback" not in answer.text and ".py" not in answer.text
    assert score(up).json()["values"] == expected(2)


# The token.


@pytest.mark.parametrize(
    "header", [None, f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Bearer", "Bearer é", TOKEN]
)
def test_without_the_right_token_there_are_no_scores_and_no_identity(header, caplog):
    caplog.set_level(logging.DEBUG)
    headers = {} if header is None else {"Authorization": header.encode()}
    with serving(create_app(Sum, token=TOKEN)) as url:
        wait_for(url)  # open to all, as is /health
        assert CLIENT.get(f"{url}/health").status_code == 200
        for answer in (
            CLIENT.get(f"{url}/identity", headers=headers),
            post(url, [GOOD], prompts_of(1), headers=headers),
        ):
            assert answer.status_code == 401
            assert answer.headers["WWW-Authenticate"] == "Bearer"
            assert TOKEN not in answer.text
        right = {"Authorization": f"Bearer {TOKEN}"}
        assert post(url, [GOOD], prompts_of(1), headers=right).json()["values"] == expected(1)
        assert TOKEN not in CLIENT.get(f"{url}/openapi.json").text
    assert TOKEN not in caplog.text


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.0.2.1", "example.org"])
def test_nothing_but_loopback_is_served_without_a_token(host, monkeypatch):
    monkeypatch.delenv("DDPO_REWARD_TOKEN", raising=False)
    with pytest.raises(ConfigError, match="no token; set the environment variable DDPO_REWARD_TO"):
        serve("jpeg_compressibility", {}, host=host, port=0)
    monkeypatch.setenv("DDPO_REWARD_TOKEN", " ")
    with pytest.raises(ConfigError, match="no token"):
        serve("jpeg_compressibility", {}, host=host, port=0)


def test_token_that_no_header_carries_is_refused_unquoted(monkeypatch):
    monkeypatch.setenv("DDPO_REWARD_TOKEN", f"{TOKEN} {TOKEN}")
    with pytest.raises(ConfigError, match="no bearer token") as caught:
        serve("jpeg_compressibility", {}, port=0)
    assert TOKEN not in str(caught.value)


def test_port_that_is_taken_is_said(up):
    with pytest.raises(ConfigError, match=r"cannot listen on port \d+ of 127.0.0.1: .*in use"):
        serve("jpeg_compressibility", {}, port=urlsplit(up).port or 0)


# Many at once.


def test_64_requests_at_once_are_all_answered_rightly_and_scored_one_at_a_time(reward):
    with serving(create_app(lambda: reward)) as url, ThreadPoolExecutor(64) as pool:
        wait_for(url)
        reward.go.clear()
        answers = [pool.submit(score, url, 1 + n % 5, f"cat {n}", seed=n) for n in range(64)]
        time.sleep(0.3)
        reward.go.set()
        for n, answer in enumerate(answers):
            assert answer.result().json()["values"] == expected(1 + n % 5, f"cat {n}", seed=n)
    assert (reward.calls, reward.most_at_once) == (64, 1)


def test_workers_score_at_the_same_time(reward):
    limits = Limits(workers=3)
    with serving(create_app(lambda: reward, limits=limits)) as url, ThreadPoolExecutor(8) as pool:
        wait_for(url)
        reward.go.clear()
        answers = [pool.submit(score, url) for _ in range(8)]
        while reward.at_once < 3:
            time.sleep(0.01)
        reward.go.set()
        assert all(answer.result().json()["values"] == expected(2) for answer in answers)
    assert reward.most_at_once == 3


def test_full_queue_is_said_at_once_and_frees_itself(reward):
    limits = Limits(queue=2)
    with serving(create_app(lambda: reward, limits=limits)) as url, ThreadPoolExecutor(8) as pool:
        wait_for(url)
        reward.go.clear()
        pending = [pool.submit(score, url) for _ in range(8)]
        while sum(answer.done() for answer in pending) < 5:
            time.sleep(0.01)
        refused = [answer.result() for answer in pending if answer.done()]
        assert {(r.status_code, r.headers["Retry-After"]) for r in refused} == {(503, "1")}
        reward.go.set()
        statuses = sorted(answer.result().status_code for answer in pending)
        assert statuses == [200] * 3 + [503] * 5
        assert score(url).json()["values"] == expected(2)


def test_requests_that_wait_hold_a_bounded_memory(reward):
    limits = Limits(held_bytes=3000)
    with serving(create_app(lambda: reward, limits=limits)) as url, ThreadPoolExecutor(1) as pool:
        wait_for(url)
        reward.go.clear()
        first = pool.submit(score, url)
        while not reward.at_once:
            time.sleep(0.01)
        assert "fill the memory" in score(url).text
        reward.go.set()
        assert first.result().json()["values"] == expected(2)
        assert score(url).json()["values"] == expected(2)


def test_request_whose_client_has_gone_is_not_scored(reward):
    with serving(create_app(lambda: reward)) as url, ThreadPoolExecutor(1) as pool:
        wait_for(url)
        reward.go.clear()
        first = pool.submit(score, url)
        while not reward.at_once:
            time.sleep(0.01)
        with pytest.raises(httpx.ReadTimeout):
            CLIENT.post(f"{url}/score", files=form([GOOD], prompts_of(1)), timeout=0.3)
        time.sleep(0.2)
        reward.go.set()
        assert first.result().status_code == 200
        assert score(url).status_code == 200
    assert reward.calls == 2


# Against its own OpenAPI page, and against bytes of any kind.

FEW = settings(
    max_examples=60,
    deadline=None,
    database=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_it_keeps_to_its_openapi_page(up, mode):
    """Forms of pictures and prompts as the page has them, and as it forbids them."""
    assert CLIENT.get(f"{up}/docs").status_code == 200
    schema = schemathesis.openapi.from_url(f"{up}/openapi.json")
    statuses: set[int] = set()

    @FEW
    @given(case=schema["/score"]["POST"].as_strategy(generation_mode=mode))
    def keeps_to_it(case):
        answer = case.call()
        case.validate_response(answer, checks=CHECKS)
        statuses.add(answer.status_code)

    keeps_to_it()
    assert 422 in statuses
    assert statuses <= (
        {200, 413, 422} if mode == GenerationMode.POSITIVE else {400, 413, 415, 422}
    )
    assert score(up).json()["values"] == expected(2)


def test_its_other_pages_are_as_the_openapi_page_says(up):
    schema = schemathesis.openapi.from_url(f"{up}/openapi.json")
    for path in ("/health", "/ready", "/identity"):
        case = schema[path]["GET"].Case()
        answer = case.call()
        assert answer.status_code == 200
        case.validate_response(answer, checks=CHECKS)


WHOLE = multipart(PROMPTS, ("images", GOOD))


@settings(FEW, max_examples=100)
@given(
    cuts=st.lists(
        st.tuples(st.integers(0, len(WHOLE)), st.integers(0, 40), st.binary(max_size=12)),
        min_size=1,
        max_size=4,
    )
)
def test_damaged_requests_are_refused_or_scored_and_never_end_it(up, cuts):
    body = bytearray(WHOLE)
    for start, length, instead in cuts:
        body[start : start + length] = instead
    answer = CLIENT.post(f"{up}/score", headers={"Content-Type": XYZ}, content=bytes(body))
    assert answer.status_code in (200, 400, 413, 422), answer.text
    assert set(answer.json()) in ({"detail"}, {"values", "failed", "columns", "identity"})


def test_what_the_page_calls_a_request_is_one(up):
    page = CLIENT.get(f"{up}/openapi.json").json()
    told = page["paths"]["/score"]["post"]["requestBody"]["content"]["multipart/form-data"]
    assert set(told["schema"]["properties"]) == {"prompts", "images"}
    assert told["schema"]["properties"]["images"]["maxItems"] == SMALL.images
    assert set(page["paths"]["/score"]["post"]["responses"]) == {
        *("200", "400", "401", "408", "413", "415", "422", "500", "503")
    }
