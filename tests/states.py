"""States in a store, without a run."""

from __future__ import annotations

from ddpo.store.checkpoints import Checkpoint, checkpoint_objects
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT
from ddpo.store.manifests import Ref
from ddpo.store.objects import Store
from ddpo.training.state import TrainState


def commit_state(store: Store, state: TrainState, run_id: str = "r") -> Ref[Checkpoint]:
    """Commit a state as the checkpoint of its epoch."""
    where = Partition(run_id, state.epoch)
    return CHECKPOINT.commit(store, where, {}, checkpoint_objects(state, {})).ref
