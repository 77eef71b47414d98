"""The description of a page in MLflow, in Markdown: what it shows, its outcome, how to go on."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlencode

from mlflow.entities import Run
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_PARENT_RUN_ID, MLFLOW_RUN_NOTE

from ddpo.analysis.report import save_curve
from ddpo_workflow.tasks.tracking.connection import TAG_LIMIT, loggable
from ddpo_workflow.tasks.tracking.experiment import page_address

COMMAND_TAG = "ddpo.command"
"""The tag with the command that resumes what a page shows."""
EPOCHS_TAG = "ddpo.epochs"
"""The tag with the number of epochs that a run is to have."""
FAILURE_TAG = "ddpo.failure"
"""The tag with the error that ended a run; empty if none did."""
GATE_TAG = "ddpo.gate"
"""The tag that says why the gate has ended training."""
CHAMPION_TAG = "ddpo.champion"
"""The tag that names the best checkpoint and its address in the model registry."""
RESCORED_TAG = "ddpo.rescored_run"
"""The tag with the name of the run whose samples were rescored."""
EVALUATED_TAG = "ddpo.evaluated_run"
"""The tag with the name of the run whose checkpoints were evaluated."""
FLOW_RUN_TAG = "prefect.flow_run_id"
"""The tag with the id of the flow run that writes a page."""
FLOW_RUN_URL_TAG = "prefect.flow_run_url"
"""The tag with its address; empty where its server is gone with it."""

CURVE = "curve.png"
"""The picture of the curve among a page's artifacts."""

_MARK = "<!-- ddpo -->"  # MLflow's page leaves comments out
_STATES = {
    "RUNNING": "Running",
    "FINISHED": "Finished",
    "FAILED": "Failed",
    "KILLED": "Stopped",
}


@dataclass(frozen=True)
class Point:
    """An epoch of the curve."""

    epoch: int
    mean: float
    """Mean reward."""
    std: float
    """Standard deviation of the rewards."""


def write_description(client: MlflowClient, mlflow_run_id: str) -> None:
    """Write a page's description and the picture of its curve, from what the page shows.

    A note that would be too long with the description is left as it is.

    Args:
        client: The tracking store.
        mlflow_run_id: MLflow's id of the run.
    """
    run = client.get_run(mlflow_run_id)
    curve = _curve(client, mlflow_run_id)
    note = run.data.tags.get(MLFLOW_RUN_NOTE, "")
    text = loggable({MLFLOW_RUN_NOTE: description(run, curve)})[MLFLOW_RUN_NOTE]
    new = merged(note, text)
    if new == note or len(new) > TAG_LIMIT:
        return
    if (picture := _picture(mlflow_run_id, curve)) and picture not in note:
        _draw(client, run, curve)
    client.set_tag(mlflow_run_id, MLFLOW_RUN_NOTE, new)


def description(run: Run, curve: Sequence[Point]) -> str:
    """Return the description of a page.

    Args:
        run: The page, with its tags.
        curve: What it shows of the mean reward, in the order of epochs.
    """
    tags: Mapping[str, str] = run.data.tags
    parts = [
        f"{_outcome(run.info.status, tags, curve)} {_subject(tags, run.data.params)}".strip(),
        _fenced(tags.get(FAILURE_TAG, "")),
        _sentence(tags.get(GATE_TAG, "")),
        _sentence(tags.get(CHAMPION_TAG, "")),
        _command(run.info.status, tags.get(COMMAND_TAG, "")),
        _links(run, tags),
        _picture(run.info.run_id, curve),  # last: the page folds what is below the first lines
    ]
    return "\n\n".join(part for part in parts if part)


def merged(note: str, text: str) -> str:
    """Return a page's note with our description in it; what somebody wrote around it is kept.

    Args:
        note: The note as it is.
        text: The description.
    """
    own = f"{_MARK}\n\n{text}\n\n{_MARK}"
    before, mark, rest = note.partition(_MARK)
    if not mark:
        return f"{note}\n\n{own}" if note else own
    return f"{before}{own}{rest.partition(_MARK)[2]}"


def _subject(tags: Mapping[str, str], params: Mapping[str, str]) -> str:
    """Return what a page shows, in a sentence."""
    if rescored := tags.get(RESCORED_TAG):
        return f"The samples of `{rescored}`, scored by `{params.get('reward')}`."
    if evaluated := tags.get(EVALUATED_TAG):
        return f"The checkpoints of `{evaluated}` on fixed prompts and seeds."
    if variants := params.get("variants"):
        return f"A comparison of {variants}; its runs are nested below."
    if {"model", "reward"} <= params.keys():
        return f"`{params['model']}`, trained on `{params['reward']}`."
    return ""


def _outcome(status: str, tags: Mapping[str, str], curve: Sequence[Point]) -> str:
    state = f"**{_STATES.get(status, status)}**"
    if epochs := tags.get(EPOCHS_TAG, ""):
        done = curve[-1].epoch + 1 if curve else 0
        state += f": {done} of {epochs} epochs done"
    if not curve:
        return f"{state}."
    first, last = curve[0], curve[-1]
    best = max(curve, key=lambda point: point.mean)
    return (
        f"{state}. Mean reward: **{first.mean:.4g}** at first (epoch {first.epoch}) → "
        f"**{last.mean:.4g}** (epoch {last.epoch}), highest {best.mean:.4g} (epoch {best.epoch})."
    )


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _picture(mlflow_run_id: str, curve: Sequence[Point]) -> str:
    if not curve:
        return ""
    # The last epoch makes the address of every new picture a new one: browsers keep the old ones.
    query = {"path": CURVE, "run_uuid": mlflow_run_id, "epoch": curve[-1].epoch}
    return f"![Mean reward by epoch](get-artifact?{urlencode(query)})"


def _command(status: str, command: str) -> str:
    if status != "FINISHED":
        return f"Resume:\n\n{_fenced(command)}" if command else ""
    if " resume " not in command:  # nothing is left of a comparison
        return ""
    return f"Train for longer, with `--epochs N`:\n\n{_fenced(command)}"


def _links(run: Run, tags: Mapping[str, str]) -> str:
    links: list[str] = []
    if above := tags.get(MLFLOW_PARENT_RUN_ID):
        # Relative, because a page does not know under which address it is served.
        address = page_address("", run.info.experiment_id, above).removeprefix("/")
        links.append(f"Part of [the page above]({address}).")
    if flow_run := tags.get(FLOW_RUN_TAG):
        url = tags.get(FLOW_RUN_URL_TAG)
        shown = f"[{flow_run}]({url})" if url else f"`{flow_run}`, on a temporary server"
        links.append(f"Flow run in Prefect: {shown}.")
    return " ".join(links)


def _curve(client: MlflowClient, mlflow_run_id: str) -> list[Point]:
    mean, std = (
        {metric.step: metric.value for metric in client.get_metric_history(mlflow_run_id, key)}
        for key in ("reward/mean", "reward/std")
    )
    return [Point(step, mean[step], std.get(step, 0.0)) for step in sorted(mean)]


def _draw(client: MlflowClient, run: Run, curve: Sequence[Point]) -> None:
    title = ": ".join(filter(None, (run.info.run_name, run.data.params.get("reward"))))
    with tempfile.TemporaryDirectory() as folder:
        save_curve(curve, title, Path(folder, CURVE))
        client.log_artifact(run.info.run_id, str(Path(folder, CURVE)))


def _fenced(text: str) -> str:
    return f"```\n{text.replace('```', '')}\n```" if text else ""
