"""A run that is started and followed in Prefect's pages, with screenshots for the documentation.

    python -m bench.prefect_walk --prefect http://127.0.0.1:4200 --run-id first --out docs/images/

Does in a headless Chromium what a person does after `ddpo server start`: finds the deployment
`train`, fills its form in, submits it, waits for the run to end, and opens the run's page in MLflow
by the link among its artifacts. Writes `prefect_form.png` and `prefect_run.png`. Needs playwright,
of the extra `test`, and a Chromium on the PATH.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from playwright.sync_api import BrowserContext, Page, expect

from bench.screenshots import open_browser

_RUN_TIMEOUT_MS = 1_800_000
_FORM_PX, _RUN_PX = 1540, 860
"""Heights of the windows: all of the form is to be seen, and all of a run's artifacts."""
_WIDTH_PX = 1440


def find_form(context: BrowserContext, address: str, deployment: str) -> Page:
    """From the first page to the form that starts a deployment, once its fields are there."""
    page = context.new_page()
    page.goto(address, wait_until="domcontentloaded")
    page.get_by_role("link", name="Deployments", exact=True).click()
    page.get_by_role("link", name=deployment, exact=True).click()
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("Custom run").click()
    page.get_by_text("Parameters", exact=True).wait_for()
    page.get_by_role("button", name="Submit").wait_for()
    return page


def fill_in(form: Page, fields: Mapping[str, str], overrides: Sequence[str]) -> None:
    """Fill in a form.

    Args:
        form: The form.
        fields: What to write into each field.
        overrides: Settings without a field of their own.
    """
    for name, text in fields.items():
        form.get_by_label(name).first.fill(text)
    for setting in overrides:
        before = form.get_by_role("textbox").count()
        form.get_by_role("button", name="Add item").click()
        expect(form.get_by_role("textbox")).to_have_count(before + 1)
        form.get_by_role("textbox").last.fill(setting)


def submit(form: Page) -> None:
    """Start the run, and go to its page as the form then proposes."""
    form.get_by_role("button", name="Submit").click()
    form.get_by_text("View run", exact=True).click()
    form.get_by_role("tab", name="Logs").wait_for()


def follow(run: Page) -> None:
    """Wait on a flow run's page until it has ended well, and look at its artifacts."""
    ended = run.get_by_text("Completed", exact=True).or_(run.get_by_text("Failed", exact=True))
    ended.first.wait_for(timeout=_RUN_TIMEOUT_MS)
    expect(run.get_by_text("Completed", exact=True).first).to_be_visible()
    run.get_by_role("tab", name="Artifacts").click()
    run.get_by_text("Mean reward: ").first.wait_for()


def open_mlflow(run: Page, run_id: str) -> Page:
    """Open a run's page in MLflow by the link among its flow run's artifacts."""
    link = run.get_by_role("link", name=f"{run_id} in MLflow", exact=True)
    link.click()
    run.wait_for_url("**/artifacts/key/**")  # the artifact's page, where the same link leads there
    link.click()
    run.get_by_text("Show more", exact=True).wait_for()
    return run


def main() -> None:
    """Start a run by the form, and take the screenshots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prefect", default="http://127.0.0.1:4200", help="Prefect's address")
    parser.add_argument("--run-id", default="first", help="the run's name")
    parser.add_argument("--epochs", default="3", help="how many")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="their folder")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with open_browser() as context:
        page = find_form(context, arguments.prefect, "train")
        page.set_viewport_size({"width": _WIDTH_PX, "height": _FORM_PX})
        fields = {"run_id": arguments.run_id, "epochs": arguments.epochs}
        fill_in(page, fields, ["rollouts.samples_per_epoch=64"])  # a quarter of the config's
        _take(page, arguments.out / "prefect_form.png")
        submit(page)
        page.set_viewport_size({"width": _WIDTH_PX, "height": _RUN_PX})
        follow(page)
        page.reload()  # the page was opened before the run began, and drew its timeline for that
        follow(page)
        _take(page, arguments.out / "prefect_run.png")
        print(open_mlflow(page, arguments.run_id).url)


def _take(page: Page, file: Path) -> None:
    page.wait_for_timeout(10_000)  # what is drawn grows into place
    page.screenshot(path=file)
    print(file)


if __name__ == "__main__":
    main()
