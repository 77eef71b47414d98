"""Rows of rollouts, rewards and advantages as Parquet files.

Rows are sorted by `sample_id`, and equal rows give equal bytes. Every page has a checksum, which is
verified on reading. No column is named like a partition key, so that
pyarrow, DuckDB, Polars and Hugging Face datasets read the folders as one table.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import JsonValue

from ddpo.basics.digests import canonical_json
from ddpo.basics.limits import INDEX_LIMIT
from ddpo.errors import InvalidTable, UnreadableData
from ddpo.store.keys import PARTITION_NAMES, image_name

UNFOLDED_LIMIT_BYTES = 2**32
"""Uncompressed size limit of a table; a shard of 1,000 images of 1024x1024 pixels has 3 GB."""


@dataclass(frozen=True)
class SampleRow:
    """A sample without its image: its prompt and provenance."""

    sample_id: str
    shard: int
    index: int
    """Index within the epoch."""
    prompt: str
    prompt_metadata: Mapping[str, JsonValue]
    """Facts about the prompt that a reward may use."""
    seed: int
    """Seed of the sample's noise, 0 to 2**63 - 1; its lower 32 bits decide the noise."""
    policy_digest: str
    sampler_digest: str
    log_prob_mean: float | None
    """Mean log-prob of the steps, as float32; None where no step has variance."""


@dataclass(frozen=True)
class RolloutRow(SampleRow):
    """A sample with its image."""

    image_png: bytes
    """The image, lossless."""


@dataclass(frozen=True)
class RewardRow:
    """A sample's score."""

    sample_id: str
    reward: float | None
    """As float32, higher is better; None where scoring failed."""
    status: str
    """'ok', or why scoring failed."""
    columns: Mapping[str, float | int | str] = field(default_factory=dict)
    """Components of a weighted sum and the scorer's own columns (as float32, int64 or string)."""


@dataclass(frozen=True)
class AdvantageRow:
    """A sample's credit: its advantage, its weight, or what else an algorithm derives."""

    sample_id: str
    reward: float | None
    """As float32; None where scoring failed."""
    status: str
    """'ok'; 'dropped' or 'imputed' if the sample could not be scored."""
    count: int
    """Number of rewards that the sample's reward was compared with."""
    columns: Mapping[str, float]
    """Columns that the algorithm declares, such as `advantage`, `mean` and `std`, or `weight`."""


@dataclass(frozen=True)
class EvaluationRow:
    """An image that a checkpoint was evaluated on, without its pixels."""

    sample_id: str
    prompt: str
    seed: int
    """One of the evaluation's seeds."""
    columns: Mapping[str, float | None]
    """The score by each reward, None where it failed; and the image's statistics."""


_IMAGE = pa.struct([pa.field("bytes", pa.binary()), pa.field("path", pa.string())])

_SAMPLE_COLUMNS = [
    ("sample_id", pa.string()),
    ("shard", pa.int32()),
    ("index", pa.int32()),
    ("prompt", pa.string()),
    ("prompt_metadata", pa.string()),
    ("seed", pa.int64()),
    ("policy_digest", pa.string()),
    ("sampler_digest", pa.string()),
    ("log_prob_mean", pa.float32()),
]
_ROLLOUT_COLUMNS = [*_SAMPLE_COLUMNS, ("image", _IMAGE)]
# The metadata that datasets.Features writes: with it, `datasets` decodes the struct to an image.
_HUGGING_FACE = {
    "info": {
        "features": {
            name: {"_type": "Image"}
            if kind == _IMAGE
            else {"dtype": {"float": "float32"}.get(str(kind), str(kind)), "_type": "Value"}
            for name, kind in _ROLLOUT_COLUMNS
        }
    }
}
ROLLOUT_SCHEMA = pa.schema(_ROLLOUT_COLUMNS, {"huggingface": json.dumps(_HUGGING_FACE)})
"""Schema of the rollouts table."""
SAMPLE_SCHEMA = pa.schema(_SAMPLE_COLUMNS)
"""Schema of the samples table: the rollouts table without its images."""
REWARD_SCHEMA = pa.schema(
    [("sample_id", pa.string()), ("reward", pa.float32()), ("status", pa.string())]
)
"""Schema of the rewards table, without the columns that a scorer adds."""
ADVANTAGE_SCHEMA = pa.schema(
    [
        ("sample_id", pa.string()),
        ("reward", pa.float32()),
        ("status", pa.string()),
        ("count", pa.int64()),
    ]
)
"""Schema of the advantages table, without the columns that an algorithm adds."""

EVALUATION_SCHEMA = pa.schema(
    [("sample_id", pa.string()), ("prompt", pa.string()), ("seed", pa.int64())]
)
"""Schema of the evaluations table, without the columns of rewards and statistics."""

# Dictionary encoding only pays off for columns whose values repeat.
_REPEATED = ("prompt", "policy_digest", "sampler_digest", "status")
_COLUMN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_./:-]{0,99}")


def encode_rollouts(rows: Sequence[RolloutRow]) -> bytes:
    """Return rollout rows, in any order, as a Parquet file.

    Raises:
        InvalidTable: A sample occurs twice.
    """
    records = [
        {
            **_sample_record(row),
            "image": {"bytes": row.image_png, "path": image_name(row.index)},
        }
        for row in rows
    ]
    return _encode("rollouts", records, ROLLOUT_SCHEMA)


def decode_rollouts(data: bytes) -> list[RolloutRow]:
    """Return the rows of a Parquet file that `encode_rollouts` made, in the order of `sample_id`.

    Raises:
        UnreadableData: The bytes are not a rollouts table, or a page's checksum does not match.
    """
    rows = []
    for record in _decode("rollouts", data, ROLLOUT_SCHEMA):
        record["prompt_metadata"] = json.loads(record["prompt_metadata"])
        record["image_png"] = record.pop("image")["bytes"]
        rows.append(RolloutRow(**record))
    return rows


def encode_samples(rows: Sequence[SampleRow]) -> bytes:
    """Return the rows, in any order, as a Parquet file without their images.

    Raises:
        InvalidTable: A sample occurs twice.
    """
    return _encode("samples", [_sample_record(row) for row in rows], SAMPLE_SCHEMA)


def decode_samples(data: bytes) -> list[SampleRow]:
    """Return the rows of a Parquet file that `encode_samples` made, in the order of `sample_id`.

    Raises:
        UnreadableData: The bytes are not a samples table, or a page's checksum does not match.
    """
    rows = []
    for record in _decode("samples", data, SAMPLE_SCHEMA):
        record["prompt_metadata"] = json.loads(record["prompt_metadata"])
        rows.append(SampleRow(**record))
    return rows


def _sample_record(row: SampleRow) -> dict[str, Any]:
    record = {name: getattr(row, name) for name in SAMPLE_SCHEMA.names}
    return {**record, "prompt_metadata": canonical_json(row.prompt_metadata).decode()}


def encode_rewards(rows: Sequence[RewardRow]) -> bytes:
    """Return reward rows, in any order, as a Parquet file.

    Extra columns come last, sorted by name. They are null in rows that lack them.

    Raises:
        InvalidTable: A sample occurs twice; or an extra column has a bad name, or mixes numbers
            and text.
    """
    names = sorted({name for row in rows for name in row.columns})
    extra = [(name, _column_type(name, rows)) for name in names]
    records = [{**_fields(row, "columns"), **row.columns} for row in rows]
    schema = pa.schema([*REWARD_SCHEMA, *(pa.field(name, kind) for name, kind in extra)])
    return _encode("rewards", records, schema)


def decode_rewards(data: bytes) -> list[RewardRow]:
    """Return the rows of a Parquet file that `encode_rewards` made, in the order of `sample_id`.

    An extra column that is null is left out of its row.

    Raises:
        UnreadableData: The bytes are not a rewards table, or a page's checksum does not match.
    """
    rows = []
    for record in _decode("rewards", data, REWARD_SCHEMA):
        own = {name: record.pop(name) for name in REWARD_SCHEMA.names}
        columns = {name: value for name, value in record.items() if value is not None}
        rows.append(RewardRow(**own, columns=columns))
    return rows


def encode_advantages(rows: Sequence[AdvantageRow], columns: Mapping[str, str]) -> bytes:
    """Return an epoch's credit, rows in any order, as a Parquet file.

    Args:
        rows: The rows.
        columns: Arrow types of the algorithm's columns, by name. They come last, in this order.

    Raises:
        InvalidTable: A sample occurs twice.
    """
    extra = [pa.field(name, pa.type_for_alias(kind)) for name, kind in columns.items()]
    records = [{**_fields(row, "columns"), **row.columns} for row in rows]
    return _encode("advantages", records, pa.schema([*ADVANTAGE_SCHEMA, *extra]))


def decode_advantage_rewards(data: bytes) -> list[float | None]:
    """Return the rewards in a table of advantages; None where a sample has none.

    Raises:
        UnreadableData: Not such a table.
    """
    column = pa.schema([ADVANTAGE_SCHEMA.field("reward")])
    return [row["reward"] for row in _decode("advantages", data, column, column.names)]


def decode_advantages(data: bytes) -> list[AdvantageRow]:
    """Return the rows of a Parquet file that `encode_advantages` made, by `sample_id`.

    Raises:
        UnreadableData: The bytes are not an advantages table, or a page's checksum does not match.
    """
    rows = []
    for record in _decode("advantages", data, ADVANTAGE_SCHEMA):
        common = {name: record.pop(name) for name in ADVANTAGE_SCHEMA.names}
        rows.append(AdvantageRow(**common, columns=record))
    return rows


def encode_evaluation(rows: Sequence[EvaluationRow]) -> bytes:
    """Return the rows of an evaluation, in any order, as a Parquet file.

    The columns of rewards and statistics are float64 and sorted by name.

    Raises:
        InvalidTable: An image occurs twice.
    """
    names = sorted({name for row in rows for name in row.columns})
    records = [{**_fields(row, "columns"), **row.columns} for row in rows]
    extra = [pa.field(name, pa.float64()) for name in names]
    return _encode("evaluations", records, pa.schema([*EVALUATION_SCHEMA, *extra]))


def decode_evaluation(data: bytes) -> list[EvaluationRow]:
    """Return the rows of a file that `encode_evaluation` made, in the order of `sample_id`.

    Raises:
        UnreadableData: The bytes are not such a table, or a page's checksum does not match.
    """
    rows = []
    for record in _decode("evaluations", data, EVALUATION_SCHEMA):
        common = {name: record.pop(name) for name in EVALUATION_SCHEMA.names}
        rows.append(EvaluationRow(**common, columns=record))
    return rows


def _fields(row: Any, *without: str) -> dict[str, Any]:
    return {name: value for name, value in vars(row).items() if name not in without}


def _encode(table: str, records: list[dict[str, Any]], schema: pa.Schema) -> bytes:
    records = sorted(records, key=lambda record: record["sample_id"])
    for first, second in itertools.pairwise(records):
        if first["sample_id"] == second["sample_id"]:
            raise InvalidTable(table, f"{first['sample_id']} twice", "one row per sample")
    try:
        arrow = pa.Table.from_pylist(records, schema)
    except (pa.ArrowException, OverflowError) as error:
        raise InvalidTable(table, f"a value of another type ({error})", str(schema)) from error
    sink = pa.BufferOutputStream()
    repeated: Any = [name for name in schema.names if name in _REPEATED]  # typed as bool only
    pq.write_table(
        arrow, sink, compression="zstd", use_dictionary=repeated, write_page_checksum=True
    )
    return sink.getvalue().to_pybytes()


def _decode(
    table: str, data: bytes, schema: pa.Schema, columns: list[str] | None = None
) -> list[dict[str, Any]]:
    """Return a table's rows, of all columns or of some, checked to have those of a schema."""
    try:
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        _check_claims(table, file.metadata)
        read = file.read(columns)
    except (pa.ArrowException, OSError) as error:
        raise UnreadableData(f"a {table} table", str(error)) from error
    found = {name: read.schema.field(name).type for name in read.schema.names}
    for name, kind in zip(schema.names, schema.types, strict=True):
        if found.get(name) != kind:
            reason = f"column {name} is {found.get(name, 'absent')}, expected {kind}"
            raise UnreadableData(f"a {table} table", reason)
    return read.to_pylist()


def _check_claims(table: str, metadata: pq.FileMetaData) -> None:
    """Refuse a small file that would decompress to more memory than any real table needs."""
    groups = (metadata.row_group(number) for number in range(metadata.num_row_groups))
    unfolded = sum(group.total_byte_size for group in groups)
    if metadata.num_rows > INDEX_LIMIT or unfolded > UNFOLDED_LIMIT_BYTES:
        raise UnreadableData(
            f"a {table} table",
            f"it claims {metadata.num_rows} rows of {unfolded} bytes in all; expected at most "
            f"{INDEX_LIMIT} rows of {UNFOLDED_LIMIT_BYTES} bytes",
        )


def _column_type(name: str, rows: Sequence[RewardRow]) -> pa.DataType:
    taken = PARTITION_NAMES.union(REWARD_SCHEMA.names)
    if name in taken or not _COLUMN_NAME.fullmatch(name):
        raise InvalidTable(
            "rewards",
            f"an extra column {name!r}",
            "a letter or '_', then letters, digits or one of _ . / : -; and none of "
            f"{sorted(taken)}",
        )
    values = [row.columns[name] for row in rows if name in row.columns]
    if all(isinstance(value, str) for value in values):
        return pa.string()
    if all(isinstance(value, int) for value in values):
        return pa.int64()
    if all(isinstance(value, int | float) for value in values):
        return pa.float32()
    raise InvalidTable(
        "rewards",
        f"values of {sorted({type(value).__name__ for value in values})} in column {name!r}",
        "numbers only, or text only",
    )
