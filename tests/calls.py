"""Calls for workers, in a module that their processes can import."""

from __future__ import annotations

import logging
import os
import signal
import time
import warnings
import weakref
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from ddpo.algorithms.policy_gradient import PolicyGradient
from ddpo.basics.digests import tensors_digest
from ddpo.config import FullConfig
from ddpo.config.files import parse_config
from ddpo.errors import MissingObject, NonFiniteError
from ddpo.runs import RunHandle
from ddpo.store.artefacts import AdvantageTable, RolloutShard
from ddpo.store.checkpoints import Checkpoint
from ddpo.store.manifests import Ref, StoredObject
from ddpo.store.objects import Store
from ddpo.training.loop import initial_state, update
from ddpo.training.optimizer import copies, make_adamw, take_step
from ddpo.training.trajectory_gradient import TrajectoryGradient
from ddpo_workflow.tasks.engines.base import Seat
from ddpo_workflow.tasks.engines.seats import seated
from ddpo_workflow.tasks.progress import report
from ddpo_workflow.tasks.update import _updated
from tests.tiny import (
    alternating_advantages,
    as_credit,
    as_float64,
    draw,
    flat,
    grow_adapter,
    load_policy,
    make_float64,
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
    state, metrics = initial_state(policy, old=config.algorithm.needs.keeps_old), {}
    count = config.rollouts.samples_per_epoch
    credit = as_credit(alternating_advantages(count))
    credit["weight"] = torch.linspace(0.1, 1.0, count)
    credit["pair"] = torch.arange(count).flip(0) // 2 - 1.0  # the last two have none
    credit["preferred"] = torch.arange(count) % 2.0
    for epoch in range(2):
        if seat.rank == 1:  # a rank that has read its state has it in another order
            parts = {name: getattr(state, name) for name in ("optimizer", "ema", "old")}
            state = replace(state, **{n: dict(reversed(p.items())) for n, p in parts.items()})
        rollouts = rollouts_of(draw(policy, config, first_seed=1000 * epoch))
        split = isinstance(config.trainable, FullConfig)
        anew = replace(seat, meeting=f"{seat.meeting}-{epoch}")
        with seated(anew, policy.device, split=split) as ranks:
            state, metrics = update(policy, state, rollouts, credit, {}, config, ranks=ranks)
            if broken and seat.rank == 1:
                with torch.no_grad():
                    next(iter(policy.weights.parameters().values())).add_(1e-6)
    return {
        "weights": tensors_digest(state.weights),
        "optimizer": tensors_digest(state.optimizer),
        "ema": tensors_digest(state.ema),
        "old": tensors_digest(state.old),
        "value": tensors_digest(state.value),
        "metrics": metrics,
    }


def whole_gradient_by_rank(seat: Seat, raw: dict[str, Any]) -> dict[str, Any]:
    """Compute the gradient of a whole network in float64 and take a step, as one of several ranks.

    Args:
        seat: This rank's place.
        raw: The config, as JSON.

    Returns:
        The gradient and its norm, a digest of the weights after the step on each rank, and how many
        of the numbers that are trained this rank holds itself.
    """
    config = parse_config(raw, "a test's config")
    torch.set_num_threads(1)
    policy = load_policy(config)
    exact = as_float64(rollouts_of(draw(policy, config)))
    make_float64(policy)
    state = initial_state(policy)
    policy.weights.keep("base", {name: 1.01 * value for name, value in state.weights.items()})
    old = exact.log_probs + 1e-5
    advantages = alternating_advantages(len(old)).double()
    with (
        seated(seat, policy.device, split=True) as ranks,
        ranks.sharing(policy, state.weights),
    ):
        # Which a config refuses with a whole network: here, the policy keeps a base to swap with.
        algorithm = config.algorithm.model_copy(update={"kl_weight": 0.1})
        gradient = TrajectoryGradient(
            policy, config.sampler, cast(PolicyGradient, algorithm), ranks
        )
        adamw = make_adamw(gradient.parameters, config.optimizer, {})
        done = gradient.accumulate(exact, advantages, range(len(old)), old)
        found = copies(
            {name: p.grad for name, p in gradient.parameters.items() if p.grad is not None}
        )
        norm = take_step(adamw, gradient.parameters, config.optimizer)
        held = [p.to_local() if isinstance(p, DTensor) else p for p in gradient.parameters.values()]
        digests = [tensors_digest(copies(policy.weights.state()))] * seat.size
        if seat.size > 1:
            dist.all_gather_object(digests, digests[0])
    return {
        "gradient": flat(found).numpy(),
        "norm": norm,
        "kl": done.measured.get("kl_to_base"),
        "digests": digests,
        "held": sum(each.numel() for each in held),
        "left": tensors_digest(policy.weights.state()),
    }


def fail_in_an_update(seat: Seat, raw: dict[str, Any]) -> tuple[str, str]:
    """Run an update that fails on all ranks; return digests of the weights before and after it."""
    config = parse_config(raw, "a test's config")
    policy = load_policy(config)
    rollouts, state = rollouts_of(draw(policy, config)), initial_state(policy)
    credit = as_credit(torch.full((len(rollouts.prompts),), torch.nan))
    with seated(seat, policy.device, split=True) as ranks, suppress(NonFiniteError):
        update(policy, state, rollouts, credit, {}, config, ranks=ranks)
        raise AssertionError("the update should fail")
    return tensors_digest(state.weights), tensors_digest(policy.weights.state())


def update_noting_reads(
    seat: Seat,
    folder: str,
    handle: RunHandle,
    checkpoint: Ref[Checkpoint],
    rollouts: list[Ref[RolloutShard]],
    advantages: Ref[AdvantageTable],
) -> Ref[Checkpoint]:
    """Run the update of epoch 0 as one of several ranks; each notes which trajectories it reads.

    They may be in memory one shard at a time.

    Args:
        seat: This rank's place.
        folder: Gets a file per rank, of a key a line.
        handle: The run.
        checkpoint: As for the task.
        rollouts: As for the task.
        advantages: As for the task.
    """
    load, read = Store.load, []
    before: list[weakref.ref[Any]] = []

    def noting(store: Store, stored: StoredObject) -> Any:
        assert all(shard() is None for shard in before), "another shard is still in memory"
        read.append(stored.key)
        data = load(store, stored)
        before.append(weakref.ref(data))
        return data

    with patch.object(Store, "load", noting):
        done = _updated(seat, handle, checkpoint, rollouts, advantages, 0)
    keys = [key for key in read if key.startswith("trajectories/")]
    (Path(folder) / f"rank-{seat.rank}").write_text("\n".join(keys))
    return done


def fail_on_rank_1(seat: Seat, how: str) -> int:
    """Wait for the other ranks, of which one fails."""
    with seated(seat, torch.device("cpu")) as ranks:
        if seat.rank == 1:
            if how == "killed":
                die()
            fail()
        return len(ranks.merged(torch.full((3,), torch.nan)))
