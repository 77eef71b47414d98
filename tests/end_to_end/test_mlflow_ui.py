"""What a person finds in MLflow's own UI: the runs, the curves, the pictures, the adapter."""

import re
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import safetensors.numpy

pytest.importorskip("playwright", reason="playwright is not installed (pip install playwright)")

from playwright.sync_api import expect

from bench import screenshots
from ddpo_workflow.flows.train import train
from ddpo_workflow.tasks.tracking.connection import connect
from ddpo_workflow.tasks.tracking.tracker import RunTracker

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(screenshots.find_browser() is None, reason="no Chromium on the PATH"),
]

LAST_STEP = 2
COMMAND = "ddpo resume night-1"
BASE_MODEL = "example/tiny-diffusion"


@pytest.fixture
def uri(tmp_path: Path) -> str:
    """A store with one run: curves and pictures of three steps, and an adapter."""
    address = f"sqlite:///{tmp_path}/mlflow.db"
    tracker = RunTracker.open(
        tracking_uri=address, experiment="ddpo", run_id="night-1", uid="1a2b",
        params={"model": "starter", "reward": "ocr", "seed": 7},
        tags={"ddpo.epochs": "3", "ddpo.command": COMMAND},
    )  # fmt: skip
    for step in range(LAST_STEP + 1):
        metrics = {"reward/mean": step**2, "scores/failed": 0, "update/loss": 1 / (step + 1)}
        tracker.log_metrics(metrics, step)
        tracker.log_text("reward,prompt\n1.5,a cat\n", f"samples/epoch-{step:05}.csv")
        picture = PIL.Image.new("RGB", (64, 64), (80 * step, 40, 40))
        tracker.log_image("samples/a_cat", picture, step)
    lora = tmp_path / "pytorch_lora_weights.safetensors"
    safetensors.numpy.save_file({"unet.x.lora_A.weight": np.ones((4, 8), np.float32)}, lora)
    tracker.log_adapter(lora, base_model=BASE_MODEL, name="adapter", step=LAST_STEP)
    tracker.finish("FINISHED")
    rescored = RunTracker.open(
        tracking_uri=address, experiment="ddpo", run_id="night-1-by-x", uid="1a2b-by-x",
        params={}, tags={}, parent={"ddpo.uid": "1a2b"},
    )  # fmt: skip
    for step in range(LAST_STEP + 1):
        rescored.log_metrics({"agreement/pearson": 0.5 * step - 1}, step)
    rescored.log_image("disagreement/new-higher-0", PIL.Image.new("RGB", (64, 64)), 0)
    rescored.finish("FINISHED")
    return address


def test_a_person_finds_runs_curves_pictures_and_the_adapter(uri: str):
    run = screenshots.find_run(connect(uri), "night-1")
    with screenshots.serve_ui(uri) as address, screenshots.open_browser() as context:
        runs = screenshots.visit_runs(context, address, run)
        expect(runs.get_by_role("heading", name="Runs")).to_be_visible()  # not GenAI's overview
        column = runs.locator("[col-id='metrics.`reward/mean`']")
        expect(column).to_contain_text(["reward/mean", "4"])

        overview = screenshots.visit_overview(context, address, run)
        expect(overview.get_by_text("Finished: 3 of 3 epochs done").first).to_be_visible()
        expect(overview.get_by_text(COMMAND).first).to_be_visible()
        expect(overview.get_by_role("link", name="adapter").first).to_be_visible()
        expect(overview.get_by_role("link", name="night-1-by-x")).to_be_visible()

        table = screenshots.visit_samples(context, address, run, LAST_STEP)
        expect(table.get_by_text("a cat", exact=True)).to_be_visible()

        curves = screenshots.visit_curves(context, address, run)
        for section in ("reward", "update"):
            expect(curves.get_by_text(section, exact=True)).to_be_visible()
        cards = curves.get_by_test_id("experiment-view-compare-runs-card")
        expect(cards.first.get_by_text("night-1 (reward/mean)")).to_be_visible()
        assert curves.locator("path.js-line").first.get_attribute("d").count("L") == LAST_STEP

        pictures = screenshots.visit_pictures(context, address, run)
        slider = pictures.get_by_role("slider")
        expect(slider).to_have_attribute("aria-valuemax", str(LAST_STEP))
        expect(slider).to_have_attribute("aria-valuenow", str(LAST_STEP))
        expect(pictures.locator("img.rc-image-img")).to_have_attribute(
            "src", re.compile(f"step%2B{LAST_STEP}%2B")
        )

        adapter = screenshots.visit_adapter(context, address, run)
        expect(adapter.get_by_role("heading", name="adapter")).to_be_visible()
        expect(adapter.get_by_text(BASE_MODEL).first).to_be_visible()
        expect(adapter.get_by_role("link", name="night-1").first).to_be_visible()

        rescored = screenshots.visit_rescored(context, address, run)
        for section in ("agreement", "disagreement"):
            expect(rescored.get_by_text(section, exact=True)).to_be_visible()


EPOCHS = 2


@pytest.fixture
def trained(tmp_path: Path) -> str:
    """A store with a run of the starter, small but real."""
    address = f"sqlite:///{tmp_path}/mlflow.db"
    train(
        "configs/starter.yaml",
        run_id="night-2",
        epochs=EPOCHS,
        storage=str(tmp_path / "store"),
        tracking=address,
        overrides=[
            f"outputs={tmp_path / 'outputs'}",
            "rollouts.samples_per_epoch=16",
            "rollouts.shard_size=8",
            "numerics.sample_batch_size=8",
            "numerics.micro_batch_size=8",
            "evaluation={every: 1, count: 2, seeds: [0]}",
        ],
    )
    return address


def test_a_run_of_the_starter_is_found_read_and_looked_at(trained: str):
    run = screenshots.find_run(connect(trained), "night-2")
    with screenshots.serve_ui(trained) as address, screenshots.open_browser() as context:
        runs = screenshots.visit_runs(context, address, run)
        column = runs.locator("[col-id='metrics.`reward/mean`']")
        expect(column).to_contain_text(["reward/mean", "-"])  # minus the size in kilobytes

        overview = screenshots.visit_overview(context, address, run)
        expect(overview.get_by_text(f"Finished: {EPOCHS} of {EPOCHS} epochs").first).to_be_visible()
        expect(overview.get_by_text("resume night-2").first).to_be_visible()
        expect(overview.get_by_role("link", name="adapter").first).to_be_visible()

        curves = screenshots.visit_curves(context, address, run)
        for section in ("reward", "update"):
            expect(curves.get_by_text(section, exact=True)).to_be_visible()
        assert curves.locator("path.js-line").count() > 0

        pictures = screenshots.visit_pictures(context, address, run)
        slider = pictures.get_by_role("slider").first
        expect(slider).to_have_attribute("aria-valuemax", str(EPOCHS))  # checkpoint 0 is the start
        image = pictures.locator("img.rc-image-img").first
        assert image.evaluate("image => image.naturalWidth") >= 64  # it was loaded

        adapter = screenshots.visit_adapter(context, address, run)
        expect(adapter.get_by_role("heading", name="adapter")).to_be_visible()
        expect(adapter.get_by_role("link", name="night-2").first).to_be_visible()
