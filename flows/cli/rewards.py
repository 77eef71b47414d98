"""`ddpo serve-reward`, `rewards` and `score`: use rewards without any training."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ddpo_workflow.flows.cli.common import (
    Parameters,
    Root,
    read_parameters,
    saved_run,
)
from ddpo_workflow.flows.cli.quiet import hide_loading_bars
from ddpo_workflow.flows.cli.screen import busy, say, show

app = typer.Typer()

_MOST_COLUMNS = 5  # that fit a narrow terminal


@app.command("serve-reward")
def serve_reward(
    name: Annotated[str, typer.Argument(help="A reward's name or import path.")],
    port: Annotated[
        int, typer.Option(help="Port to listen on; 0 picks a free one.", min=0, max=65535)
    ] = 8100,
    host: Annotated[
        str,
        typer.Option(help="Address to listen on; any but loopback requires DDPO_REWARD_TOKEN."),
    ] = "127.0.0.1",
    param: Parameters = None,
    workers: Annotated[int, typer.Option(help="Requests scored at the same time.", min=1)] = 1,
    queue: Annotated[int, typer.Option(help="Requests that may wait.", min=0)] = 64,
    max_images: Annotated[int, typer.Option(help="Maximum images in a request.", min=1)] = 64,
) -> None:
    """Serve a reward over HTTP until Ctrl-C, for the reward `http`."""
    from ddpo.rewards.service.limits import Limits
    from ddpo.rewards.service.serving import serve

    limits = Limits(workers=workers, queue=queue, images=max_images)
    try:
        serve(name, read_parameters(param or ()), host=host, port=port, limits=limits, say=say)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command()
def rewards() -> None:
    """List all rewards with their requirements and parameters."""
    from ddpo.rewards.catalogue import describe_rewards

    for reward in describe_rewards():
        say(reward.name, style="bold")
        say(f"    {reward.summary}")
        if reward.needs:
            say(f"    needs: {reward.needs}")
        for parameter in reward.parameters:
            default = parameter.default
            default = "required" if default is None else f"default {default}"
            say(f"    - {parameter.name}: {parameter.type}; {default}")


@app.command()
def score(
    reward: Annotated[str, typer.Argument(help="A name listed by `ddpo rewards`, or module:name.")],
    images: Annotated[list[Path] | None, typer.Argument(help="Image files.")] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="The prompt: one for all images, or one per image."),
    ] = None,
    metadata: Annotated[
        str, typer.Option(help="Metadata of the prompts, as a JSON object.")
    ] = "{}",
    param: Parameters = None,
    run: Annotated[
        str | None,
        typer.Option(help="Score this run's saved samples instead, to calibrate `weighted`."),
    ] = None,
    epoch: Annotated[
        list[int] | None,
        typer.Option(
            help="With --run: an epoch to score; may be repeated. By default the first one kept.",
            min=0,
        ),
    ] = None,
    root: Root = None,
) -> None:
    """Score images, or a run's samples to find the constants for `weighted`."""
    import json

    from ddpo.analysis.reward_range import measure_range
    from ddpo.errors import ConfigError
    from ddpo.rewards import load_reward, score_images
    from ddpo.rewards.catalogue import findings, prompts_for, read_image

    if bool(images) == bool(run):
        raise ConfigError("give either image files to score, or a run with --run")
    parameters = read_parameters(param or ())
    loaded = load_reward(reward, parameters)
    hide_loading_bars()
    if run:
        with busy("scoring") as update:
            scores = measure_range(loaded, saved_run(run, root), epoch or (), update)
        say(f"{scores.count} samples of {run}, epoch {', '.join(map(str, scores.epochs))}")
        say(
            f"mean {scores.mean:.6g}, std {scores.std:.6g}, "
            f"from {scores.low:.6g} to {scores.high:.6g}"
        )
        if scores.failed:
            say(f"{scores.failed} failed and are not included")
        component = scores.component(reward, parameters)
        say(f"\nAs one of the `rewards` of `weighted`:\n{component}")
        return
    try:
        facts = json.loads(metadata, object_pairs_hook=_each_once, parse_constant=_refuse)
    except ValueError as error:
        raise ConfigError(f"--metadata {metadata!r} is not valid JSON: {error}") from error
    if not isinstance(facts, dict):
        raise ConfigError(
            f'--metadata {metadata!r} is not a JSON object; expected one such as {{"text": "OPEN"}}'
        )
    files = images or []
    prompts = prompts_for(prompt or (), len(files), facts)
    scored = score_images(loaded, [read_image(file) for file in files], prompts)
    _table({"": list(map(str, files)), **findings(scored)})


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"the key {twice[0]!r} occurs twice; keep one of them")
    return dict(pairs)


def _refuse(number: str) -> None:
    raise ValueError(f"{number} is not a JSON number")


def _table(columns: Mapping[str, Sequence[str]]) -> None:
    """Print texts by name: a column for each of a few samples, a row for each of many."""
    rows = [[name, *texts] for name, texts in columns.items()]
    if len(rows[0]) > _MOST_COLUMNS:
        rows = list(map(list, zip(*rows, strict=True)))
    head, *body = rows
    table = Table(*head)
    for row in body:
        table.add_row(*row)
    show(table, fold=True)
