"""SQL over a run's history, by DuckDB, which can reach nothing else."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.dataset as ds
import pyarrow.parquet as pq

from ddpo.analysis.history import History
from ddpo.errors import MissingPackage, QueryError

TABLES = ("samples", "rollouts", "rewards", "advantages")
"""What a query may name."""

_ROWS_AT_A_TIME = 256

# In this order: each but the last would be refused after the next ones.
_WALLS = (
    "SET temp_directory = ''",  # nothing is left behind in the working directory
    "SET python_enable_replacements = false",  # no variable of this process
    "SET enable_external_access = false",  # no file, no address, no extension
    "SET lock_configuration = true",
)


@dataclass(frozen=True)
class Answer:
    """What a query gives.

    Attributes:
        columns: Names of the columns.
        rows: The rows, read on while they are taken.
    """

    columns: tuple[str, ...]
    rows: Iterator[tuple[Any, ...]]


@contextmanager
def query(history: History, sql: str) -> Iterator[Answer]:
    """Ask a run's history.

    The query sees the tables of `TABLES` and nothing else: no file, no network, no setting. Only
    the tables that it names are read; rollouts are copied to a temporary folder for the time.

    Args:
        history: The history.
        sql: One statement in DuckDB's SQL.

    Yields:
        The answer, to be read while the context is open.

    Raises:
        QueryError: The statement cannot be answered; says why, and which tables there are.
        MissingPackage: DuckDB is not installed.
        StoreError: What it reads is damaged or gone.
    """
    try:
        import duckdb
    except ImportError:
        raise MissingPackage("duckdb", "a query", "data") from None

    with tempfile.TemporaryDirectory(prefix="ddpo-query-") as scratch:
        tables = _tables(history, sql, Path(scratch))
        connection = duckdb.connect()
        try:
            for name, table in tables.items():
                connection.register(name, table)
            for wall in _WALLS:
                connection.execute(wall)
            if len(connection.extract_statements(sql)) != 1:
                raise QueryError("a query is one statement, and this is none or several")
            connection.execute(sql)
            columns = tuple(column[0] for column in connection.description or ())
            yield Answer(columns, _rows(connection))
        except duckdb.Error as error:
            there = ", ".join(TABLES)
            raise QueryError(f"DuckDB answers: {error}\nThe tables are {there}") from None
        finally:
            connection.close()


def _tables(history: History, sql: str, scratch: Path) -> dict[str, Any]:
    made: dict[str, Callable[[], Any]] = {
        "samples": history.samples,
        "rollouts": lambda: _on_this_disk(history.rollouts(), scratch),
        "rewards": history.reward_table,
        "advantages": history.advantage_table,
    }
    named = set(re.findall(r"\w+", sql.lower()))
    return {name: make() for name, make in made.items() if name in named}


def _on_this_disk(rollouts: ds.FileSystemDataset, scratch: Path) -> ds.Dataset:
    """Copy a dataset, a shard at a time.

    DuckDB ends a scan while it holds Python's lock, and Arrow then waits for its readers; those of
    a verified dataset are Python and want the lock, so that both would wait for ever.
    """
    for number, fragment in enumerate(rollouts.get_fragments()):
        shard = fragment.to_table(schema=rollouts.schema)
        pq.write_table(shard, scratch / f"{number:05d}.parquet", compression="none")
    return ds.dataset(scratch, schema=rollouts.schema, format="parquet")


def _rows(connection: Any) -> Iterator[tuple[Any, ...]]:
    while rows := connection.fetchmany(_ROWS_AT_A_TIME):
        yield from rows


def shown(value: Any, *, digits: int | None = 6) -> str:
    """Return a value as text: bytes by their number, null as nothing.

    Args:
        value: What DuckDB gives of a cell.
        digits: How many of a float; None for all that it has.
    """
    if value is None:
        return ""
    if isinstance(value, float):
        return repr(value) if digits is None else f"{value:.{digits}g}"
    if isinstance(value, bytes):
        return f"<{len(value):,} bytes>"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {shown(v, digits=digits)}" for name, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(shown(each, digits=digits) for each in value)
    return str(value)
