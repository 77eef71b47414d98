"""A loopback HTTP proxy before a real S3 server, which plants faults by a plan."""

from __future__ import annotations

import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from typing import Literal
from urllib.parse import urlsplit

from tests.servers import ObjectStore

UPSTREAM_LIMIT_S = 60.0
REFUSALS = {
    "slow_down": ("503 Slow Down", "SlowDown", "Please reduce your request rate."),
    "no_such_upload": ("404 Not Found", "NoSuchUpload", "The upload may have been completed."),
}
"""Status, code and message of what is answered without asking the server."""

Kind = Literal["lost_reply", "slow_down", "reset", "stall", "cut", "no_such_upload"]


@dataclass(frozen=True)
class Fault:
    """What goes wrong, and with which requests.

    Attributes:
        kind: `lost_reply`: done upstream, and the connection closed without an answer; `slow_down`:
            S3's own 503, not forwarded; `reset`: a TCP reset, not forwarded; `stall`: nothing for a
            time, then forwarded; `cut`: the body of the answer ends in its middle;
            `no_such_upload`: 404 for an upload in parts, not forwarded.
        every: Of the matching requests each one whose number this divides; 0 for none.
        at: And of the matching requests those of these numbers, from 1.
        methods: A request matches if its method is one of these; by default all do.
        stall_s: How long a `stall` lasts, and how long a `cut` body stands still before it ends.
    """

    kind: Kind
    every: int = 0
    at: Sequence[int] = ()
    methods: tuple[str, ...] = ()
    stall_s: float = 0.0


class Plan:
    """The faults of one proxy, and what came of them.

    Attributes:
        requests: How many requests came in, by method; those that a fault hit too.
        planted: How many faults were planted, by kind.
    """

    def __init__(self, *faults: Fault) -> None:
        self.requests: Counter[str] = Counter()
        self.planted: Counter[str] = Counter()
        self._faults = faults
        self._matched: Counter[Fault] = Counter()
        self._lock = threading.Lock()

    def fault_of(self, method: str) -> Fault | None:
        """Count a request, and return the fault that it gets."""
        with self._lock:
            self.requests[method] += 1
            due: Fault | None = None
            for fault in self._faults:
                if fault.methods and method not in fault.methods:
                    continue
                self._matched[fault] += 1
                number = self._matched[fault]
                if number in fault.at or (fault.every and number % fault.every == 0):
                    due = due or fault
            return due

    def count(self, fault: Fault) -> None:
        """Count a fault that was planted."""
        with self._lock:
            self.planted[fault.kind] += 1


@contextmanager
def fault_proxy(upstream: ObjectStore, plan: Plan) -> Iterator[ObjectStore]:
    """Run a proxy until the block ends; nobody listens there afterwards.

    Args:
        upstream: The server behind it.
        plan: Which requests get which fault; counts them.

    Yields:
        The same server with the proxy's address.
    """
    address = urlsplit(upstream.endpoint_url)
    assert address.hostname and address.port
    proxy = _Proxy((address.hostname, address.port), plan)
    try:
        endpoint = f"http://127.0.0.1:{proxy.port}"
        yield ObjectStore(endpoint, upstream.access_key, upstream.secret_key)
    finally:
        proxy.close()


@dataclass(frozen=True)
class _Message:
    """A request or an answer, byte for byte."""

    head: bytes
    """Up to the empty line, which is part of it."""
    body: bytes
    """With the marks of its chunks, if it came in such."""
    ends_with_connection: bool

    @property
    def method(self) -> str:
        return self.head.split(b" ", 1)[0].decode()


class _Proxy:
    """Accepts connections in one thread, and serves each in one of its own."""

    def __init__(self, upstream: tuple[str, int], plan: Plan) -> None:
        self._upstream = upstream
        self._plan = plan
        self._closed = threading.Event()
        self._connections: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._closed.set()
        # Wakes the thread in `accept`, which closing alone does not.
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        with self._lock:
            for connection in self._connections:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while not self._closed.is_set():
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._serve, args=[connection], daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with self._lock:
            self._connections.add(connection)
        try:
            # A client that went away, for its time was up, is none of the proxy's errors.
            with closing(connection), connection.makefile("rb") as incoming, suppress(OSError):
                while self._serve_one(connection, incoming):
                    pass
        finally:
            with self._lock:
                self._connections.discard(connection)

    def _serve_one(self, connection: socket.socket, incoming: BufferedReader) -> bool:
        """Serves one request; returns whether the connection lives on."""
        request = _read_request(connection, incoming)
        if request is None or self._closed.is_set():
            return False
        fault = self._plan.fault_of(request.method)
        if fault is None:
            return self._pass_on(connection, request)
        if fault.kind == "cut":
            return self._cut(connection, request, fault)
        self._plan.count(fault)
        if fault.kind == "reset":
            # Closing sends RST, and not FIN, if the kernel is not to linger.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return False
        if fault.kind in REFUSALS:
            connection.sendall(_refusal(request.method, *REFUSALS[fault.kind]))
            return not request.ends_with_connection
        if fault.kind == "lost_reply":
            self._forward(request)
            return False
        if self._closed.wait(fault.stall_s):
            return False
        return self._pass_on(connection, request)

    def _pass_on(self, connection: socket.socket, request: _Message) -> bool:
        answer = self._forward(request)
        connection.sendall(answer.head + answer.body)
        return not (request.ends_with_connection or answer.ends_with_connection)

    def _cut(self, connection: socket.socket, request: _Message, fault: Fault) -> bool:
        answer = self._forward(request)
        if answer.body:
            self._plan.count(fault)
        connection.sendall(answer.head + answer.body[: len(answer.body) // 2])
        if answer.body:
            self._closed.wait(fault.stall_s)
        return not answer.body and not request.ends_with_connection

    def _forward(self, request: _Message) -> _Message:
        with (
            socket.create_connection(self._upstream, timeout=UPSTREAM_LIMIT_S) as server,
            server.makefile("rb") as answers,
        ):
            server.sendall(request.head + request.body)
            return _read_answer(answers, request.method)


def _refusal(method: str, status: str, code: str, message: str) -> bytes:
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}"
    return f"{head}\r\n\r\n{'' if method == 'HEAD' else body}".encode()


def _read_request(connection: socket.socket, incoming: BufferedReader) -> _Message | None:
    head = _read_head(incoming)
    if not head:
        return None
    fields = _fields(head)
    if fields.get("expect", "").lower() == "100-continue":
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = _read_body(incoming, fields, to_end=False)
    return _Message(head, body, ends_with_connection=fields.get("connection") == "close")


def _read_answer(answers: BufferedReader, method: str) -> _Message:
    while True:
        head = _read_head(answers)
        if not head:
            raise ConnectionError("the server closed the connection without an answer")
        status = int(head.split(b" ", 2)[1])
        if status >= 200:  # those below announce another answer
            break
    fields = _fields(head)
    if method == "HEAD" or status in (204, 304):
        body = b""
    else:
        body = _read_body(answers, fields, to_end=True)
    return _Message(head, body, ends_with_connection=fields.get("connection") == "close")


def _read_head(file: BufferedReader) -> bytes:
    lines = []
    while line := file.readline():
        lines.append(line)
        if line == b"\r\n":
            return b"".join(lines)
    return b""


def _fields(head: bytes) -> dict[str, str]:
    pairs = [line.split(":", 1) for line in head.decode("latin-1").split("\r\n")[1:] if line]
    return {name.strip().lower(): value.strip() for name, value in pairs}


def _read_body(file: BufferedReader, fields: dict[str, str], *, to_end: bool) -> bytes:
    if fields.get("transfer-encoding", "").lower() == "chunked":
        return _read_chunks(file)
    if "content-length" in fields:
        size = int(fields["content-length"])
        body = file.read(size)
        if len(body) < size:
            raise ConnectionError("the connection ended within a body")
        return body
    return file.read() if to_end else b""


def _read_chunks(file: BufferedReader) -> bytes:
    parts = []
    while True:
        size = file.readline()
        parts.append(size)
        if int(size.split(b";")[0], 16) == 0:
            break
        parts.append(file.read(int(size.split(b";")[0], 16) + 2))
    while (line := file.readline()) not in (b"\r\n", b""):  # fields after the last chunk
        parts.append(line)
    return b"".join([*parts, line])
