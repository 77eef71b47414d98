"""Calls for workers, in a module that their processes can import."""

from __future__ import annotations

import logging
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import torch

from ddpo.basics.digests import tensors_digest
from ddpo.config.files import parse_config
from ddpo.errors import MissingObject
from ddpo.training.loop import initial_state, update
from ddpo_workflow.tasks.engines.base import Seat
from ddpo_workflow.tasks.engines.seats import seated
from ddpo_workflow.tasks.progress import report
from tests.tiny import (
    alternating_advantages,
    as_credit,
    draw,
    grow_adapter,
    load_policy,
    rollouts_of,
)


def die_once(file: str) -> str:
    """End this process at the first call."""
    if not Path(file).exists():
        Path(file).touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return "alive"


def die() -> None:
    """End this process at every call."""
    os.kill(os.getpid(), signal.SIGKILL)


def fail() -> None:
    """Raise an error of the project."""
    raise MissingObject("a/key", "a/root")


def fail_badly() -> None:
    """Raise an error that cannot be pickled."""
    raise OSError(lambda: 0)


def speak() -> None:
    """Log a warning, and report progress."""
    logging.getLogger("ddpo.test").warning("half of %s", "it")
    report("sample", 1, 2)


def warn_of_everything() -> None:
    """Log as this project and as libraries do, and let Python warn."""
    logging.getLogger("ddpo.rewards.anything").warning("this project's")
    logging.getLogger("ddpo.store.anything").info("not said")
    logging.getLogger("peft.anything").warning("a library's")
    logging.getLogger("peft.anything").info("not said")
    # Importing them was more than this is about; their loggers hand nothing to the root logger.
    for name in ("diffusers", "mlflow", "transformers"):
        logging.getLogger(name).propagate = False
        logging.getLogger(f"{name}.anything").error("that of %s", name)  # see `cli/quiet.py`
    warnings.warn("Python's", stacklevel=1)


def where() -> tuple[int, str | None]:
    """The process, and the GPU that it sees."""
    return os.getpid(), os.environ.get("CUDA_VISIBLE_DEVICES")


def sleep_here(seconds: float) -> int:
    """Sleep; return the process."""
    time.sleep(seconds)
    return os.getpid()


def epochs_by_rank(seat: Seat, raw: dict[str, Any], broken: bool = False) -> dict[str, Any]:
    """Train two epochs as one of several ranks; returns digests of the state, and the metrics.

    Args:
        seat: This rank's place.
        raw: The config, as JSON.
        broken: Whether one rank changes its weights behind the others' backs.
    """
    config = parse_config(raw, "a test's config")
    torch.set_num_threads(1)
    policy = load_policy(config)
    grow_adapter(policy)
    state, metrics = initial_state(policy), {}
    credit = {**as_credit(alternating_advantages(8)), "weight": torch.linspace(0.1, 1.0, 8)}
    for epoch in range(2):
        rollouts = rollouts_of(draw(policy, config, first_seed=1000 * epoch))
        with seated(seat, policy.device) as ranks:
            state, metrics = update(policy, state, rollouts, credit, {}, config, ranks=ranks)
            if broken and seat.rank == 1:
                with torch.no_grad():
                    next(iter(policy.weights.parameters().values())).add_(1e-6)
    return {
        "weights": tensors_digest(state.weights),
        "optimizer": tensors_digest(state.optimizer),
        "metrics": metrics,
    }


def fail_on_rank_1(seat: Seat, how: str) -> int:
    """Wait for the other ranks, of which one fails."""
    with seated(seat, torch.device("cpu")) as ranks:
        if seat.rank == 1:
            if how == "killed":
                die()
            fail()
        return len(ranks.merged(torch.full((3,), torch.nan)))
