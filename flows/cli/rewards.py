"""`ddpo serve-reward`, `rewards` and `score`: rewards, apart from any training."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from ddpo_workflow.flows.cli.common import Root, console, read_parameters, saved_run, say
from ddpo_workflow.flows.cli.quiet import hide_loading_bars

app = typer.Typer()

_MOST_BESIDE = 5  # columns of a table that a narrow terminal still shows

Parameters = Annotated[
    list[str] | None,
    typer.Option("--param", help="A parameter of the reward, as a=value; may be repeated."),
]


@app.command("serve-reward")
def serve_reward(
    name: Annotated[str, typer.Argument(help="A reward's name or import path.")],
    port: Annotated[
        int, typer.Option(help="To listen on; 0 takes a free one.", min=0, max=65535)
    ] = 8100,
    host: Annotated[
        str, typer.Option(help="To listen on; other than loopback needs DDPO_REWARD_TOKEN.")
    ] = "127.0.0.1",
    param: Parameters = None,
    workers: Annotated[int, typer.Option(help="Requests scored at the same time.", min=1)] = 1,
    queue: Annotated[int, typer.Option(help="Requests that may wait for it.", min=0)] = 64,
    max_images: Annotated[int, typer.Option(help="Pictures in one request.", min=1)] = 64,
) -> None:
    """Serve a reward over HTTP, for the reward `http` of runs elsewhere, until Ctrl-C."""
    from ddpo.rewards.service.limits import Limits
    from ddpo.rewards.service.serving import serve

    limits = Limits(workers=workers, queue=queue, images=max_images)
    try:
        serve(name, read_parameters(param or ()), host=host, port=port, limits=limits, say=say)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command()
def rewards() -> None:
    """List all rewards: what each is, what it needs, which parameters it takes."""
    from ddpo.rewards.catalogue import describe_rewards

    for reward in describe_rewards():
        console.print(reward.name, style="bold", markup=False, highlight=False)
        say(f"    {reward.summary}")
        if reward.needs:
            say(f"    needs: {reward.needs}")
        for each in reward.parameters:
            default = "must be given" if each.default is None else f"by default {each.default}"
            say(f"    - {each.name}: {each.type}; {default}")


@app.command()
def score(
    reward: Annotated[str, typer.Argument(help="A name that `ddpo rewards` lists, or your own.")],
    images: Annotated[list[Path] | None, typer.Argument(help="Pictures.")] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="What the pictures should show: one for all, or one for each."),
    ] = None,
    metadata: Annotated[
        str, typer.Option(help="What the reward is told of the prompt beside its words, as JSON.")
    ] = "{}",
    param: Parameters = None,
    run: Annotated[
        str | None, typer.Option(help="Score this run's saved samples instead, to calibrate.")
    ] = None,
    epoch: Annotated[
        list[int] | None,
        typer.Option(help="With --run: which; by default the first kept. May be repeated.", min=0),
    ] = None,
    root: Root = None,
) -> None:
    """Try a reward: on pictures, or on a run's samples for the constants that `weighted` takes."""
    import json

    from ddpo.analysis.reward_range import measure_range
    from ddpo.errors import ConfigError
    from ddpo.rewards import load_reward, score_images
    from ddpo.rewards.catalogue import findings, prompts_for, read_image

    if bool(images) == bool(run):
        raise ConfigError("name the pictures to score, or a run with --run; one of the two")
    parameters = read_parameters(param or ())
    loaded = load_reward(reward, parameters)
    hide_loading_bars()
    if run:
        with console.status("scoring") as status:
            found = measure_range(loaded, saved_run(run, root), epoch or (), status.update)
        say(f"{found.count} samples of {run}, epoch {', '.join(map(str, found.epochs))}")
        say(f"mean {found.mean:.6g}, std {found.std:.6g}, from {found.low:.6g} to {found.high:.6g}")
        if found.failed:
            say(f"{found.failed} failed, which are not among them")
        component = found.component(reward, parameters)
        say(f"\nOne of the `rewards` that `weighted` adds up:\n{component}")
        return
    try:
        told = json.loads(metadata)
    except ValueError as error:
        raise ConfigError(f"--metadata {metadata!r} cannot be read as JSON: {error}") from error
    if not isinstance(told, dict):
        raise ConfigError(f'--metadata {metadata!r} is no JSON object, such as {{"text": "OPEN"}}')
    files = images or []
    pictures = [read_image(file) for file in files]
    prompts = prompts_for(prompt or (), len(files), told)
    _table({"": list(map(str, files)), **findings(score_images(loaded, pictures, prompts))})


def _table(found: Mapping[str, Sequence[str]]) -> None:
    """Print texts by name: few samples beside each other, many below each other."""
    rows = [[name, *texts] for name, texts in found.items()]
    if len(rows[0]) > _MOST_BESIDE:
        rows = list(map(list, zip(*rows, strict=True)))
    head, *body = [[Text(text, overflow="fold") for text in row] for row in rows]
    table = Table()
    for title in head:
        table.add_column(title)
    for row in body:
        table.add_row(*row)
    console.print(table)
