"""Workers that are processes of this machine, each with a GPU of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from ddpo.config import ProcessesEngine
from ddpo.errors import ConfigError
from ddpo_workflow.tasks.engines import remote
from ddpo_workflow.tasks.engines.base import WorkerLost, check_number
from ddpo_workflow.tasks.engines.pool import Pool

_EVENTS_S = 0.2
"""How often the events of a worker are received, in seconds."""
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


def process_pool(config: ProcessesEngine, device: str, trusted: tuple[str, ...]) -> ProcessPool:
    """Return an engine of processes, which start when they are first needed.

    Args:
        config: The engine's settings.
        device: The run's kind of device.
        trusted: Digests of the settings that this process trusts.

    Raises:
        ConfigError: More are asked for than there are GPUs, or no number where there is none.
    """
    check_number(config.workers, device)
    workers = config.workers
    if device != "cuda":
        assert workers is not None
        return ProcessPool([ProcessWorker(number, trusted) for number in range(workers)])
    gpus = _visible_gpus()
    if workers is not None and workers > len(gpus):
        raise ConfigError(
            f"engine.workers is {workers}, but this machine shows {len(gpus)} GPUs; set it to at "
            "most that, or leave it out"
        )
    return ProcessPool(
        [ProcessWorker(number, trusted, gpu) for number, gpu in enumerate(gpus[:workers])]
    )


class ProcessPool(Pool):
    """An engine of processes.

    Args:
        workers: The processes.
    """

    def __init__(self, workers: Sequence[ProcessWorker]) -> None:
        super().__init__(workers, self._meet)
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    @contextmanager
    def _meet(self) -> Iterator[str]:
        # Kept until the workers have ended: a rank that leaves late waits for a file that is gone.
        self._folder = self._folder or tempfile.TemporaryDirectory(prefix="ddpo-")
        yield f"file://{self._folder.name}/{uuid.uuid4().hex}"

    def close(self) -> None:
        """End all processes."""
        super().close()
        if self._folder is not None:
            self._folder.cleanup()


def _visible_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    if os.environ.get(_VISIBLE):
        return os.environ[_VISIBLE].split(",")
    import torch

    return [str(number) for number in range(torch.cuda.device_count())]


@dataclass(frozen=True)
class _Running:
    executor: ProcessPoolExecutor
    pid: int
    events: Connection


class ProcessWorker:
    """One process, started by spawn at the first call, and again after it was lost.

    Args:
        number: From 0.
        trusted: Digests of the settings that this process trusts.
        gpu: The GPU that it sees, as CUDA_VISIBLE_DEVICES names it; None to leave that as it is.
    """

    def __init__(self, number: int, trusted: tuple[str, ...], gpu: str | None = None) -> None:
        self._name = f"worker process {number}"
        self._begin = (trusted, gpu)
        self._running: _Running | None = None
        self._closed = False

    def run(self, call: Callable[[], Any]) -> Any:
        """Run a call; see `Worker.run`."""
        try:
            running = self._running = self._running or self._start()
            future = running.executor.submit(remote.run_here, call)
            self._wait(future, running)
            outcome = future.result()
        except (BrokenProcessPool, RuntimeError) as error:
            # A RuntimeError if the executor was shut down by `close` just before.
            self.end()
            raise WorkerLost(self._name, str(error)) from error
        return outcome.result()

    def _start(self) -> _Running:
        if self._closed:
            raise RuntimeError("the run has ended")
        context = multiprocessing.get_context("spawn")
        receiver, sender = context.Pipe(duplex=False)
        executor = ProcessPoolExecutor(
            1, mp_context=context, initializer=_begin, initargs=(sender, *self._begin)
        )
        pid = executor.submit(os.getpid).result()
        sender.close()  # the worker has its own: its end is the end of the events
        return _Running(executor, pid, receiver)

    def _wait(self, future: Future[Any], running: _Running) -> None:
        """Wait for a call, and receive its events in this thread, whose flow run they belong to."""
        done = False
        while not done:
            done = bool(wait([future], timeout=_EVENTS_S).done)
            with suppress(EOFError, OSError):  # the worker is lost, as the future says
                while running.events.poll():
                    remote.receive(running.events.recv())

    def close(self) -> None:
        """End the process for good; see `Worker.close`."""
        self._closed = True
        self.end()

    def end(self) -> None:
        """End the process; see `Worker.end`."""
        running, self._running = self._running, None
        if running is not None:
            with suppress(ProcessLookupError):
                os.kill(running.pid, signal.SIGKILL)  # it commits all of its work at once
            running.executor.shutdown(wait=False, cancel_futures=True)
            running.events.close()


def _begin(sender: Connection, trusted: tuple[str, ...], gpu: str | None) -> None:
    """Prepare a worker's process."""
    if gpu is not None:
        os.environ[_VISIBLE] = gpu
    os.environ["GLOO_SOCKET_IFNAME"] = _LOOPBACK  # ranks are on this machine
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the flow ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    lock = threading.Lock()

    def send(event: remote.Event) -> None:
        with lock, suppress(OSError):  # the flow has gone
            sender.send(event)

    remote.begin(send, trusted)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
