"""Where tasks compute on the device: in the flow's process, in processes beside it, or on Ray."""

from ddpo_workflow.tasks.engines.current import (
    check_engine,
    current_engine,
    on_all_devices,
    on_device,
    open_engine,
)
from ddpo_workflow.tasks.engines.gpus import check_gpus, held_gpus

__all__ = [
    "check_engine",
    "check_gpus",
    "current_engine",
    "held_gpus",
    "on_all_devices",
    "on_device",
    "open_engine",
]
