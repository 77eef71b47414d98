"""Committed tables for analysis: whole columns through pyarrow, every byte verified on the way."""

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
    """Shows pyarrow the listed objects and no others; opening one reads and verifies it whole."""

    protocol = "ddpo"
    cachable = False  # fsspec would keep every one for the life of the process

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
    """Make a dataset of committed Parquet objects.

    Nothing is read before a scan. A scan reads each object that its filter may need as a whole,
    verifies it, and decodes the asked columns only; it holds a few objects at a time.

    Args:
        store: The store.
        schema: Columns of the objects, then the partition columns.
        parts: The objects, each with the values of its partition columns.

    Returns:
        The dataset; the order of rows is that of the parts. A scan raises `CorruptObject`,
        `MissingObject` or `RetiredObject`.
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
    """Read columns of a committed table.

    Args:
        store: The store.
        stored: The table's object.
        columns: Which; by default all.

    Returns:
        The table.

    Raises:
        MissingObject: It is not there (RetiredObject: it was deleted on purpose).
        CorruptObject: Its bytes are not those that were committed.
        UnreadableData: The bytes are not such a table.
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
    """Put columns of one value each before a table's own.

    Args:
        table: The table.
        schema: The new columns.
        values: The value of each.

    Returns:
        The wider table.
    """
    columns = {
        field.name: pa.repeat(pa.scalar(value, field.type), len(table))
        for field, value in zip(schema, values, strict=True)
    }
    return pa.table({**columns, **dict(zip(table.column_names, table.columns, strict=True))})


def join(left: pa.Table, right: pa.Table, *, prefix: str = "") -> pa.Table:
    """Put columns beside those of the same `sample_id`; rows and their order are the left's.

    Args:
        left: A table with a `sample_id`.
        right: Another, with each sample once.
        prefix: Goes before the name of a column of `right` that `left` has too.

    Returns:
        The wider table; null where `right` lacks a sample.
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
    """Put tables below each other whose scorers need not agree on their own columns.

    Args:
        tables: The tables.
        schema: Columns that the result has in any case, and first.

    Returns:
        All rows in order. A column that a table lacks is null there. Where tables disagree on a
        column's type it is float64, or text where one has text.
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
