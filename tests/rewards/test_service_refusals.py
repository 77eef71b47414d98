"""What the reward service refuses by a clear status; and it goes on."""

from __future__ import annotations

import gzip
import io
import logging
import socket
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from urllib.parse import urlsplit

import pytest

from ddpo.rewards import service
from ddpo.rewards.service import drain
from ddpo.rewards.service import form as form_reader
from ddpo.rewards.service.app import create_app
from tests.rewards.served import (
    CLIENT,
    GOOD,
    SMALL,
    TOKEN,
    TOLD,
    XYZ,
    Sum,
    assert_says,
    expected,
    multipart,
    pictures,
    post,
    prompts_of,
    score,
    serving,
    wait_for,
)


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
        ([GOOD, GOOD[: len(GOOD) // 2]], prompts_of(2), 422, "cannot decode image 1"),
        ([GOOD, GOOD[:33]], prompts_of(2), 422, "image 1 is neither"),
        ([GOOD, png_of(10_000, 10_000)], prompts_of(2), 413, "image 1 is 10000x10000"),
        ([png_of(20_000, 20_000)], prompts_of(1), 413, "image 0 has far too many pixels"),
        ([png_of(64, 64)] * 4, prompts_of(4), 413, "16384 pixels in total"),
        ([GOOD, GOOD + bytes(20_000)], prompts_of(2), 413, "image 1 has more than 20000 bytes"),
        ([GOOD] * 5, prompts_of(5), 413, "more than 4 images"),
        ([GOOD], prompts_of(1, "a" * 2000), 413, "'prompts' has more than 2000 bytes"),
        ([GOOD], prompts_of(2), 422, "1 images with 2 prompts"),
        ([], prompts_of(1), 422, "expected a part 'prompts'"),
        ([GOOD], b"{", 422, "not a JSON array.*the part: Invalid JSON"),
        ([GOOD], b'["a cat"]', 422, "not a JSON array.*0: Input should be"),
        ([GOOD], b'{"text": "a"}', 422, "not a JSON array"),
        ([GOOD], [{"text": 1}], 422, "0.text: Input should be a valid string"),
        ([GOOD], [{"text": "a", "meta": {}}], 422, "0.meta: Extra inputs"),
        ([GOOD], [{"text": " "}], 422, "prompt 0: .*not blank"),
        ([GOOD], b'[{"text": "a", "metadata": {"x": NaN}}]', 422, "prompt 0: .*plain JSON"),
        ([GOOD], b'[{"text": "\\ud800"}]', 422, "not a JSON array"),
        ([GOOD], b'[{"text": "a\xff"}]', 422, "not a JSON array"),
        ([GOOD], b"[" * 1500, 422, "not a JSON array"),
        (
            [GOOD],
            b'[{"text":"a","metadata":{"x":' + b"[" * 300 + b"]" * 300 + b"}}]",
            422,
            "not a JSON",
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
        ({"Content-Type": XYZ}, b"garbage", 400, "not a multipart form"),
        (
            {"Content-Type": XYZ},
            multipart(TOLD, ("images", GOOD), end=""),
            400,
            "ends before",
        ),
        ({"Content-Type": XYZ}, multipart(TOLD, TOLD), 422, "two parts 'prompts'"),
        (
            {"Content-Type": XYZ},
            multipart(TOLD, ("picture", GOOD)),
            422,
            "named 'picture'",
        ),
        ({"Content-Type": XYZ}, b"--xyz\r\n\r\na\r\n--xyz--\r\n", 422, "named ''"),
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
    body = multipart(("images", GOOD), TOLD, ("images", b"\r\n--xy"))
    for size in (1, 2, 7, 64, len(body)):
        read = form_reader.Form(b"xyz", SMALL)
        for start in range(0, len(body), size):
            read.write(body[start : start + size])
        assert (read.complete, read.images, read.prompts) == (
            True,
            [GOOD, b"\r\n--xy"],
            TOLD[1],
        )
    body = multipart(("images", GOOD), TOLD)
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
        ("exit", r"reward sum-\w{8} raised SystemExit: 3"),
        ("too few", "returned 1 scores for 2 images"),
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
