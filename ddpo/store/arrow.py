"""Read committed tables as pyarrow columns for analysis; every byte is verified."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem
from pyarrow.fs import FSSpecHandler, PyFileSystem

from ddpo.errors import UnreadableData
from ddpo.store.objects import Store, StoredObject


class _VerifiedFiles(AbstractFileSystem):
    """Show pyarrow the listed objects only; opening one reads and verifies all of it."""

    protocol = "ddpo"
    cachable = False  # fsspec would keep each instance until the process ends

    def __init__(self, store: Store, objects: Sequence[StoredObject]) -> None:
        super().__init__()
        self._store = store
        self._objects = {stored.key: stored for stored in objects}

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        if path not in self._objects:
            raise FileNotFoundError(path)
        return {"name": path, "size": self._objects[path].size, "type": "file"}

    def _open(self, path: str, mode: str = "rb", *_: Any, **__: Any) -> Any:
        if mode != "rb":
            raise PermissionError("committed objects are not written to")
        return io.BytesIO(self._store.get(self._objects[path]))


def verified_dataset(
    store: Store,
    schema: pa.Schema,
    parts: Sequence[tuple[StoredObject, Mapping[str, Any]]],
) -> ds.FileSystemDataset:
    """Return a dataset of committed Parquet objects, with rows in the order of the parts.

    Nothing is read before a scan. A scan reads and verifies each object that its filter may match,
    decodes the requested columns only, and holds a few objects at a time. It raises
    `CorruptObject`, `MissingObject` or `RetiredObject`.

    Args:
        store: The store.
        schema: Columns of the objects, then the partition columns.
        parts: The objects, each with the values of its partition columns.
    """
    files = _VerifiedFiles(store, [stored for stored, _ in parts])
    made = ds.FileSystemDataset.from_paths(
        [stored.key for stored, _ in parts],
        schema=schema,
        format=ds.ParquetFileFormat(),
        filesystem=PyFileSystem(FSSpecHandler(files)),
        partitions=[_where(values) for _, values in parts],
    )
    assert isinstance(made, ds.FileSystemDataset)
    return made


def read_table(
    store: Store, stored: StoredObject, columns: Sequence[str] | None = None
) -> pa.Table:
    """Read a committed table.

    Args:
        store: The store.
        stored: The table's object.
        columns: Columns to read; by default all.

    Raises:
        MissingObject: It is missing (RetiredObject: it was deleted on purpose).
        CorruptObject: Its bytes do not match the digest.
        UnreadableData: It is not a Parquet file, or lacks a column.
    """
    data = pa.BufferReader(store.get(stored))
    try:
        table = pq.ParquetFile(data).read(columns=list(columns) if columns else None)
    except (pa.ArrowException, OSError) as error:
        raise UnreadableData(stored.key, str(error)) from error
    missing = set(columns or ()).difference(table.column_names)
    if missing:
        raise UnreadableData(stored.key, f"it has no column {', '.join(sorted(missing))}")
    return table


def with_constants(table: pa.Table, schema: pa.Schema, values: Sequence[Any]) -> pa.Table:
    """Return a table with constant columns put before its own.

    Args:
        table: The table.
        schema: The new columns.
        values: The value of each.
    """
    columns = {
        field.name: pa.repeat(pa.scalar(value, field.type), len(table))
        for field, value in zip(schema, values, strict=True)
    }
    return pa.table({**columns, **dict(zip(table.column_names, table.columns, strict=True))})


def join(left: pa.Table, right: pa.Table, *, prefix: str = "") -> pa.Table:
    """Left-join two tables on `sample_id`; the rows and their order are those of `left`.

    Args:
        left: A table with a `sample_id`.
        right: Another, with each sample once. Its columns are null for samples that it lacks.
        prefix: Prefix for the columns of `right` whose names `left` has too.
    """
    rows = pc.call_function(
        "index_in", [left["sample_id"]], pc.SetLookupOptions(right["sample_id"])
    )
    taken = right.take(rows)
    columns = dict(zip(left.column_names, left.columns, strict=True))
    for name in right.column_names:
        if name != "sample_id":
            columns[name if name not in columns else prefix + name] = taken[name]
    return pa.table(columns)


def union(tables: Sequence[pa.Table], schema: pa.Schema) -> pa.Table:
    """Concatenate tables that may have different columns, such as those of different scorers.

    A column is null in the rows of a table that lacks it. If the tables disagree on a column's
    type, it is a string if one of them has strings, else float64.

    Args:
        tables: The tables.
        schema: Columns that the result always has, and first.
    """
    kinds = dict(zip(schema.names, schema.types, strict=True))
    for table in tables:
        for name, kind in zip(table.schema.names, table.schema.types, strict=True):
            known = kinds.setdefault(name, kind)
            if known != kind:
                text = pa.string() in (known, kind)
                kinds[name] = pa.string() if text else pa.float64()
    whole = pa.schema(list(kinds.items()))
    return pa.concat_tables([whole.empty_table(), *(_as(table, whole) for table in tables)])


def _as(table: pa.Table, schema: pa.Schema) -> pa.Table:
    columns = [
        table[name].cast(kind, safe=False)
        if name in table.column_names
        else pa.nulls(len(table), kind)
        for name, kind in zip(schema.names, schema.types, strict=True)
    ]
    return pa.table(columns, schema=schema)


def _where(values: Mapping[str, Any]) -> ds.Expression:
    condition = ds.scalar(True)
    for name, value in values.items():
        condition &= ds.field(name) == ds.scalar(value)
    return condition
