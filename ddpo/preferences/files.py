"""Preference pairs in Parquet files, such as a folder of Hugging Face datasets.

Pairs are read in the order of the files' names and of their rows, a row group at a time, so that
memory holds one row group and never the whole set.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageOps

from ddpo.basics import trust
from ddpo.basics.digests import files_digest, json_digest
from ddpo.basics.images import DECODING_ERRORS, PIXEL_LIMIT, as_rgb
from ddpo.basics.once import once_property
from ddpo.basics.paths import expand
from ddpo.errors import ConfigError
from ddpo.prompts import Prompt


@dataclass(frozen=True)
class Pair:
    """A prompt, and two images of it."""

    row: int
    """Its number among all pairs, from 0."""
    prompt: Prompt
    """What both images show."""
    chosen: Image.Image
    """The preferred image, RGB."""
    rejected: Image.Image
    """The other one."""


@dataclass(frozen=True)
class _Group:
    """A row group of a file."""

    file: Path
    number: int
    rows: range
    """The numbers of its pairs among all."""


class PairFiles:
    """The preference pairs of a Parquet file, or of all Parquet files in a folder.

    Args:
        path: The file or folder.
        prompt: The column of prompts, text.
        chosen: The column of preferred images: encoded bytes, or structs with a field ``bytes``, as
            Hugging Face datasets writes images.
        rejected: The column of the other images.

    Raises:
        ConfigError: There are no such files, one of them lacks a column, or there is no pair.
        NotTrusted: A stored run that is not trusted names them.
    """

    def __init__(self, path: str, *, prompt: str, chosen: str, rejected: str) -> None:
        self.path = Path(expand(path)).absolute()
        trust.check_trusted(f"its preference pairs are files on this machine, {self.path}")
        self.columns = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
        self._files = _parquet_files(self.path)
        self._groups = list(self._described())
        if not self._groups:
            raise ConfigError(f"{self.path} holds no preference pairs; expected at least one row")

    def __len__(self) -> int:
        return self._groups[-1].rows.stop

    @once_property
    def digest(self) -> str:
        """sha256 over names and contents of the files, and the columns that are read."""
        return json_digest([files_digest(self._files), self.columns])

    def read(self, numbers: Sequence[int], size: tuple[int, int]) -> list[Pair]:
        """Read some pairs. Each image is scaled and cropped before the next one is decoded.

        Args:
            numbers: Theirs, from 0; a number past the end starts again at the first.
            size: Width and height of the images in pixels.

        Raises:
            ConfigError: A pair has no prompt, or an image that cannot be read.
        """
        wanted = [number % len(self) for number in numbers]
        found: dict[int, Pair] = {}
        for group in self._groups:
            rows = sorted({number for number in wanted if number in group.rows})
            if rows:
                found |= {pair.row: pair for pair in self._pairs(group, rows, size)}
        return [found[number] for number in wanted]

    def _described(self) -> Iterator[_Group]:
        first = 0
        for name, file in self._files:
            try:
                described = pq.read_metadata(file)
            except (OSError, pa.ArrowException) as error:
                raise ConfigError(f"cannot read preference pairs from {file}: {error}") from error
            present = described.schema.to_arrow_schema().names
            for use, column in self.columns.items():
                if column not in present:
                    raise ConfigError(
                        f"{name} in {self.path} has no column {column!r}, but "
                        f"{', '.join(map(repr, present))}; name the right one with "
                        f"preferences.{use}"
                    )
            for number in range(described.num_row_groups):
                count = described.row_group(number).num_rows
                if count:
                    yield _Group(file, number, range(first, first + count))
                first += count

    def _pairs(self, group: _Group, rows: Sequence[int], size: tuple[int, int]) -> Iterator[Pair]:
        columns = list(dict.fromkeys(self.columns.values()))
        try:
            with pq.ParquetFile(group.file) as file:
                table = file.read_row_group(group.number, columns)
            taken = table.take([row - group.rows.start for row in rows])
        except (OSError, pa.ArrowException) as error:
            raise ConfigError(f"cannot read preference pairs from {group.file}: {error}") from error
        for row, values in zip(rows, taken.to_pylist(), strict=True):
            place = f"row {row - group.rows.start} of row group {group.number} in {group.file}"
            try:
                yield Pair(
                    row,
                    Prompt(values[self.columns["prompt"]]),
                    _image(values[self.columns["chosen"]], self.columns["chosen"], size),
                    _image(values[self.columns["rejected"]], self.columns["rejected"], size),
                )
            except ConfigError as error:
                raise ConfigError(
                    f"a preference pair cannot be used, {place}: {error}. Mend the row or leave it "
                    "out, and start another run, or a fork of this one (`ddpo fork RUN --epoch N "
                    "--set fork.rollouts=0`), which keeps what was learned"
                ) from error


def _parquet_files(path: Path) -> list[tuple[str, Path]]:
    """Return the files with their names below the folder, in the order of names."""
    if path.is_file():
        return [(path.name, path)]
    found = [
        (str(file.relative_to(path)), file)
        for file in path.rglob("*.parquet")
        if not any(part.startswith(".") for part in file.relative_to(path).parts)
    ]
    if not found:
        raise ConfigError(
            f"there are no Parquet files (*.parquet) in {path}; expected preference pairs there, "
            "with the columns prompt, chosen and rejected, such as `datasets` writes with "
            "Dataset.to_parquet"
        )
    return sorted(found)


def _image(value: Any, column: str, size: tuple[int, int]) -> Image.Image:
    """Decode an image of any format that Pillow knows, as RGB: its middle, with nothing stretched.

    Upright, as people saw it: cameras turn a photograph by a note in the file.
    """
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise ConfigError(
            f"column {column!r} has no image bytes there, but {type(value).__name__}; store the "
            "encoded images in the file"
        )
    try:
        image = Image.open(io.BytesIO(data))
        if image.width * image.height > PIXEL_LIMIT:
            raise ValueError(f"it has {image.width}x{image.height}, more than 4096x4096 pixels")
        upright = as_rgb(ImageOps.exif_transpose(image))
        return ImageOps.fit(upright, size, Image.Resampling.LANCZOS)
    except DECODING_ERRORS as error:
        raise ConfigError(f"the image in column {column!r} cannot be read: {error}") from error
