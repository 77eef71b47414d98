"""The local folder of what a run or a comparison exports."""

from __future__ import annotations

from pathlib import Path

from ddpo.basics.paths import expand
from ddpo.config import RunConfig

_OWNER = ".owner"


def outputs_folder(config: RunConfig, name: str, uid: str) -> Path:
    """Return the local folder that receives the report and weights of a run or a comparison.

    Args:
        config: Says where the outputs of all runs are.
        name: The name of the run or comparison, and of its folder.
        uid: What sets it apart from others of its name, in another store or deleted; if the folder
            holds the outputs of one of these, its own has a longer name.
    """
    folder = Path(expand(config.outputs)) / name
    owner = folder / _OWNER
    if owner.is_file() and owner.read_text() != uid:
        return folder.with_name(f"{name}-{uid[:8]}")
    return folder


def own_outputs_folder(config: RunConfig, name: str, uid: str) -> Path:
    """Return the same folder, created and marked with its owner."""
    folder = outputs_folder(config, name, uid)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / _OWNER).write_text(uid)
    return folder
