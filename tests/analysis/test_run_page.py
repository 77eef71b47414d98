"""A run's page: what it says, that nothing in it is code of somebody else, and its size."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ddpo.analysis.evaluation.alarms import alarms
from ddpo.analysis.evaluation.plan import evaluation_set
from ddpo.analysis.history import History
from ddpo.analysis.page.content import (
    Content,
    Evaluated,
    Extremes,
    Pictures,
    PromptRewards,
    Sample,
    Step,
    read_content,
)
from ddpo.analysis.page.device_time import DeviceTime
from ddpo.analysis.page.render import Command, render, write_page
from ddpo.analysis.page.thumbnails import even, thumbnail_uri, within
from ddpo.analysis.rewards import EpochRewards, reward_curve
from ddpo.basics.images import encode_image
from ddpo.config import EvaluationConfig, GateConfig, PicturesConfig
from ddpo.errors import NotInHistory
from ddpo.runs import Run, start_run
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT, EVALUATION
from ddpo.store.upkeep.epoch_retention import retire_epochs
from ddpo_workflow.tasks.evaluate import (
    sample_evaluation,
    score_evaluation,
    shards_of,
    summarize_evaluation,
)
from ddpo_workflow.tasks.pictures import draw_pictures, picture_set
from ddpo_workflow.tasks.start import start
from tests.analysis.browser import SCHEMES, WIDTHS, Scheme, check_appearance, visited
from tests.fold import run_epochs
from tests.recorded import EPOCHS, SAMPLES, record_run
from tests.tiny import tiny_config

HOSTILE = "</script><img src=https://evil.example/x onerror=alert(1)>\"'&"
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
LARGEST_BYTES = 15 * 10**6
MOST_ELEMENTS = 1500


class Elements(HTMLParser):
    """All elements of a page, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]

    def handle_data(self, data: str) -> None:
        self.text += data

    def values(self, tag: str, name: str) -> list[str]:
        return [value for t, n, value in self.attributes if (t, n) == (tag, name)]


def slides(page: str) -> list[dict[str, Any]]:
    (found,) = re.findall(r'<script type="application/json" id="slides">(.*?)</script>', page)
    return json.loads(found)["steps"]


def noise(side: int, seed: int) -> str:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    return thumbnail_uri(encode_image(Image.fromarray(pixels)))


def long_run(epochs: int = 500, side: int = 256) -> Content:
    """What a page of a long run with many images says."""
    random.seed(0)
    image = [noise(side, seed) for seed in range(8)]
    every = [Step(epoch, tuple(image)) for epoch in even(range(epochs + 1), 60)]
    steps = within(every, 11 * 10**6, lambda step: sum(map(len, step.images)))
    sample = Sample("a cat", 0.5, image[0])
    gain = {"own/gain": 0.1, "own/gain_low": 0.05, "own/gain_high": 0.15}
    summary = {"own/mean": 0.4, "own/failed": 0.0, "images/dark": 0.1, "diversity": 0.3, **gain}
    return Content(
        run_id="night",
        reward="module:own",
        reward_id="own-00000000",
        curve=tuple(
            EpochRewards(e, e / epochs + random.random() / 9, 0.2, 64, 0, 0, False)
            for e in range(epochs)
        ),
        metrics={
            f"metric_{number}": [(epoch, random.random()) for epoch in range(epochs)]
            for number in range(20)
        },
        pictures=Pictures(
            tuple((f"prompt {number}", 0) for number in range(8)), tuple(steps), epochs + 1
        ),
        extremes=Extremes(epochs - 1, (sample,) * 6, (sample,) * 6),
        prompts=tuple(PromptRewards(f"prompt {n}", 70, 0.1, n / 500) for n in range(400)),
        gate="the gate ended training at checkpoint 5: <b>",
        champion="champion: checkpoint 4",
        evaluations=(
            Evaluated(
                "1a2b3c4d",
                "trained",
                3200,
                tuple((e, summary) for e in range(0, epochs, 10)),
                ("it is all <dark>",),
            ),
        ),
        epoch_s=31.5,
        device=DeviceTime(15_750.0, whole=False),
        stored={"rollouts": 3 * 10**9, "checkpoints": 4 * 10**8},
        facts={"Model": "starter", "Seed": "0"},
        identity={"seed": 0},
        operation={"epochs": epochs},
    )


@pytest.fixture(scope="module")
def recorded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A run of two epochs with pictures of every checkpoint, and a hostile prompt."""
    prompts = ["cat", HOSTILE]
    run = record_run(
        tiny_model,
        tmp_path_factory.mktemp("page") / "store",
        prompts={"name": "prompt_list", "parameters": {"prompts": prompts}},
    )
    pictures = picture_set(run, PicturesConfig(prompts=tuple(prompts), seeds=(0, 7)))
    checkpoints = {0: start.fn(run.handle), EPOCHS: run_epochs(run, EPOCHS)}
    for epoch, checkpoint in checkpoints.items():
        draw_pictures.fn(run.handle, checkpoint, pictures, epoch)
    return run


def test_a_page_says_what_its_run_did(recorded: Any, tmp_path: Path) -> None:
    file = write_page(recorded, tmp_path / "new" / "report.html", [Command("Resume:", "ddpo x")])
    page = file.read_text()
    found = Elements(page)

    curve = reward_curve(recorded)
    for each in (curve[0], curve[-1]):
        assert f"{each.mean:.4g} in epoch {each.epoch}" in found.text
    samples = History(recorded).samples(epochs=[EPOCHS - 1]).to_pylist()
    extremes = {max(s["reward"] for s in samples), min(s["reward"] for s in samples)}
    shown = found.values("img", "alt")
    assert all(any(alt.endswith(f"reward {e:.4g}") for alt in shown) for e in extremes)
    assert f"Best and worst samples of epoch {EPOCHS - 1}" in found.text

    rows = History(recorded).samples().to_pylist()
    for prompt in ("cat", HOSTILE):
        count = sum(row["prompt"] == prompt for row in rows)
        assert not count or f"{prompt}{count}" in found.text
    assert "clip fraction" in found.text and "seed: " in found.text and "ddpo x" in found.text
    assert f"{EPOCHS * SAMPLES:,}" in found.text
    assert "rollouts" in found.text and "trajectories" in found.text
    assert " device seconds (" in found.text

    steps = slides(page)
    assert [step["label"] for step in steps] == ["before training", f"after {EPOCHS} epochs"]
    assert [len(step["images"]) for step in steps] == [4, 4]
    assert steps[0]["images"][0] != steps[1]["images"][0]  # the same prompt and seed, trained
    assert found.values("input", "max") == ["1"]


def test_a_page_holds_no_code_but_its_own_and_needs_no_network(recorded: Any) -> None:
    content = replace(read_content(recorded), run_id=HOSTILE, reward=HOSTILE)
    page = render(content, [Command(HOSTILE, HOSTILE)])
    found = Elements(page)
    assert HOSTILE in found.text and HOSTILE not in page
    assert found.tags["script"] == 2 == page.count("</script>")
    assert found.tags["link"] == found.tags["iframe"] == 0
    assert not [name for _, name, _ in found.attributes if name.startswith("on")]
    assert POLICY in found.values("meta", "content")
    sources = [value for _, name, value in found.attributes if name in ("src", "href", "srcset")]
    assert sources and all(value.startswith("data:image/webp;base64,") for value in sources)
    assert not re.search(r"url\(|@import", page)
    assert all(found.values("img", "alt"))
    assert len(found.values("img", "alt")) == found.tags["img"]


def test_a_page_has_the_evaluations_of_its_run(tiny_model: Path, tmp_path: Path) -> None:
    config = EvaluationConfig(count=2, seeds=(0, 1), kl_samples=0)
    run = record_run(tiny_model, tmp_path / "store")
    baseline = None
    for epoch in (0, EPOCHS):
        baseline = evaluate(run, config, epoch, baseline)

    (evaluated,) = read_content(run).evaluations
    assert (evaluated.weights, evaluated.scores) == ("trained", 8)
    assert [epoch for epoch, _ in evaluated.checkpoints] == [0, EPOCHS]
    before, after = (metrics for _, metrics in evaluated.checkpoints)
    (first,) = [w for w in EVALUATION.partitions_of(run.store, run.run_id) if not w.epoch]
    rows = EVALUATION.require(run.store, first).rows()
    assert list(evaluated.alarms) == alarms(
        "jpeg_compressibility", after, before, rows, GateConfig()
    )
    found = Elements(render(read_content(run)))
    gain = evaluated.checkpoints[1][1]["jpeg_compressibility/gain"]
    assert "Evaluation of the trained weights" in found.text and f"  {gain:+.4f} ± " in found.text
    (dots,) = [d for d in found.values("path", "d") if re.fullmatch(r"(M\S+ \S+h0){2}", d)]
    assert dots.startswith("M0 ") and "M1000 " in dots  # the first and the last checkpoint


def evaluate(run: Run, config: EvaluationConfig, epoch: int, baseline: Any) -> Any:
    handle, where = run.handle, Partition(run.run_id, epoch)
    checkpoint = CHECKPOINT.find(run.store, where)
    assert checkpoint is not None
    images = evaluation_set(run, config)
    shards = range(len(shards_of(run, images)))
    drawn = [
        sample_evaluation.fn(handle, checkpoint, config, "trained", images.digest, epoch, shard)
        for shard in shards
    ]
    scores = [score_evaluation.fn(handle, drawn[shard], epoch, shard) for shard in shards]
    done = summarize_evaluation.fn(
        handle, config, "trained", images.digest, drawn, scores, baseline, epoch
    )
    return baseline or done


def test_a_page_leaves_out_what_retention_has_deleted(tiny_model: Path, tmp_path: Path) -> None:
    run = record_run(tiny_model, tmp_path / "store")
    before = read_content(run)
    assert retire_epochs(run.store, run.run_id, keep="checkpoints", older_than=1) == [0]
    after = read_content(run)
    assert sum(each.count for each in before.prompts) == EPOCHS * SAMPLES
    assert sum(each.count for each in after.prompts) == SAMPLES
    assert (after.curve, after.metrics, after.extremes) == (
        before.curve,
        before.metrics,
        before.extremes,
    )
    assert after.stored["trajectories"] < before.stored["trajectories"]
    assert after.stored["rollouts"] == sum(
        path.stat().st_size for path in (tmp_path / "store" / "rollouts").rglob("*.parquet")
    )


def test_credentials_in_settings_are_hidden(recorded: Any) -> None:
    content = read_content(recorded)
    secret = {"reward": {"endpoint": "https://me:hunter2@example.org/v1"}}
    page = render(
        replace(content, identity=secret, operation=secret, facts={"A": "x://u:hunter2@h"})
    )
    assert "hunter2" not in page and "example.org" in page


def test_a_run_without_an_epoch_has_no_page(tiny_model: Path, tmp_path: Path) -> None:
    run = start_run(tiny_config(tiny_model, storage={"root": str(tmp_path / "s")}), "empty")
    with pytest.raises(NotInHistory, match="has not committed an epoch"):
        write_page(run, tmp_path / "report.html")


def test_a_long_run_has_a_page_of_bounded_size() -> None:
    page = render(long_run())
    found = Elements(page)
    assert len(page.encode()) < LARGEST_BYTES
    assert sum(found.tags.values()) < MOST_ELEMENTS
    steps = slides(page)
    assert (steps[0]["epoch"], steps[-1]["epoch"]) == (0, 500) and len(steps) > 10
    assert f"{len(steps)} of 501 steps are shown" in found.text
    assert "Of 400 prompts" in found.text and "after 490 epochs" not in found.text
    assert "0.4000  +0.1000 ± 0.0500" in found.text
    assert "may exploit the reward: it is all <dark>." in found.text
    assert "The gate ended training at checkpoint 5: <b>." in found.text
    assert "Champion: checkpoint 4." in found.text


@pytest.mark.parametrize("value", [float("nan"), 0.0, -3.5])
def test_a_reward_that_is_constant_or_unknown_is_drawn(value: float) -> None:
    content = long_run(epochs=3, side=8)
    curve = tuple(replace(each, mean=value, std=0 * value) for each in content.curve)
    metrics = {"loss": [(0, value), (1, value)], "one": [(0, value)]}
    page = render(replace(content, curve=curve, metrics=metrics, evaluations=(), pictures=None))
    paths = Elements(page).values("path", "d")
    assert not any("nan" in path or "inf" in path for path in paths)


@pytest.mark.slow
def test_the_slider_shows_another_step_by_keyboard(recorded: Any, tmp_path: Path) -> None:
    file = write_page(recorded, tmp_path / "report.html")
    with visited(file, WIDTHS[0], "light") as page:
        from playwright.sync_api import expect

        slider, image = page.get_by_role("slider"), page.locator("img.now").first
        expect(page.locator("output")).to_have_text(f"after {EPOCHS} epochs")
        last = image.get_attribute("src")
        slider.focus()
        slider.press("ArrowLeft")
        expect(page.locator("output")).to_contain_text("before training")
        expect(image).to_have_attribute("alt", "cat, seed 0, before training")
        expect(slider).to_have_attribute("aria-valuetext", re.compile("before training"))
        first = image.get_attribute("src")
        assert first != last and first == slides(file.read_text())[0]["images"][0]
        slider.press("End")
        expect(image).to_have_attribute("src", last or "")


@pytest.mark.slow
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_page_can_be_read_on_a_phone_and_in_the_dark(
    recorded: Any, tmp_path: Path, scheme: Scheme, width: int
) -> None:
    """With every section, long names and values, and its details open."""
    real, long = read_content(recorded), long_run(epochs=30, side=64)
    unbroken = "x" * 200
    content = replace(
        real,
        run_id=unbroken,
        reward=f"module:{unbroken}",
        metrics=long.metrics,
        prompts=(*real.prompts, PromptRewards(unbroken, 1, 0.0, 1.0)),
        evaluations=(*long.evaluations, replace(long.evaluations[0], weights="average")),
        gate=f"the gate ended training at checkpoint 5: {unbroken}",
        facts={**real.facts, "Reward": unbroken},
    )
    file = tmp_path / "report.html"
    file.write_text(render(content, [Command("Resume:", "ddpo " * 90)]), encoding="utf-8")
    with visited(file, width, scheme) as page:
        check_appearance(page, width, scheme, "svg path:not(.band):not(.grid)")
