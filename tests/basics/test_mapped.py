"""Tensors in temporary files: what they hold, what memory they need, and where there is no room."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from ddpo.basics.mapped import stack_on_disk

MEASURE = """
import sys, torch
from ddpo.basics.mapped import stack_on_disk

def anonymous_mb():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(l for l in lines if l.startswith("RssAnon")).split()[1]) / 1000

def parts():
    for number in range(16):
        yield torch.full((4, 4_000_000), float(number))

torch.zeros(1)
before = anonymous_mb()
whole = stack_on_disk(parts(), 64)
print(whole.numel() * 4 / 1e6, anonymous_mb() - before, float(whole[::4, 0].sum()))
"""


def test_the_stack_is_that_of_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    parts = [torch.randn(rows, 3, 2) for rows in (4, 1, 2)]
    whole = stack_on_disk(iter(parts), 7)
    assert torch.equal(whole, torch.cat(parts))
    whole[0] = 1.0
    assert torch.equal(whole[0], torch.ones(3, 2))
    assert not list(tmp_path.iterdir())


def test_a_gigabyte_needs_the_memory_of_one_part() -> None:
    done = subprocess.run(
        [sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True
    )
    size_mb, grown_mb, total = map(float, done.stdout.split())
    assert size_mb == 1024.0 and total == sum(range(16))
    assert grown_mb < 200.0  # two parts, while one follows the other


def test_a_part_is_gone_before_the_next_one_is_made() -> None:
    before: list[weakref.ref[torch.Tensor]] = []

    def parts() -> Iterator[torch.Tensor]:
        for _ in range(3):
            assert all(part() is None for part in before)
            part = torch.ones(2, 3)
            before.append(weakref.ref(part))
            yield part
            del part

    assert torch.equal(stack_on_disk(parts(), 6), torch.ones(6, 3))


def test_without_room_for_the_file_the_stack_is_in_memory(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    parts = [torch.randn(2, 3), torch.randn(1, 3)]
    assert torch.equal(stack_on_disk(parts, 3), torch.cat(parts))
    assert "No space left on device" in caplog.text


@pytest.mark.parametrize("rows", [2, 4])
def test_a_wrong_number_of_rows_is_refused(rows: int) -> None:
    with pytest.raises((ValueError, RuntimeError)):
        stack_on_disk([torch.zeros(3, 1)], rows)
