"""Temporary files of the store: without a name on Linux, and with one where that is impossible."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from ddpo.basics import mapped
from ddpo.basics.mapped import stack_on_disk
from ddpo.store import nameless
from ddpo.store.objects import Store


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder for temporary files."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    return folder


@pytest.fixture(params=[True, False], ids=["linux", "elsewhere"])
def names(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """How many names a file has while it is used."""
    if request.param:
        return 0
    monkeypatch.setattr(nameless, "_DESCRIPTORS", tmp_path / "not there")
    return 1


def test_an_object_is_fetched_and_nothing_is_left(
    tmp_path: Path, temporary: Path, names: int
) -> None:
    store = Store.open(str(tmp_path / "store"))
    stored = store.put("trajectories/a", "bin", b"some bytes")
    with store.fetch(stored) as file:
        assert file.read_bytes() == b"some bytes"
        assert len(list(temporary.iterdir())) == names
    assert not list(temporary.iterdir())


def test_a_file_is_made_and_nothing_is_left(temporary: Path, names: int) -> None:
    with nameless.made_file(lambda path: path.write_bytes(b"made")) as file:
        assert file.read_bytes() == b"made"
        assert len(list(temporary.iterdir())) == names
    assert not list(temporary.iterdir())


def test_a_tensor_is_mapped_where_the_system_cannot_reserve_room(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    parts = torch.arange(700_000, dtype=torch.float32).view(7, -1)
    whole = stack_on_disk((part[None] for part in parts), 7)
    assert torch.equal(whole, parts) and not caplog.records
    assert not list(temporary.iterdir())


def test_a_tensor_stays_in_memory_where_the_disk_is_full(
    temporary: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(descriptor: int, data: bytes, start: int) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.delattr(os, "posix_fallocate")
    monkeypatch.setattr(mapped.os, "pwrite", full)
    parts = torch.arange(6.0).view(2, 3)
    assert torch.equal(stack_on_disk(iter([parts]), 2), parts)
    assert "stay in memory" in caplog.text
