"""Which GPUs of this machine a run trains on: a second run is refused unless it asks to share.

A run holds a locked file for each of its GPUs, which the system unlocks when the process ends, in
a folder of the user in the machine's folder for temporary files. So it works without any server.
"""

from __future__ import annotations

import os
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ddpo.config import AnyEngine, ProcessesEngine, RayEngine
from ddpo.errors import GpuInUse

_GUARD_S = 60.0
"""How long another process may look at the files at the same time, in seconds."""

_own: set[Path] = set()
"""The files that this process has locked: its own runs take turns."""


def gpus_of(config: AnyEngine, device: str) -> list[str]:
    """Return the ids of the GPUs of this machine that a run computes on.

    Args:
        config: The engine's settings. Ray counts its GPUs itself.
        device: The run's kind of device.
    """
    if device != "cuda" or isinstance(config, RayEngine):
        return []
    import torch

    visible = range(torch.cuda.device_count())
    workers = config.workers if isinstance(config, ProcessesEngine) else 1
    return [str(torch.cuda.get_device_properties(gpu).uuid) for gpu in visible[:workers]]


def check_gpus(config: AnyEngine, device: str) -> None:
    """Check that a run has its GPUs for itself, or asks to share them.

    Args:
        config: The engine's settings.
        device: The run's kind of device.

    Raises:
        GpuInUse: Another process trains on one of them.
    """
    with _guarded() as folder:
        _check(folder, config, gpus_of(config, device))


@contextmanager
def held_gpus(config: AnyEngine, device: str, run_id: str) -> Iterator[None]:
    """Hold a run's GPUs within this context.

    Args:
        config: The engine's settings.
        device: The run's kind of device.
        run_id: The run, for the message to others.

    Raises:
        GpuInUse: As `check_gpus`.
    """
    gpus = gpus_of(config, device)
    with ExitStack() as held:
        with _guarded() as folder:
            _check(folder, config, gpus)
            for gpu in gpus:
                file = folder / f"{gpu}.{uuid.uuid4().hex}"
                _own.add(file)
                held.callback(_own.discard, file)
                held.enter_context(FileLock(file, thread_local=False))
                file.write_text(f"run {run_id}, process {os.getpid()}")
        yield


def _check(folder: Path, config: AnyEngine, gpus: Sequence[str]) -> None:
    if not isinstance(config, RayEngine) and config.share_gpu:
        return
    for gpu in gpus:
        for file in folder.glob(f"{gpu}.*"):
            if file not in _own and (owner := _owner(file)):
                raise GpuInUse(gpu, owner, config.type)


def _owner(file: Path) -> str | None:
    """Return who has locked a file; a file that nobody has is deleted."""
    try:
        with FileLock(file, timeout=0):
            file.unlink()
    except Timeout:
        return file.read_text()
    return None


@contextmanager
def _guarded() -> Iterator[Path]:
    """Look at the files alone; yields their folder."""
    folder = Path(tempfile.gettempdir()) / f"ddpo-gpus-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    with FileLock(folder / "guard", timeout=_GUARD_S):
        yield folder
