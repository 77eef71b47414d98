"""Workers that are actors of a Ray cluster.

Actors, because Ray ends the process of a task that used a GPU after it, and each would load the
base model again. Tasks stay in the flow's process and call the actors, so that no node has to reach
the Prefect server.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from ddpo.config import RayEngine
from ddpo.errors import ConfigError, DdpoError
from ddpo_workflow.tasks.engines import remote
from ddpo_workflow.tasks.engines.base import WorkerLost, check_number
from ddpo_workflow.tasks.engines.pool import Pool

_PLACED_S = 300.0
"""How long an actor may wait for a node with room for it, in seconds."""


class RayPool(Pool):
    """An engine of Ray actors.

    Args:
        workers: The actors.
        started: Whether the cluster was started for them, and ends with them.
    """

    def __init__(self, workers: list[RayWorker], *, started: bool) -> None:
        super().__init__(workers, _meeting)
        self._started = started

    def close(self) -> None:
        """End all actors, and the cluster if it was started for them."""
        super().close()
        if self._started:
            _ray().shutdown()


class RayWorker:
    """One actor, started at the first call, and again, perhaps on another node, after it was lost.

    Args:
        number: From 0.
        gpus: How many GPUs it uses.
        trusted: Digests of the settings that this process trusts.
    """

    def __init__(self, number: int, gpus: int, trusted: tuple[str, ...]) -> None:
        self._name = f"Ray actor {number}"
        self._gpus = gpus
        self._trusted = trusted
        self._actor: Any = None
        self._closed = False

    def run(self, call: Callable[[], Any]) -> Any:
        """Run a call; see `Worker.run`."""
        ray = _ray()
        try:
            actor = self._actor = self._actor or self._start()
            outcome, events = ray.get(actor.run.remote(call))
        except ray.exceptions.RayTaskError as error:
            raise DdpoError(
                f"{self._name} cannot run the tasks of this release: {error.cause!r}. "
                "Install ddpo, its extra ray, and what the run's config names, on every node"
            ) from error
        except ray.exceptions.RayError as error:
            self.end()
            raise WorkerLost(self._name, str(error).strip().partition("\n")[0]) from error
        for event in events:
            remote.receive(event)
        return outcome.result()

    def _start(self) -> Any:
        if self._closed:
            raise WorkerLost(self._name, "the run has ended")
        ray = _ray()
        actor = ray.remote(num_cpus=1, num_gpus=self._gpus)(_Actor).remote(self._trusted)
        try:
            ray.get(actor.ready.remote(), timeout=_PLACED_S)
        except ray.exceptions.GetTimeoutError as error:
            ray.kill(actor)
            reason = f"no node had room for it for {_PLACED_S:.0f} s"
            raise WorkerLost(self._name, reason) from error
        return actor

    def end(self) -> None:
        """End the actor; see `Worker.end`."""
        actor, self._actor = self._actor, None
        if actor is not None:
            _ray().kill(actor)

    def close(self) -> None:
        """End the actor for good; see `Worker.close`."""
        self._closed = True
        self.end()


class _Actor:
    """Runs in a process of the cluster."""

    def __init__(self, trusted: tuple[str, ...]) -> None:
        self._events: list[remote.Event] = []
        remote.begin(self._events.append, trusted)

    def ready(self) -> None:
        """Tell that the process has started."""

    def run(self, call: Callable[[], Any]) -> tuple[remote.Outcome, list[remote.Event]]:
        """Run a call; return how it ended, and what it logged and reported meanwhile."""
        self._events.clear()
        outcome = remote.run_here(call)
        return outcome, list(self._events)


def check_ray(config: RayEngine, device: str) -> None:
    """Check what can be checked before a cluster is joined or started.

    Args:
        config: The engine's settings.
        device: The run's kind of device.

    Raises:
        ConfigError: Ray is not installed, or the number of actors is missing.
    """
    try:
        _ray()
    except ImportError as error:
        raise ConfigError(
            "engine: ray needs Ray; install it by: pip install 'ddpo[ray]'"
        ) from error
    check_number(config.workers, device)


def ray_pool(config: RayEngine, device: str, trusted: tuple[str, ...]) -> RayPool:
    """Return an engine of actors on a cluster, which is joined, or started on this machine.

    Args:
        config: The engine's settings.
        device: The run's kind of device.
        trusted: Digests of the settings that this process trusts.

    Raises:
        ConfigError: As `check_ray`; or the cluster has too few GPUs or CPUs.
        DdpoError: The cluster cannot be reached.
    """
    check_ray(config, device)
    ray, resource = _ray(), "GPU" if device == "cuda" else "CPU"
    started = not ray.is_initialized()
    if started:
        _join(config.address)
    there = int(ray.cluster_resources().get(resource, 0))
    workers = there if config.workers is None else config.workers
    if not 0 < workers <= there:
        if started:
            ray.shutdown()
        raise ConfigError(
            f"engine.workers is {workers}, but the Ray cluster has {there} {resource}s; set it to "
            "at most that, or add nodes"
        )
    gpus = 1 if resource == "GPU" else 0
    return RayPool([RayWorker(number, gpus, trusted) for number in range(workers)], started=started)


@contextmanager
def _meeting() -> Iterator[str]:
    """Let the ranks meet at this process, which all nodes reach as part of the cluster."""
    from torch.distributed import TCPStore

    host = _ray().util.get_node_ip_address()
    store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
    yield f"tcp://{host}:{store.port}"


def _join(address: str | None) -> None:
    """Join a cluster, or start one that is reached from this machine alone."""
    alone: dict[str, Any] = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    try:
        _ray().init(
            address=address or "local",
            configure_logging=False,
            log_to_driver=False,
            **({} if address else alone),
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        raise DdpoError(
            f"engine.address: the Ray cluster {address or 'of this machine'} cannot be joined: "
            f"{str(error).strip()}. Start one (ray start --head), or leave the address out"
        ) from error


def _ray() -> Any:
    """Return Ray, an extra, which must not report how it is used."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    return ray
