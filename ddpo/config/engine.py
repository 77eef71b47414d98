"""Where a run's tasks compute: in the flow's process, beside it, or on a Ray cluster."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt

from ddpo.basics.part import Part


class LocalEngine(Part):
    """Sampling and updates take turns in the flow's process, on its device."""

    type: Literal["local"] = "local"
    share_gpu: bool = False
    """Whether a GPU may be used that another run trains on; by default the run is refused."""


class ProcessesEngine(Part):
    """One process per GPU of this machine, or several on the CPU; each keeps the model loaded."""

    type: Literal["processes"]
    workers: PositiveInt | None = None
    """Number of processes. By default one per GPU; required on the CPU."""
    share_gpu: bool = False
    """Whether a GPU may be used that another run trains on; by default the run is refused."""


class RayEngine(Part):
    """One actor per GPU of a Ray cluster; each keeps the model loaded. Needs the extra `ray`."""

    type: Literal["ray"]
    address: str | None = None
    """The cluster's address, as `auto`, `HOST:6379` or `ray://HOST:10001`. By default, a cluster of
    this machine alone is started, and ends with the run."""
    workers: PositiveInt | None = None
    """Number of actors. By default one per GPU of the cluster; required on the CPU."""


def _type_alone(value: Any) -> Any:
    return {"type": value} if isinstance(value, str) else value


AnyEngine = Annotated[
    Annotated[LocalEngine | ProcessesEngine | RayEngine, Field(discriminator="type")],
    BeforeValidator(_type_alone),
]
"""Settings of an engine; a type alone (`engine: processes`) is short for `engine: {type: ...}`."""


def is_local(value: Any) -> bool:
    """Return whether an engine is the default, for ``exclude_if``: older configs have none."""
    return value == LocalEngine()
