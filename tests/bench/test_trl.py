"""bench.trl: the starter as TRL's older libraries read it, and how its epochs are cut."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image

from bench import trl, trl_worker
from ddpo.rewards.builtin.jpeg import jpeg_kb
from ddpo.starter import STARTER_PATH


def test_the_tokenizer_is_written_as_vocabulary_and_merges(tmp_path: Path) -> None:
    folder = trl.pipeline_for_older_libraries(tmp_path / "starter")
    model = json.loads((STARTER_PATH / "tokenizer/tokenizer.json").read_text())["model"]
    files = folder / "tokenizer"
    assert json.loads((files / "vocab.json").read_text()) == model["vocab"]
    merges = (files / "merges.txt").read_text().splitlines()[1:]
    assert [tuple(line.split(" ")) for line in merges] == [tuple(m) for m in model["merges"]]
    assert not (files / "tokenizer.json").exists()


def test_both_sides_compute_one_reward() -> None:
    pixels = torch.randint(0, 256, (2, 3, 16, 16), generator=torch.Generator().manual_seed(0))
    found, _ = trl_worker.minus_jpeg_kb(pixels / 255, ("", ""), ({}, {}))
    images = [Image.fromarray(p.permute(1, 2, 0).to(torch.uint8).numpy()) for p in pixels]
    assert found.tolist() == torch.tensor([-jpeg_kb(image) for image in images]).tolist()


def test_every_way_of_cutting_makes_whole_epochs() -> None:
    for each in trl.batches_of(48):
        assert 48 % each.sample == 0
        assert each.sample % each.train == 0
