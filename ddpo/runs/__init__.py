"""Runs: a config in a store, how it is started and opened, and its forks."""

from ddpo.runs.run import (
    DEFAULT_ROOT,
    Fork,
    Run,
    RunHandle,
    Scorer,
    open_run,
    storage_root,
)
from ddpo.runs.start import RunPlan, check_run, start_run

__all__ = [
    "DEFAULT_ROOT",
    "Fork",
    "Run",
    "RunHandle",
    "RunPlan",
    "Scorer",
    "check_run",
    "open_run",
    "start_run",
    "storage_root",
]
