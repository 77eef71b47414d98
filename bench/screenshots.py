"""Screenshots of a run in MLflow's UI, for the documentation.

    python -m bench.screenshots --tracking-uri sqlite:///mlflow.db --run-id R --out docs/images/

Starts `mlflow server` on a free loopback port, visits it with a headless Chromium, and writes
`mlflow_runs.png`, `mlflow_overview.png`, `mlflow_curves.png`, `mlflow_pictures.png` and
`mlflow_adapter.png`; and, where `ddpo rescore` has scored the run again, `mlflow_rescored.png`.
Needs playwright, of the extra `test`, and a Chromium on the PATH.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

import requests
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID
from playwright.sync_api import BrowserContext, Page, expect, sync_playwright

from ddpo.config import TrackingConfig
from ddpo_workflow.tasks.tracking.connection import RUN_ID_TAG, connect
from ddpo_workflow.tasks.tracking.experiment import TRAINING, runs_address

_START_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 60.0
_CONTENT_TIMEOUT_MS = 180_000
_WIDTH, _HEIGHT = 1440, 900
_CARDS_IN_VIEW = 6
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_BROWSER_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# MLflow's assistant opens over a third of the page at the first visit.
_CLOSE_ASSISTANT = """
localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
"""
_CURVE_LOADED = """
() => document.querySelector("img[src*='get-artifact']")?.naturalWidth > 0
"""
_ALL_PICTURES_LOADED = """
() => {
  const pictures = [...document.querySelectorAll("img.rc-image-img")];
  return pictures.length > 0 && pictures.every((picture) => picture.naturalWidth > 0);
}
"""


@dataclass(frozen=True)
class TrackedRun:
    """What the UI's addresses are made of."""

    run_id: str
    """Our id, which is the run's name in MLflow."""
    experiment_id: str
    mlflow_run_id: str
    pictures: str
    """What the names of the images have before the `/`."""
    model_id: str
    """The newest adapter's id."""
    base_model: str
    """What that adapter adapts."""
    rescored: str | None
    """MLflow's id of the newest page that shows it under another reward."""


def newest_run(client: MlflowClient) -> str:
    """Return the id of the run that finished last.

    Raises:
        LookupError: If none has finished.
    """
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(
        experiments,
        filter_string="attributes.status = 'FINISHED'",
        order_by=["attributes.end_time DESC"],
        max_results=1,
    )
    if not runs:
        raise LookupError("No run of this store has finished; `make demo` makes one.")
    return runs[0].data.tags[RUN_ID_TAG]


def find_run(client: MlflowClient, run_id: str) -> TrackedRun:
    """Look up the run, with its images and its newest adapter.

    Args:
        client: The tracking store.
        run_id: Our id of the run.

    Raises:
        LookupError: If no experiment has the run, or the run lacks images or an adapter.
    """
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    runs = client.search_runs(experiments, filter_string=f"tags.`{RUN_ID_TAG}` = '{run_id}'")
    if not runs:
        raise LookupError(f"No run {run_id!r} in {len(experiments)} experiments of this store.")
    mlflow_run_id, experiment_id = runs[0].info.run_id, runs[0].info.experiment_id
    models = client.search_logged_models(
        [experiment_id], filter_string=f"source_run_id = '{mlflow_run_id}'", max_results=1
    )
    pictures = client.list_artifacts(mlflow_run_id, "images")
    if not models or not pictures:
        raise LookupError(f"The run {run_id!r} has {len(models)} adapters, {len(pictures)} images.")
    rescored = client.search_runs(
        [experiment_id],
        filter_string=f"tags.`{MLFLOW_PARENT_RUN_ID}` = '{mlflow_run_id}' "
        "AND metrics.`agreement/pearson` >= -1",
        max_results=1,
    )
    return TrackedRun(
        run_id=run_id,
        experiment_id=experiment_id,
        mlflow_run_id=mlflow_run_id,
        pictures=Path(pictures[0].path).name.partition("~")[0],
        model_id=models[0].model_id,
        base_model=(models[0].params or {})["base_model"],
        rescored=rescored[0].info.run_id if rescored else None,
    )


@contextmanager
def serve_ui(tracking_uri: str) -> Iterator[str]:
    """Run `mlflow server` for as long as the context lasts; yield its address.

    Args:
        tracking_uri: The database to show.

    Raises:
        RuntimeError: If it does not answer within 60 seconds.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", tracking_uri]
    command += ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    quiet = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **quiet},
            start_new_session=True,  # so that its workers can be ended with it
        )
        try:
            if not _answers(server, f"{address}/health"):
                log.seek(0)
                raise RuntimeError(f"mlflow server did not start:\n{log.read()[-2000:]}")
            yield address
        finally:
            _end(server)


@contextmanager
def open_browser() -> Iterator[BrowserContext]:
    """A headless Chromium of 1440 x 900 pixels.

    Raises:
        FileNotFoundError: If there is no Chromium on the PATH.
    """
    executable = find_browser()
    if executable is None:
        raise FileNotFoundError(f"None of {', '.join(_BROWSERS)} is on the PATH.")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=list(_BROWSER_FLAGS))
        try:
            context = browser.new_context(viewport={"width": _WIDTH, "height": _HEIGHT})
            context.set_default_timeout(_CONTENT_TIMEOUT_MS)
            context.add_init_script(_CLOSE_ASSISTANT)
            yield context
        finally:
            browser.close()


def find_browser() -> str | None:
    """The path of a Chromium, or None."""
    return next((path for name in _BROWSERS if (path := shutil.which(name))), None)


def visit_runs(context: BrowserContext, address: str, run: TrackedRun) -> Page:
    """The table of the experiment's runs as our view shows it, once it lists `run`."""
    page = context.new_page()
    page.goto(runs_address(address, run.experiment_id), wait_until="domcontentloaded")
    expect(page.get_by_role("link", name=run.run_id, exact=True)).to_be_visible(
        timeout=_CONTENT_TIMEOUT_MS
    )
    return page


def visit_overview(context: BrowserContext, address: str, run: TrackedRun) -> Page:
    """The run's first page, once the picture in its description is loaded."""
    page = _visit(context, address, _run_path(run))
    page.get_by_text("Show more", exact=True).click()
    page.wait_for_function(_CURVE_LOADED)
    return page


def visit_samples(context: BrowserContext, address: str, run: TrackedRun, epoch: int) -> Page:
    """The table of an epoch's samples among the run's artifacts."""
    path = f"{_run_path(run)}/artifacts/samples/epoch-{epoch:05}.csv"
    return _visit(context, address, path)


def visit_curves(context: BrowserContext, address: str, run: TrackedRun) -> Page:
    """The run's curves, once the first is drawn."""
    page = _visit(context, address, f"{_run_path(run)}/model-metrics")
    page.get_by_placeholder("Search metric charts").fill("^(reward|update)/")
    page.locator("path.js-line").first.wait_for()
    return page


def visit_pictures(context: BrowserContext, address: str, run: TrackedRun) -> Page:
    """The run's images at the last step, once all are loaded, without the run's parameters.

    MLflow prints all parameters of the run above each image, which then is out of sight: hence
    the switch in each chart's dialog.
    """
    page = _visit(context, address, f"{_run_path(run)}/model-metrics")
    page.get_by_placeholder("Search metric charts").fill(f"{run.pictures}/")
    page.get_by_role("slider").first.wait_for()
    cards = page.get_by_test_id("experiment-view-compare-runs-card")
    # The search takes effect a moment after it is typed: until then curves' cards are there too.
    expect(cards.filter(has_not=page.get_by_role("slider"))).to_have_count(
        0, timeout=_CONTENT_TIMEOUT_MS
    )
    for card in cards.all()[:_CARDS_IN_VIEW]:
        card.get_by_test_id("experiment-view-compare-runs-card-menu").click()
        page.get_by_role("menuitem", name="Configure").click()
        dialog = page.get_by_role("dialog")
        dialog.get_by_role("switch").click()
        step = dialog.get_by_role("spinbutton")
        step.fill(step.get_attribute("max") or "0")
        step.press("Enter")
        dialog.get_by_role("button", name="Save changes").click()
        dialog.wait_for(state="hidden")
    page.wait_for_function(_ALL_PICTURES_LOADED)
    return page


def visit_adapter(context: BrowserContext, address: str, run: TrackedRun) -> Page:
    """The newest adapter's page, once it names its base model."""
    page = _visit(context, address, f"experiments/{run.experiment_id}/models/{run.model_id}")
    page.get_by_text(run.base_model).first.wait_for()
    return page


def visit_rescored(context: BrowserContext, address: str, run: TrackedRun) -> Page:
    """The page of the run under another reward, once agreement and disagreement are drawn."""
    path = f"experiments/{run.experiment_id}/runs/{run.rescored}/model-metrics"
    page = _visit(context, address, path)
    page.locator("path.js-line").first.wait_for()
    page.wait_for_function(_ALL_PICTURES_LOADED)
    return page


def _run_path(run: TrackedRun) -> str:
    return f"experiments/{run.experiment_id}/runs/{run.mlflow_run_id}"


def _visit(context: BrowserContext, address: str, path: str) -> Page:
    page = context.new_page()
    page.goto(f"{address}/#/{path}?{urlencode(TRAINING)}", wait_until="domcontentloaded")
    return page


def _answers(server: subprocess.Popen[bytes], health: str) -> bool:
    deadline = time.monotonic() + _START_TIMEOUT_S
    while time.monotonic() < deadline and server.poll() is None:
        try:
            if requests.get(health, timeout=1).ok:
                return True
        except requests.RequestException:
            time.sleep(0.2)
    return False


def _end(server: subprocess.Popen[bytes]) -> None:
    for sign in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(server.pid, sign)
            server.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            continue
        except ProcessLookupError:
            return


def main() -> None:
    """Take the screenshots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    default = TrackingConfig().uri
    parser.add_argument("--tracking-uri", default=default, help="the MLflow database")
    parser.add_argument("--run-id", help="the run to show; by default the newest that finished")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="their folder")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    client = connect(arguments.tracking_uri)
    run = find_run(client, arguments.run_id or newest_run(client))
    pages = {
        "mlflow_runs.png": visit_runs,
        "mlflow_overview.png": visit_overview,
        "mlflow_curves.png": visit_curves,
        "mlflow_pictures.png": visit_pictures,
        "mlflow_adapter.png": visit_adapter,
    }
    if run.rescored:
        pages["mlflow_rescored.png"] = visit_rescored
    with serve_ui(client.tracking_uri) as address, open_browser() as context:
        for name, visit in pages.items():
            page = visit(context, address, run)
            page.wait_for_timeout(1500)  # charts grow into place
            page.screenshot(path=arguments.out / name)
            print(arguments.out / name)


if __name__ == "__main__":
    main()
