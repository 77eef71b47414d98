"""State that a worker process keeps between tasks: opened runs, one model and its weights."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import torch

from ddpo.config import RewardConfig
from ddpo.errors import PolicyMismatch
from ddpo.models import Policy, WeightSet, load_policy
from ddpo.rewards import load_reward
from ddpo.runs import Run, RunHandle, RunPlan, Scorer
from ddpo.runs.batch_search import BatchSearch
from ddpo.store.checkpoints import Checkpoint
from ddpo.store.kinds import CHECKPOINT
from ddpo.store.manifests import Ref
from ddpo.training.state import TrainState

ON_DEVICE = "device"
"""Tag of the tasks that compute on the device; each flow run runs them one at a time, in order."""

_device = threading.Lock()
_opening = threading.RLock()
_loaded: _Loaded | None = None


@dataclass
class _Loaded:
    """The one model of this process, and the checkpoint whose trained weights it holds.

    `fresh` until its trained weights may have changed.
    """

    key: tuple[str, str]
    policy: Policy
    fresh: bool = True
    checkpoint: Ref[Checkpoint] | None = None
    state: TrainState | None = None


@dataclass(frozen=True)
class Lease:
    """The device and the model, for as long as a task needs them."""

    loaded: _Loaded
    policy: Policy
    state: TrainState

    def hold(self, checkpoint: Ref[Checkpoint], state: TrainState) -> None:
        """Record which committed checkpoint the policy's weights now match."""
        self.loaded.checkpoint, self.loaded.state = checkpoint, state


def opened(handle: RunHandle) -> Run:
    """Open a run, once per process and start, and compute as it does in this thread.

    Torch splits a sum among as many threads as are set for the calling thread, and another split
    rounds differently; a resumed run, whose first task may run in another thread, must not.
    """
    with _opening:  # lru_cache alone lets threads that ask at once open it once each
        run = _opened(handle)
    run.numerics.apply()
    return run


@lru_cache(maxsize=8)
def _opened(handle: RunHandle) -> Run:
    return handle.open()


def scorer_of(run: Run, reward: RewardConfig | None) -> Scorer:
    """Return the scorer of a run's samples.

    Args:
        run: The run.
        reward: A reward other than the run's own, loaded once per process; None for the run's own.

    Raises:
        DdpoError: The reward cannot be loaded, or the run's own is not the one it was started with.
    """
    if reward is None:
        return run.scorer
    with _opening:
        return _scorer(reward.model_dump_json())


@lru_cache(maxsize=8)
def _scorer(reward: str) -> Scorer:
    config = RewardConfig.model_validate_json(reward)
    return Scorer(config, load_reward(config.name, config.parameters))


def forget() -> None:
    """Forget all that this process keeps between tasks."""
    _opened.cache_clear()
    _scorer.cache_clear()
    release_model()


def release_model() -> None:
    """Free the memory of this process's model; the next task that needs it loads it again."""
    global _loaded
    with _device:
        _loaded = None
        _free_memory()


def _free_memory() -> None:
    """Give back what a model that nobody refers to any more has had, to other processes too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def check_model(plans: Sequence[RunPlan]) -> list[RunPlan]:
    """Check those runs that have no checkpoint yet against their model, before they start.

    Batch sizes that are `auto` are found by measuring it.

    Args:
        plans: Runs of one model, such as those of a comparison. It is loaded once, and kept for the
            first of them, unless it was measured, which changes it.

    Returns:
        The runs, with their batch sizes.

    Raises:
        DdpoError: The model cannot be loaded; or as `RunPlan.check_model`.
    """
    global _loaded
    new = [plan for plan in plans if plan.awaits_sizes or not plan.has_checkpoint]
    if not new:
        return list(plans)
    with _device:
        first = next((plan for plan in new if plan.awaits_sizes), new[0])
        policy = _load(first, fresh=True).policy
        for plan in new:
            plan.check_model(policy)
        if not first.awaits_sizes:
            return list(plans)
        search = BatchSearch(policy)
        try:
            return [plan.sized(search) for plan in plans]
        finally:  # measuring has changed the model, and taken room that workers may need
            _loaded = None
            del policy, search
            _free_memory()


@contextmanager
def fresh_policy(run: Run) -> Iterator[Policy]:
    """Hold the device and the run's model as checkpoint 0 has it.

    Args:
        run: The run.

    Yields:
        The policy; the device is locked until the context is left.
    """
    with _device:
        yield _load(run, fresh=True).policy


@contextmanager
def policy_at(
    run: Run,
    checkpoint: Ref[Checkpoint],
    *,
    training: bool = False,
    weights: WeightSet = "trained",
) -> Iterator[Lease]:
    """Hold the device and the run's model with a checkpoint's weights.

    Args:
        run: The run.
        checkpoint: The checkpoint's manifest.
        training: Whether the weights will change; unless :meth:`Lease.hold` is called, they are
            reloaded next time.
        weights: The weights that the policy uses. "average", for images and exports, and "old" are
            the trained weights if the run keeps no such set.

    Yields:
        The policy and the state; the device is locked until the context is left.

    Raises:
        PolicyMismatch: The base model is not the one that the run was started with.
    """
    with _device:
        loaded = _load(run)
        loaded.fresh = False
        if loaded.checkpoint != checkpoint or loaded.state is None:
            loaded.checkpoint = None
            state = CHECKPOINT.load(run.store, checkpoint).state()
            loaded.policy.weights.load(state.weights)
            _check_base(run, loaded.policy, checkpoint)
            loaded.checkpoint, loaded.state = checkpoint, state
        lease = Lease(loaded, loaded.policy, loaded.state)
        if training:
            loaded.checkpoint = None
        kept = {"average": loaded.state.ema, "old": loaded.state.old}
        if kept.get(weights):
            loaded.policy.weights.keep(weights, kept[weights])
        elif weights in kept:
            weights = "trained"
        if weights == "trained":
            yield lease
            return
        loaded.checkpoint = None  # until the trained weights are restored
        with loaded.policy.weights.use(weights):
            yield lease
        loaded.checkpoint = checkpoint


def _load(run: Run | RunPlan, *, fresh: bool = False) -> _Loaded:
    global _loaded
    key = (run.run_id, run.identity_digest)
    if _loaded is None or _loaded.key != key or (fresh and not _loaded.fresh):
        _loaded = None  # free the old model's memory before loading the new one
        config = run.config
        policy = load_policy(config.model, config.trainable, run.numerics, seed=config.seed)
        _loaded = _Loaded(key, policy)
    run.numerics.apply()  # in this thread: another one may have loaded it
    return _loaded


def _check_base(run: Run, policy: Policy, checkpoint: Ref[Checkpoint]) -> None:
    digests = CHECKPOINT.load(run.store, checkpoint).digests
    if digests["policy_digest"] != policy.digest:
        raise PolicyMismatch(
            f"{checkpoint.key} with the base model in {policy.folder} has policy digest "
            f"{policy.digest}, expected {digests['policy_digest']}: the base model's files "
            f"have changed since run {run.run_id!r} started. Restore the original files, or start "
            "a new run."
        )
