"""Preference pairs in Parquet files: which rows are read, and what is refused."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from ddpo.basics import trust
from ddpo.config import PreferencesConfig
from ddpo.errors import ConfigError, NotTrusted
from ddpo.preferences import PairFiles
from ddpo.runs.run import pair_files
from tests.preference_pairs import encoded, write_pairs


def read(path: Path, numbers: list[int], **columns: str) -> list[tuple[str, int, int]]:
    """Return prompt and gray levels of some pairs."""
    pairs = pair_files(PreferencesConfig(path=str(path), **columns)).read(numbers, (8, 8))
    return [
        (each.prompt.text, *(image.getpixel((0, 0))[0] for image in (each.chosen, each.rejected)))
        for each in pairs
    ]


def test_pairs_are_read_in_the_order_of_names_and_rows_across_files_and_row_groups(
    tmp_path: Path,
) -> None:
    """Files are named so that the order of their names is not that of writing."""
    write_pairs(tmp_path / "data/b.parquet", range(5, 9), row_group=3)
    write_pairs(tmp_path / "data/a.parquet", range(5), row_group=2)
    write_pairs(tmp_path / ".cache/0.parquet", range(100, 103))
    expected = [(f"prompt {n}", n, 200 - n) for n in range(9)]
    assert read(tmp_path, list(range(9))) == expected
    assert read(tmp_path, [7, 2, 2, 4]) == [expected[n] for n in (7, 2, 2, 4)]
    assert read(tmp_path, [8, 9, 10, 19]) == [expected[n] for n in (8, 0, 1, 1)]  # and again
    assert len(pair_files(PreferencesConfig(path=str(tmp_path)))) == 9
    assert read(tmp_path / "data" / "b.parquet", [1]) == expected[6:7]


def test_images_are_bytes_or_structs_in_columns_of_any_name(tmp_path: Path) -> None:
    """As Hugging Face datasets writes them, and plain."""
    table = pa.table(
        {
            "caption": ["a cat"],
            "better": pa.array([encoded(9, "JPEG")], pa.large_binary()),
            "worse": [{"bytes": encoded(90), "path": None}],
            "prompt": ["another"],
        }
    )
    pq.write_table(table, tmp_path / "x.parquet")
    named = {"prompt": "caption", "chosen": "better", "rejected": "worse"}
    assert read(tmp_path, [0], **named) == [("a cat", 9, 90)]


def test_the_digest_is_of_files_names_and_columns(tmp_path: Path) -> None:
    def digest(folder: str, **columns: str) -> str:
        return pair_files(PreferencesConfig(path=str(tmp_path / folder), **columns)).digest

    write_pairs(tmp_path / "one" / "a.parquet", range(3))
    write_pairs(tmp_path / "same" / "a.parquet", range(3))
    write_pairs(tmp_path / "named" / "b.parquet", range(3))
    write_pairs(tmp_path / "other" / "a.parquet", range(1, 4))
    assert digest("one") == digest("same")
    swapped = digest("one", chosen="rejected", rejected="chosen")
    assert len({digest("one"), digest("named"), digest("other"), swapped}) == 4


@pytest.mark.parametrize(
    ("columns", "told"),
    [
        ({}, r"a\.parquet in .* has no column 'chosen', but 'prompt', 'jpg_0'; .*preferences\.cho"),
        ({"prompt": "text"}, r"has no column 'text'.* preferences\.prompt"),
    ],
)
def test_a_missing_column_is_named_with_those_that_are_there(
    tmp_path: Path, columns: dict[str, str], told: str
) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "jpg_0": [b""]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=told):
        read(tmp_path, [0], **columns)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"prompt": " "}, "a prompt must be text that is not blank"),
        ({"prompt": None}, "a prompt must be text that is not blank"),
        ({"chosen": b"no image"}, "the image in column 'chosen' cannot be read"),
        ({"rejected": None}, "column 'rejected' has no image bytes there, but NoneType"),
    ],
)
def test_a_row_that_cannot_be_used_is_named_with_a_way_out(
    tmp_path: Path, row: dict[str, Any], told: str
) -> None:
    good = {"prompt": "a cat", "chosen": encoded(1), "rejected": encoded(2)}
    rows = [good, good, {**good, **row}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    assert len(read(tmp_path, [0, 1])) == 2
    with pytest.raises(ConfigError, match=rf"row 0 of row group 1 in .*a\.parquet: {told}.* fork"):
        read(tmp_path, [2])


def test_what_holds_no_pairs_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no Parquet files \(\*\.parquet\) in .*nothing"):
        read(tmp_path / "nothing", [0])
    write_pairs(tmp_path / "empty.parquet", range(0))
    with pytest.raises(ConfigError, match="holds no preference pairs"):
        read(tmp_path, [0])
    (tmp_path / "empty.parquet").write_bytes(b"PAR1 but not whole")
    with pytest.raises(ConfigError, match=r"cannot read preference pairs from .*empty\.parquet"):
        read(tmp_path, [0])


def test_a_stored_run_reads_no_files_here_until_it_is_trusted(tmp_path: Path) -> None:
    write_pairs(tmp_path / "a.parquet", range(2))
    with trust.acting_for("run 'r'", "0" * 64), pytest.raises(NotTrusted, match="preference pairs"):
        PairFiles(str(tmp_path), prompt="prompt", chosen="chosen", rejected="rejected")


def test_images_are_upright_scaled_and_cropped_to_the_middle(tmp_path: Path) -> None:
    """A wide image with a red left, a green middle and a blue right; and one turned by its file."""
    colours = np.eye(3, dtype=np.uint8).repeat(16, axis=0)[None].repeat(16, axis=0) * 255
    wide, turned = io.BytesIO(), io.BytesIO()
    Image.fromarray(colours).save(wide, "PNG")
    halves = np.zeros((16, 16, 3), np.uint8)
    halves[:8] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: to be turned by 90 degrees clockwise
    Image.fromarray(halves).save(turned, "PNG", exif=exif)
    row = {"prompt": "a cat", "chosen": wide.getvalue(), "rejected": turned.getvalue()}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    (pair,) = pair_files(PreferencesConfig(path=str(tmp_path))).read([0], (8, 8))
    assert pair.chosen.size == pair.rejected.size == (8, 8)
    middle = np.asarray(pair.chosen)[:, 2:6].astype(int)  # the filter reaches past the edge a bit
    assert abs(middle - (0, 255, 0)).max() <= 2
    upright = np.asarray(pair.rejected).astype(int)
    assert upright[:, 6:].min() > 250 and upright[:, :2].max() < 5
