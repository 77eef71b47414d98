"""A run whose sampling takes a while, for servers that end in the middle of it."""

from __future__ import annotations

import subprocess
import time
from typing import Any

from ddpo.store.keys import Partition
from ddpo.store.kinds import ROLLOUTS
from tests.faults.crashes import RUN
from tests.faults.processes import LIMIT_S, Command

SHARDS = 16
EPOCHS = 3
MANY_SHARDS: dict[str, Any] = {
    "rollouts": {"samples_per_epoch": SHARDS, "shard_size": 1},
    "numerics": {"sample_batch_size": 1, "micro_batch_size": 1},
    "epochs": EPOCHS,
}
"""Parts of the config."""
ENGINES: dict[str, Any] = {"local": "local", "processes": {"type": "processes", "workers": 2}}


def wait_for_samples(command: Command, process: subprocess.Popen[bytes]) -> None:
    """Wait until the first samples of epoch 1 are committed."""
    deadline = time.monotonic() + LIMIT_S
    while not has_samples(command, 0):
        assert process.poll() is None and time.monotonic() < deadline, command.log.read_text()
        time.sleep(0.02)


def has_samples(command: Command, shard: int) -> bool:
    """Return whether a shard of epoch 1 is committed."""
    return ROLLOUTS.commit_of(command.night.store, Partition(RUN, 1, shard)) is not None
