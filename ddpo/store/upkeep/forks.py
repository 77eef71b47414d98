"""The forks of a run, by the records that they leave beside it."""

from __future__ import annotations

from collections.abc import Iterator

from pydantic import ValidationError

from ddpo.config import ForkConfig
from ddpo.errors import RunNotFound, UnreadableData
from ddpo.store import keys, runs
from ddpo.store.objects import Store


def recorded(store: Store, run_id: str) -> Iterator[tuple[str, ForkConfig]]:
    """Yield the runs that branch off a run, whether or not they have begun.

    Args:
        store: The store.
        run_id: The run that they branch off.

    Yields:
        A fork's name, and where it branches off. None that a person took away, nor a run of the
        same name that came after it and branches off elsewhere.

    Raises:
        StoreError: A fork's own record cannot be read.
    """
    for name in names(store, run_id):
        try:
            raw = runs.load_run(store, name).identity.get("fork")
        except RunNotFound:
            continue
        if not isinstance(raw, dict) or raw.get("run_id") != run_id:
            continue
        try:
            yield name, ForkConfig.model_validate(raw)
        except ValidationError as error:
            raise UnreadableData(keys.run_key(name), str(error)) from error


def names(store: Store, run_id: str) -> list[str]:
    """List the runs that have left a record that they branch off a run, sorted."""
    found = store.list(keys.forks_prefix(run_id))
    return sorted(key.rpartition("/")[2].removesuffix(".json") for key in found)
