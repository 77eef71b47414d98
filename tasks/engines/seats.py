"""How the ranks of one computation meet."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from ddpo.training.ranks import Alone, Group, Ranks
from ddpo_workflow.tasks.engines.base import Seat

_PATIENCE = timedelta(minutes=30)
"""How long a rank waits for the others; one that has died is noticed at once."""
_TCP = "tcp://"


@contextmanager
def seated(seat: Seat, device: torch.device, *, split: bool = False) -> Iterator[Ranks]:
    """Compute together with the other ranks within this context.

    Args:
        seat: This process's place.
        device: The device that this process computes on.
        split: Whether each rank trains a part of the weights, as in full fine-tuning.

    Yields:
        All ranks, as seen by this one.
    """
    if seat.size == 1:
        yield Alone()
        return
    store = None
    if seat.meeting.startswith(_TCP):
        host, _, port = seat.meeting.removeprefix(_TCP).rpartition(":")
        store = dist.TCPStore(host, int(port), is_master=False)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=None if store else seat.meeting,
        store=store,
        rank=seat.rank,
        world_size=seat.size,
        timeout=_PATIENCE,
    )
    try:
        yield _group(split)(device if device.type == "cuda" else torch.device("cpu"))
    finally:
        gc.collect()  # modules of FSDP refer to themselves, and hold memory and connections
        dist.destroy_process_group()


def _group(split: bool) -> type[Group]:
    if split:
        from ddpo.training.sharded import Sharded  # FSDP takes long to import

        return Sharded
    return Group
