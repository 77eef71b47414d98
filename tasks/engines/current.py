"""The engine of the run that a flow is working on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

from ddpo.basics.trust import is_trusted
from ddpo.config import AnyEngine, LocalEngine, ProcessesEngine, RayEngine
from ddpo.runs import Run
from ddpo_workflow.tasks import worker
from ddpo_workflow.tasks.engines.base import Engine
from ddpo_workflow.tasks.engines.local import Local

P = ParamSpec("P")
R = TypeVar("R")

_LOCAL = Local()
_engine: ContextVar[Engine] = ContextVar("engine", default=_LOCAL)


def current_engine() -> Engine:
    """Return the engine of this flow or task; the local one by default."""
    return _engine.get()


def check_engine(config: AnyEngine, device: str) -> None:
    """Check that a run can compute by an engine, before it starts.

    Args:
        config: The engine's settings.
        device: The run's kind of device.

    Raises:
        ConfigError: It cannot; says why.
    """
    if isinstance(config, ProcessesEngine):
        from ddpo_workflow.tasks.engines.processes import process_pool

        process_pool(config, device, ())  # whose processes start later
    elif isinstance(config, RayEngine):
        from ddpo_workflow.tasks.engines.ray_actors import check_ray

        check_ray(config, device)


def on_device(function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    """Run a function where the run's device is; see `Engine.call`.

    Args:
        function: A function of a module, which commits all of its work at once.
        args: Its arguments.
        kwargs: More of them, by name.
    """
    return current_engine().call(function, *args, **kwargs)


def on_all_devices(function: Callable[..., R], *args: Any) -> R:
    """Run a function where the run's devices are, once per device; see `Engine.together`.

    Args:
        function: A function of a module, which is given its `Seat` and then ``args``; rank 0
            commits all work at once.
        args: More arguments.
    """
    return current_engine().together(function, *args)


@contextmanager
def open_engine(run: Run) -> Iterator[Engine]:
    """Compute a run's tasks by its engine within this context.

    Args:
        run: The run, as this start operates it.

    Yields:
        The engine, whose workers end with the context.

    Raises:
        ConfigError: This machine or the cluster lacks what the config asks for.
    """
    engine = _made(run)
    token = _engine.set(engine)
    try:
        yield engine
    finally:
        _engine.reset(token)
        engine.close()


def _made(run: Run) -> Engine:
    config = run.config.engine
    if isinstance(config, LocalEngine):
        return _LOCAL
    worker.release_model()  # the workers need the memory
    trusted = (run.trusted_digest,) if is_trusted(run.trusted_digest) else ()
    if isinstance(config, ProcessesEngine):
        from ddpo_workflow.tasks.engines.processes import process_pool

        return process_pool(config, run.numerics.device, trusted)
    from ddpo_workflow.tasks.engines.ray_actors import ray_pool

    return ray_pool(config, run.numerics.device, trusted)
