from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest

from ddpo.algorithms import Rwr
from ddpo.errors import InvalidTable, UnreadableData
from ddpo.store import keys, tables
from ddpo.store.keys import Partition
from ddpo.store.kinds import ROLLOUTS
from ddpo.store.objects import Store
from tests.store.store_samples import (
    PNG,
    advantage_rows,
    digests,
    encode_advantages,
    reward_rows,
    rollout_rows,
)

TABLES = [
    (tables.encode_rollouts, tables.decode_rollouts, rollout_rows),
    (tables.encode_rewards, tables.decode_rewards, reward_rows),
    (encode_advantages, tables.decode_advantages, advantage_rows),
]
each_table = pytest.mark.parametrize(
    ("encode", "decode", "make"), TABLES, ids=["rollouts", "rewards", "advantages"]
)


@each_table
def test_rows_come_back_equal(encode, decode, make) -> None:
    assert decode(encode(make())) == make()
    assert decode(encode([])) == []


@each_table
def test_rows_are_ordered_by_sample_whatever_order_they_arrived_in(encode, decode, make) -> None:
    assert encode(make()[::-1]) == encode(make())
    assert decode(encode(make()[::-1])) == make()


@each_table
def test_a_sample_that_occurs_twice_is_refused(encode, decode, make) -> None:
    with pytest.raises(InvalidTable, match="R/00003/000000 twice"):
        encode([*make(), make()[0]])


@each_table
def test_no_column_has_the_name_of_a_partition_key(encode, decode, make) -> None:
    names = pq.read_schema(pa.BufferReader(encode(make()))).names
    assert names[0] == "sample_id"
    assert keys.PARTITION_NAMES.isdisjoint(names)


@each_table
def test_a_flipped_byte_of_data_is_named_by_the_page_checksum(encode, decode, make) -> None:
    whole = encode(make())
    column = pq.ParquetFile(pa.BufferReader(whole)).metadata.row_group(0).column(0)
    damaged = bytearray(whole)
    damaged[column.data_page_offset + column.total_compressed_size - 2] ^= 1
    with pytest.raises(UnreadableData, match=r"CRC|crc|checksum"):
        decode(bytes(damaged))


@each_table
def test_bytes_that_are_no_table_of_this_kind_are_named(encode, decode, make) -> None:
    for data in (b"", b"PAR1", encode(make())[:-20]):
        with pytest.raises(UnreadableData):
            decode(data)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"sample_id": [1]}), sink)
    with pytest.raises(UnreadableData, match="column sample_id is int64, expected string"):
        decode(sink.getvalue().to_pybytes())


@pytest.mark.slow
def test_another_process_writes_the_same_bytes(spawn: Callable) -> None:
    script = "import store_samples; print(*store_samples.digests())"
    assert spawn(script).communicate(timeout=600)[0].split() == digests()


def test_hugging_face_datasets_would_show_the_image_column() -> None:
    """The JSON that datasets 5.2.0 writes for these features (checked against it by hand)."""
    schema = pq.read_schema(pa.BufferReader(tables.encode_rollouts(rollout_rows())))
    value = {"_type": "Value"}
    expected = {
        "sample_id": {"dtype": "string", **value},
        "shard": {"dtype": "int32", **value},
        "index": {"dtype": "int32", **value},
        "prompt": {"dtype": "string", **value},
        "prompt_metadata": {"dtype": "string", **value},
        "seed": {"dtype": "int64", **value},
        "policy_digest": {"dtype": "string", **value},
        "sampler_digest": {"dtype": "string", **value},
        "log_prob_mean": {"dtype": "float32", **value},
        "image": {"_type": "Image"},
    }
    assert json.loads(schema.metadata[b"huggingface"]) == {"info": {"features": expected}}
    assert list(expected) == schema.names
    assert schema.field("image").type == pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def test_the_image_struct_holds_the_png_and_its_name() -> None:
    table = pq.read_table(pa.BufferReader(tables.encode_rollouts(rollout_rows())))
    assert table["image"].to_pylist()[2] == {"bytes": PNG + b"\x02", "path": "000002.png"}


def test_numbers_are_kept_in_the_documented_precision() -> None:
    row = tables.RewardRow("R/00000/000000", 0.1, "ok", {"x": 0.1, "n": 2**60, "t": "0.1"})
    table = pq.read_table(pa.BufferReader(tables.encode_rewards([row])))
    kinds = {field.name: str(field.type) for field in table.schema}
    assert kinds["reward"] == kinds["x"] == "float"
    assert (kinds["n"], kinds["t"]) == ("int64", "string")
    (read,) = tables.decode_rewards(tables.encode_rewards([row]))
    assert read.reward == pytest.approx(0.1, rel=1e-7)
    assert read.reward != 0.1
    assert read.columns["n"] == 2**60


@pytest.mark.parametrize("name", ["epoch", "run_id", "reward_name", "reward", "sample_id", "", "1"])
def test_extra_columns_that_clash_are_refused(name: str) -> None:
    with pytest.raises(InvalidTable, match="extra column"):
        tables.encode_rewards([replace(reward_rows()[0], columns={name: 1.0})])


def test_extra_columns_that_mix_numbers_and_text_are_refused() -> None:
    first, second = reward_rows()[:2]
    rows = [replace(first, columns={"x": 1.0}), replace(second, columns={"x": "one"})]
    with pytest.raises(InvalidTable, match=r"\['float', 'str'\] in column 'x'"):
        tables.encode_rewards(rows)


def test_a_value_that_does_not_fit_its_column_is_refused() -> None:
    with pytest.raises(InvalidTable):
        tables.encode_rollouts([replace(rollout_rows()[0], seed=2**63)])


def test_the_partitions_of_several_runs_and_epochs_read_as_one_table(local_store: Store) -> None:
    for run_id, epoch in [("A", 0), ("A", 1), ("B", 1)]:
        stem = ROLLOUTS.stem("rollouts", Partition(run_id, epoch, 0))
        local_store.put(stem, ".parquet", tables.encode_rollouts(rollout_rows(run_id, epoch)))
    folder = Path(local_store.url("rollouts").removeprefix("file://"))
    rollouts = ds.dataset(folder, format="parquet", partitioning="hive")
    assert rollouts.count_rows() == 12
    picked = rollouts.to_table(filter=(pc.field("epoch") == 1) & (pc.field("run_id") == "A"))
    assert picked["sample_id"].to_pylist() == [keys.sample_id("A", 1, i) for i in range(4)]
    assert set(picked.column_names) == {*tables.ROLLOUT_SCHEMA.names, "run_id", "epoch"}


def test_a_table_has_the_columns_of_its_algorithm_and_no_others() -> None:
    row = replace(advantage_rows()[0], columns={"weight": 0.125})
    data = tables.encode_advantages([row], Rwr.columns)
    assert tables.decode_advantages(data) == [row]
    found = pq.read_schema(pa.BufferReader(data))
    assert found.names == ["sample_id", "reward", "status", "count", "weight"]
    widths = pq.read_schema(pa.BufferReader(encode_advantages(advantage_rows())))
    kinds = {name: str(widths.field(name).type) for name in ("advantage", "mean", "std")}
    assert kinds == {"advantage": "float", "mean": "double", "std": "double"}


def test_a_table_that_lacks_a_column_is_refused_by_its_name() -> None:
    whole = pq.read_table(pa.BufferReader(encode_advantages(advantage_rows())))
    sink = pa.BufferOutputStream()
    pq.write_table(whole.drop_columns(["count"]), sink)
    with pytest.raises(UnreadableData, match="column count is absent"):
        tables.decode_advantages(sink.getvalue().to_pybytes())
