"""Preference pairs to test with: gray images in Parquet files."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def encoded(gray: int, kind: str = "PNG", size: tuple[int, int] = (24, 20)) -> bytes:
    """Return an encoded image of one gray level."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (gray, gray, gray)).save(buffer, kind, quality=100)
    return buffer.getvalue()


def write_pairs(file: Path, numbers: Sequence[int], row_group: int = 100) -> Path:
    """Write a file of pairs: of pair n, the chosen image has gray level n, the other 200 - n."""
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        "prompt": pa.array([f"prompt {n}" for n in numbers], pa.string()),
        "chosen": pa.array([{"bytes": encoded(n), "path": None} for n in numbers], image),
        "rejected": pa.array([{"bytes": encoded(200 - n), "path": None} for n in numbers], image),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), file, row_group_size=row_group)
    return file.parent
