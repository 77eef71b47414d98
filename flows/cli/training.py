"""`ddpo train`, `resume` and `sample`: train runs, sample from them."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ddpo_workflow.flows.cli.common import (
    ConfigFile,
    ConfigRoot,
    Root,
    RunId,
    Settings,
    Trust,
    saved_run,
)
from ddpo_workflow.flows.cli.quiet import hide_loading_bars
from ddpo_workflow.flows.cli.running import checked, show_run
from ddpo_workflow.flows.cli.screen import say

app = typer.Typer()


class Device(StrEnum):
    """Where an image is computed."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"
    mps = "mps"


@app.command()
def train(
    config: ConfigFile,
    set_: Settings = None,
    run_id: Annotated[
        str | None, typer.Option(help="The run's name. An existing run is resumed.")
    ] = None,
    root: ConfigRoot = None,
) -> None:
    """Fine-tune a model on a reward, or resume a run."""
    from ddpo_workflow.flows.run_requests import TrainRequest, new_run_id

    request = TrainRequest(
        config_file=config,
        run_id=run_id or new_run_id(config),
        overrides=tuple(set_ or ()),
        storage=root,
    )
    with checked(request) as plan:
        from ddpo_workflow.flows.train import train as train_flow

        show_run(plan, lambda: train_flow(**dict(request)))


@app.command()
def resume(
    run_id: RunId,
    epochs: Annotated[int | None, typer.Option(help="Total number of epochs.", min=1)] = None,
    root: Root = None,
    trust: Trust = False,
) -> None:
    """Resume a run; committed work is never redone.

    Runs the code that the run names.
    """
    from ddpo.runs import storage_root
    from ddpo_workflow.flows.run_requests import ResumeRequest

    request = ResumeRequest(run_id=run_id, storage=storage_root(root), epochs=epochs, trust=trust)
    with checked(request) as plan:
        from ddpo_workflow.flows.train import resume as resume_flow

        show_run(plan, lambda: resume_flow(**dict(request)))


@app.command()
def sample(
    run_id: RunId,
    prompt: Annotated[str, typer.Option(help="The prompt.")],
    out: Annotated[Path, typer.Option(help="The PNG file to write.")],
    seed: Annotated[int, typer.Option(help="Seed of the noise.", min=0, max=2**63 - 1)] = 0,
    checkpoint: Annotated[
        int | None,
        typer.Option(help="Number of epochs trained; 0 is the base model. By default the latest."),
    ] = None,
    device: Annotated[
        Device | None,
        typer.Option(help="Where to compute. By default on the kind of device of the run."),
    ] = None,
    root: Root = None,
) -> None:
    """Sample an image from a run's model."""
    from ddpo.errors import ConfigError
    from ddpo.prompts import Prompt

    if out.suffix.lower() != ".png" or out.is_dir():
        raise ConfigError(f"--out must be a file that ends in .png; got {out}")
    text, run = Prompt(prompt).text, saved_run(run_id, root)
    with _writing(out):  # before the model is loaded
        out.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=out.parent).close()
    from ddpo.analysis.sample_image import draw  # imports torch

    hide_loading_bars()
    image = draw(run, text, seed=seed, checkpoint=checkpoint, device=device)
    with _writing(out):
        image.save(out)
    say(f"{out}: '{prompt}', seed {seed}")


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    from ddpo.errors import ConfigError

    try:
        yield
    except OSError as error:
        raise ConfigError(f"--out {out} cannot be written: {error.strerror or error}") from error
