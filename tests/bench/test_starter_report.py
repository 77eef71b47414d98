"""What the starter's report draws and how it describes spread."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from PIL import Image

from bench import starter
from ddpo.starter.scenes import Kind


@pytest.mark.parametrize("kind", [Kind.SINGLE, Kind.ACTIVITY, Kind.COUNT])
def test_every_animal_is_drawn_with_every_seed(kind: Kind) -> None:
    wanted = starter.asked(kind, 20)
    assert Counter(scene.name for scene in wanted) == dict.fromkeys(starter.ANIMALS, 20)
    assert {scene.kind for scene in wanted} == {kind}
    turns = Counter((scene.activity, scene.count) for scene in wanted)
    assert set(turns.values()) == {900 if kind is Kind.SINGLE else 300}
    assert sum(scene.held_out for scene in wanted) == (180 if kind is Kind.ACTIVITY else 0)


def test_spread_tells_seeds_and_prompts_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    draws = np.random.default_rng(0)
    means = draws.normal(5, 0.5, 400)
    sizes = iter((means[:, None] + draws.normal(0, 0.2, (400, 20))).ravel())
    monkeypatch.setattr(starter, "jpeg_kb", lambda image: next(sizes))
    said = starter.spread([Image.new("RGB", (1, 1))] * 8000, 20)
    assert "0.20 between seeds of one prompt" in said
    between = float(said.rsplit(", ", 1)[1].split()[0])
    assert between == pytest.approx(0.5, abs=0.05)
