"""Query a run's history in SQL with DuckDB, locked down to the history's tables."""

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

TABLES = ("samples", "rollouts", "rewards", "advantages", "evaluations")
"""The tables a query can use."""

_ROWS_AT_A_TIME = 256

# The order matters: each setting but the last would be refused after the ones that follow it.
_LOCKDOWN = (
    "SET temp_directory = ''",  # do not write to the working directory
    "SET python_enable_replacements = false",  # no access to variables of this process
    "SET enable_external_access = false",  # no files, no network, no extensions
    "SET lock_configuration = true",
)


@dataclass(frozen=True)
class Answer:
    """The result of a query."""

    columns: tuple[str, ...]
    """Names of the columns."""
    rows: Iterator[tuple[Any, ...]]
    """The rows, fetched lazily while the query's context is open."""


@contextmanager
def query(history: History, sql: str) -> Iterator[Answer]:
    """Run a SQL query on a run's history.

    The query can use the tables in `TABLES` and nothing else: no files, no network, no settings.
    Only the tables it names are read; rollouts are copied to a temporary folder while it runs.

    Args:
        history: The history.
        sql: One statement in DuckDB's SQL.

    Yields:
        The answer, to be read while the context is open.

    Raises:
        QueryError: The statement is invalid; the message says why and lists the tables.
        MissingPackage: DuckDB is not installed.
        StoreError: An object is damaged or missing.
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
            for setting in _LOCKDOWN:
                connection.execute(setting)
            if len(connection.extract_statements(sql)) != 1:
                raise QueryError("expected exactly one statement")
            connection.execute(sql)
            columns = tuple(column[0] for column in connection.description or ())
            yield Answer(columns, _rows(connection))
        except duckdb.Error as error:
            raise QueryError(f"DuckDB: {error}\nTables: {', '.join(TABLES)}") from None
        finally:
            connection.close()


def _tables(history: History, sql: str, scratch: Path) -> dict[str, Any]:
    readers: dict[str, Callable[[], Any]] = {
        "samples": history.samples,
        "rollouts": lambda: _copied(history.rollouts(), scratch),
        "rewards": history.reward_table,
        "advantages": history.advantage_table,
        "evaluations": history.evaluation_table,
    }
    named = set(re.findall(r"\w+", sql.lower()))
    return {name: read() for name, read in readers.items() if name in named}


def _copied(rollouts: ds.FileSystemDataset, scratch: Path) -> ds.Dataset:
    """Copy a dataset to a local folder, one shard at a time.

    DuckDB ends a scan while holding the GIL, and Arrow then waits for its readers. The readers of a
    verified dataset are Python code that needs the GIL, so scanning one directly would deadlock.
    """
    for number, fragment in enumerate(rollouts.get_fragments()):
        shard = fragment.to_table(schema=rollouts.schema)
        pq.write_table(shard, scratch / f"{number:05d}.parquet", compression="none")
    return ds.dataset(scratch, schema=rollouts.schema, format="parquet")


def _rows(connection: Any) -> Iterator[tuple[Any, ...]]:
    while rows := connection.fetchmany(_ROWS_AT_A_TIME):
        yield from rows


def format_value(value: Any, *, digits: int | None = 6) -> str:
    """Format a cell of an answer: bytes as their count, null as an empty string.

    Args:
        value: A cell as DuckDB returns it.
        digits: Significant digits of a float; None for all of them.
    """
    if value is None:
        return ""
    if isinstance(value, float):
        return repr(value) if digits is None else f"{value:.{digits}g}"
    if isinstance(value, bytes):
        return f"<{len(value):,} bytes>"
    if isinstance(value, dict):
        return ", ".join(f"{name}: {format_value(v, digits=digits)}" for name, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(format_value(item, digits=digits) for item in value)
    return str(value)
