"""Read a run's records back before they are written: unreadable ones would block its name."""

from __future__ import annotations

from pydantic import JsonValue, ValidationError

from ddpo.basics.version import VERSION
from ddpo.config import RunConfig
from ddpo.errors import ConfigError, DdpoError
from ddpo.models.numerics import Numerics
from ddpo.runs.run import run_of_record
from ddpo.store import keys
from ddpo.store.documents import differences
from ddpo.store.objects import Store
from ddpo.store.runs import RunRecord, StartRecord


def check_readable(
    store: Store,
    run_id: str,
    config: RunConfig,
    numerics: Numerics,
    identity: dict[str, JsonValue],
) -> None:
    """Check that the records of a start read back as the config that they are made from.

    Args:
        store: The store.
        run_id: The run's name.
        config: The config of this start.
        numerics: The run's numerics.
        identity: The config's identity, with its digests.

    Raises:
        ConfigError: They are not; the message names the settings.
    """
    try:
        record = RunRecord(
            run_id=run_id,
            identity=identity,
            numerics=numerics.model_dump(mode="json"),
            code={"ddpo": VERSION},
        )
        record = RunRecord.from_bytes(keys.run_key(run_id), record.to_bytes())
        start = StartRecord(uid="", operation=config.operation())
        start = StartRecord.from_bytes(keys.start_key(run_id, 1), start.to_bytes())
        operation = start.operation if isinstance(start.operation, dict) else {}
        read = run_of_record(store, record, operation, None, uid="").config
    except (DdpoError, ValidationError, ValueError) as error:
        raise ConfigError(f"run {run_id!r} could not be read back: {error}") from error
    changed = differences(read.identity(), config.identity())
    changed += differences(read.operation(), config.operation())
    if changed:
        lines = "".join(f"\n  {difference}" for difference in changed)
        raise ConfigError(f"run {run_id!r} would be read back with other settings:{lines}")
