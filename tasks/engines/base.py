"""What an engine promises, and what it needs of a worker."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ParamSpec, Protocol, TypeVar

from ddpo.errors import ConfigError, DdpoError

P = ParamSpec("P")
R = TypeVar("R")


class WorkerLost(DdpoError):
    """A worker ended in the middle of a call; what it had committed is kept."""

    def __init__(self, worker: str, reason: str) -> None:
        self.worker = worker
        self.reason = reason
        super().__init__(
            f"{worker} ended in the middle of a task: {reason}. If it ran out of memory, lower "
            "numerics.sample_batch_size or numerics.micro_batch_size, or use fewer workers "
            "(engine.workers); what is committed is kept, so resume the run then"
        )


@dataclass(frozen=True)
class Seat:
    """One rank's place in a computation that all workers run together."""

    rank: int
    """From 0."""
    size: int
    """Number of ranks."""
    meeting: str
    """Where they meet: `file://PATH`, or `tcp://HOST:PORT` of a `torch.distributed.TCPStore`."""


ALONE = Seat(0, 1, "")
"""The place of a process that computes by itself."""


def check_number(workers: int | None, device: str) -> None:
    """Check that the number of workers is given where it has no default.

    Args:
        workers: The config's `engine.workers`.
        device: The run's kind of device.

    Raises:
        ConfigError: It is not.
    """
    if workers is None and device != "cuda":
        raise ConfigError(
            f"engine.workers is missing: by default there is one worker per GPU, but the run "
            f"computes on {device}. Set it, such as --set engine.workers=2"
        )


class Engine(Protocol):
    """Runs functions where there is a device and a model."""

    @property
    def workers(self) -> int:
        """How many functions run at the same time."""
        ...

    def call(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a function on a worker that is idle, and wait for it.

        Args:
            function: A function of a module. If its worker is lost, it is called again on another
                one, so it commits all of its work at once.
            args: Its arguments; small, since they may travel to another machine.
            kwargs: More of them, by name.

        Returns:
            What the function returns.

        Raises:
            WorkerLost: Its worker was lost, again and again.
            Exception: What the function raises.
        """
        ...

    def together(self, function: Callable[..., R], *args: Any) -> R:
        """Run a function on all workers at once, as the ranks of one computation.

        Args:
            function: A function of a module, which is given its `Seat` and then ``args``. If a
                worker is lost, it is called again on all of them.
            args: More arguments; small.

        Returns:
            What the function returns on rank 0.

        Raises:
            WorkerLost: A worker was lost, again and again.
            Exception: What the function raises on one of the ranks.
        """
        ...

    def close(self) -> None:
        """End all workers, in the middle of a call if there is one."""
        ...


class Worker(Protocol):
    """A process that keeps a model loaded, one call at a time."""

    def run(self, call: Callable[[], Any]) -> Any:
        """Run a call, which can be pickled, and wait for it; the process starts if it has not.

        Raises:
            WorkerLost: The process ended before the function did.
            Exception: What the function raises.
        """
        ...

    def end(self) -> None:
        """End the process: a call in it ends with `WorkerLost`, the next one starts it again."""
        ...

    def close(self) -> None:
        """End the process for good."""
        ...
