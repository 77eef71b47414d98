"""What is read from a store is not believed: it is checked before it takes memory."""

from __future__ import annotations

import io
import json
import struct
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ddpo.basics.digests import sha256_bytes
from ddpo.basics.images import decode_image, encode_image
from ddpo.errors import CorruptObject, UnreadableData
from ddpo.store import tables, tensors
from ddpo.store.objects import Store
from ddpo.store.tables import RewardRow, decode_rewards, encode_rewards
from ddpo.store.tensors import read_tensors


def test_an_object_of_another_size_is_never_read_whole(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = store.put("a/b", ".parquet", b"as committed")
    huge = b"x" * 100_000
    store._backend.write(store._full(stored.key), huge)
    monkeypatch.setattr(store._fs, "cat_file", lambda *_, **__: pytest.fail("read whole"))
    with pytest.raises(CorruptObject) as caught:
        store.get(stored)
    assert (caught.value.expected, caught.value.found) == (stored.sha256, sha256_bytes(huge))


def test_pictures_come_back_as_they_were() -> None:
    image = Image.effect_noise((31, 17), 50).convert("RGB")
    assert decode_image(encode_image(image)).tobytes() == image.tobytes()


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        checked = kind + data
        return struct.pack(">I", len(data)) + checked + struct.pack(">I", zlib.crc32(checked))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (png_that_claims(5000, 5000), "5000x5000"),
        (png_that_claims(60_000, 60_000), "60000x60000|bomb"),
        (b"GIF89a" + bytes(20), "cannot identify"),
        (b"", "cannot identify"),
    ],
    ids=["many pixels", "bomb", "another format", "nothing"],
)
def test_a_picture_that_is_not_ours_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(UnreadableData, match=said):
        decode_image(data)


def test_a_jpeg_is_refused_though_pillow_could_read_it() -> None:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG")
    with pytest.raises(UnreadableData, match="cannot identify"):
        decode_image(file.getvalue())


def test_tensors_in_numbers_or_headers_beyond_ours_are_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def decode_tensors(data: bytes) -> None:
        (tmp_path / "tensors").write_bytes(data)
        read_tensors(tmp_path / "tensors")

    monkeypatch.setattr(tensors, "TENSOR_LIMIT", 3)
    listed = {f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(4)}
    header = json.dumps(listed).encode()
    with pytest.raises(UnreadableData, match="lists 4 tensors, 3 at most"):
        decode_tensors(struct.pack("<Q", len(header)) + header)
    with pytest.raises(UnreadableData, match="header claims"):
        decode_tensors(struct.pack("<Q", 2**40) + b"{}")
    with pytest.raises(UnreadableData):
        decode_tensors(struct.pack("<Q", 2) + b"[]")


def test_a_table_that_unfolds_beyond_ours_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    small = encode_rewards([RewardRow("r/00000/000000", 1.0, "ok", {})])
    assert len(decode_rewards(small)) == 1
    monkeypatch.setattr(tables, "UNFOLDED_LIMIT_BYTES", 10)
    with pytest.raises(UnreadableData, match="claims 1 rows"):
        decode_rewards(small)
    monkeypatch.undo()
    monkeypatch.setattr(tables, "INDEX_LIMIT", 1)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"sample_id": ["a", "b"]}), sink)
    with pytest.raises(UnreadableData, match="claims 2 rows"):
        decode_rewards(sink.getvalue().to_pybytes())
