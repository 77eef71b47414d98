"""The `ddpo` command.

Exit status: 0 done, 1 the run failed, 2 bad input, 130 stopped by Ctrl-C, 143 by SIGTERM.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ddpo.errors import DdpoError
from flows.commands import data
from flows.quiet import hide_loading_bars, set_defaults, without_heartbeats

if TYPE_CHECKING:
    from ddpo.run import Run
    from ddpo.store.objects import Store

# Heavy libraries are imported by the commands that need them: a misspelt key is answered at once.

app = typer.Typer(
    help="Reinforcement learning for diffusion models, as a durable batch workflow.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console()

_MOST_BESIDE = 5  # columns of a table that a narrow terminal still shows

Root = Annotated[
    str | None,
    typer.Option("--root", help="The store. By default DDPO_ROOT, else ddpo-data/store."),
]
RunId = Annotated[str, typer.Argument(help="A run's name; `ddpo runs` lists them.")]


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A YAML file; configs/ holds some.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a setting, as a.b=value; may be repeated."),
    ] = None,
    run_id: Annotated[
        str | None, typer.Option(help="The run's name; one that exists goes on.")
    ] = None,
    root: Root = None,
) -> None:
    """Fine-tune a model on a reward, or go on with a run."""
    from ddpo.config_files import read_config

    overrides = [*(set_ or ()), *([f"storage.root={root}"] if root else ())]
    settings = read_config(config, overrides)
    console.print("[dim]checking model, store and tracking ...[/]")

    from ddpo.run import check_run
    from flows.train import new_run_id
    from flows.train import train as train_flow
    from tasks.mlflow_connection import connect

    run_id = run_id or new_run_id(config)
    store, _ = check_run(settings, run_id)
    connect(settings.tracking.uri)
    _show(run_id, settings.epochs, lambda: train_flow(config, run_id, overrides=overrides), store)


@app.command()
def resume(
    run_id: RunId,
    epochs: Annotated[
        int | None, typer.Option(help="How many epochs it is to have in the end.", min=1)
    ] = None,
    root: Root = None,
) -> None:
    """Go on with a run that was stopped; what is committed is not done again."""
    from ddpo.run import check_run, storage_root
    from ddpo.store.s3 import S3Options
    from flows.train import resume as resume_flow
    from tasks.mlflow_connection import connect

    place = storage_root(root)
    config = _open(run_id, place).config
    # Found by `--root` and the AWS variables, and not by what an earlier start was told.
    storage = config.storage.model_copy(update={"root": place, "s3": S3Options()})
    store, _ = check_run(config.model_copy(update={"storage": storage}), run_id)
    connect(config.tracking.uri)
    total = epochs or config.epochs
    _show(run_id, total, lambda: resume_flow(run_id, place, epochs), store)


@app.command()
def runs(root: Root = None) -> None:
    """List the runs of a store."""
    from ddpo.report import reward_curve
    from ddpo.run import storage_root
    from ddpo.store.objects import Store
    from ddpo.store.runs import list_runs

    store = Store.open(storage_root(root))
    table = Table("run", "model", "reward", "epochs", "first", "last", title=store.root)
    for run_id in list_runs(store):
        run = _open(run_id, root)
        curve = reward_curve(run)
        first, last = (f"{curve[0].mean:.4g}", f"{curve[-1].mean:.4g}") if curve else ("", "")
        epochs = f"{len(curve)}/{run.config.epochs}"
        table.add_row(run_id, run.config.model.path, run.config.reward.name, epochs, first, last)
    console.print(table if table.row_count else f"no runs in {store.root}")


@app.command()
def sample(
    run_id: RunId,
    prompt: Annotated[str, typer.Option(help="What to draw.")],
    out: Annotated[Path, typer.Option(help="The picture to write, a .png.")],
    seed: Annotated[int, typer.Option(help="Of the noise.", min=0)] = 0,
    checkpoint: Annotated[
        int | None, typer.Option(help="Epochs trained; 0 is the base model. By default the last.")
    ] = None,
    root: Root = None,
) -> None:
    """Draw a picture with a run's model."""
    from ddpo.drawing import draw
    from ddpo.errors import ConfigError

    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out {out} does not end in .png, which is what is written")
    hide_loading_bars()
    picture = draw(_open(run_id, root), prompt, seed=seed, checkpoint=checkpoint)
    out.parent.mkdir(parents=True, exist_ok=True)
    picture.save(out)
    console.print(f"{out}: '{prompt}', seed {seed}")


@app.command()
def verify(
    run_id: RunId,
    repair: Annotated[
        bool, typer.Option("--repair", help="Make again what can be made from what is whole.")
    ] = False,
    root: Root = None,
) -> None:
    """Read all that a run committed; say what is damaged, and mend what can be made again."""
    from ddpo.run import open_run, storage_root
    from ddpo.store import keys
    from ddpo.store.objects import Store
    from ddpo.store.verify import Verification, verify_run

    store = Store.open(storage_root(root))

    def check() -> Verification:
        with console.status("reading") as status:
            return verify_run(store, run_id, lambda key: status.update(f"reading {key}"))

    found = check()
    reasons: dict[str, str] = {}
    if found.damages and repair:
        from tasks.repair import repair as repair_parts

        hide_loading_bars()
        for outcome in repair_parts(open_run(store, run_id), found.damages):
            reasons[outcome.manifest] = outcome.said
            said = "made again" if outcome.done else "not mended"
            _say(f"{said}: {outcome.manifest}")
        found = check()
    for damage in found.damages:
        derivable = keys.parse_part_manifest(damage.manifest) is not None
        way_out = "ddpo verify --repair makes it again" if derivable else "restore it from a copy"
        _say(f"damaged: {damage}")
        _say(f"    listed in {damage.manifest}; {reasons.get(damage.manifest, way_out)}")
    retired = f", {found.retired} retired on purpose" if found.retired else ""
    outcome = f"{len(found.damages)} damaged" if found.damages else "whole"
    _say(f"{found.objects} objects, {found.bytes / 1e6:.1f} MB{retired}: {outcome}")
    if found.damages:
        sys.exit(1)


@app.command()
def gc(
    run_id: RunId,
    older_than: Annotated[
        float, typer.Option(help="Hours; younger objects may belong to a task at work.", min=6)
    ] = 24.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what would be deleted.")
    ] = False,
    root: Root = None,
) -> None:
    """Delete a run's objects that no manifest lists: left behind by tasks that were killed."""
    from datetime import timedelta

    from ddpo.store.sweep import find_unreferenced, sweep

    run = _open(run_id, root)
    grace = timedelta(hours=older_than)
    found = (find_unreferenced if dry_run else sweep)(run.store, run_id, grace=grace)
    for key, size in found.items():
        _say(f"{size:>12,}  {key}")
    verb = "would be deleted" if dry_run else "deleted"
    megabytes = sum(found.values()) / 1e6
    console.print(f"{len(found)} objects, {megabytes:.1f} MB {verb}")


@app.command()
def doctor(
    config: Annotated[str, typer.Argument(help="A YAML file; configs/ holds some.")],
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", help="Change a setting, as a.b=value; may be repeated."),
    ] = None,
    root: Root = None,
) -> None:
    """Check storage, model, device, MLflow and Prefect before a night is spent on a run."""
    from ddpo.config_files import read_config
    from flows.doctor import examine

    settings = read_config(config, [*(set_ or ()), *([f"storage.root={root}"] if root else ())])
    failed = 0
    for finding in examine(settings):
        failed += not finding.ok
        mark = "[green]ok[/]  " if finding.ok else "[bold red]no[/]  "
        console.print(f"{mark}[bold]{finding.what}[/]", highlight=False)
        _say(f"    {finding.said}")
    if failed:
        console.print(f"{failed} to mend; each line above says how")
        sys.exit(1)
    console.print("ready")


@app.command()
def ui(
    tracking: Annotated[
        str, typer.Option(help="MLflow's tracking URI.")
    ] = "sqlite:///ddpo-data/mlflow.db",
    mlflow_port: Annotated[int, typer.Option(help="Of MLflow's page.")] = 5000,
    prefect_port: Annotated[int, typer.Option(help="Of Prefect's page.")] = 4200,
) -> None:
    """Show MLflow's and Prefect's pages on this machine, until Ctrl-C."""
    from flows.ui import serve_pages

    serve_pages(console, tracking, mlflow_port=mlflow_port, prefect_port=prefect_port)


@app.command("serve-reward")
def serve_reward(
    name: Annotated[str, typer.Argument(help="A reward's name or import path.")],
    port: Annotated[
        int, typer.Option(help="To listen on; 0 takes a free one.", min=0, max=65535)
    ] = 8100,
    host: Annotated[
        str, typer.Option(help="To listen on; other than loopback needs DDPO_REWARD_TOKEN.")
    ] = "127.0.0.1",
    param: Annotated[
        list[str] | None,
        typer.Option(help="A parameter of the reward, as a=value; may be repeated."),
    ] = None,
    workers: Annotated[int, typer.Option(help="Requests scored at the same time.", min=1)] = 1,
    queue: Annotated[int, typer.Option(help="Requests that may wait for it.", min=0)] = 64,
    max_images: Annotated[int, typer.Option(help="Pictures in one request.", min=1)] = 64,
) -> None:
    """Serve a reward over HTTP, for the reward `http` of runs elsewhere, until Ctrl-C."""
    from ddpo.rewards.service import Limits, serve

    limits = Limits(workers=workers, queue=queue, images=max_images)
    try:
        serve(name, _parameters(param or ()), host=host, port=port, limits=limits, say=_say)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command()
def rewards() -> None:
    """List all rewards: what each is, what it needs, which parameters it takes."""
    from ddpo.trying import describe_rewards

    for reward in describe_rewards():
        console.print(reward.name, style="bold", markup=False, highlight=False)
        _say(f"    {reward.summary}")
        if reward.needs:
            _say(f"    needs: {reward.needs}")
        for each in reward.parameters:
            default = "must be given" if each.default is None else f"by default {each.default}"
            _say(f"    - {each.name}: {each.type}; {default}")


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
    param: Annotated[
        list[str] | None,
        typer.Option(help="A parameter of the reward, as a=value; may be repeated."),
    ] = None,
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

    from ddpo.errors import ConfigError
    from ddpo.rewards import load_reward, score_images
    from ddpo.trying import findings, measure_range, prompts_for, read_picture

    if bool(images) == bool(run):
        raise ConfigError("name the pictures to score, or a run with --run; one of the two")
    parameters = _parameters(param or ())
    loaded = load_reward(reward, parameters)
    hide_loading_bars()
    if run:
        with console.status("scoring") as status:
            found = measure_range(loaded, _open(run, root), epoch or (), status.update)
        _say(f"{found.count} samples of {run}, epoch {', '.join(map(str, found.epochs))}")
        _say(
            f"mean {found.mean:.6g}, std {found.std:.6g}, from {found.low:.6g} to {found.high:.6g}"
        )
        if found.failed:
            _say(f"{found.failed} failed, which are not among them")
        component = found.component(reward, parameters)
        _say(f"\nOne of the `rewards` that `weighted` adds up:\n{component}")
        return
    try:
        told = json.loads(metadata)
    except ValueError as error:
        raise ConfigError(f"--metadata {metadata!r} cannot be read as JSON: {error}") from error
    if not isinstance(told, dict):
        raise ConfigError(f'--metadata {metadata!r} is no JSON object, such as {{"text": "OPEN"}}')
    files = images or []
    pictures = [read_picture(file) for file in files]
    prompts = prompts_for(prompt or (), len(files), told)
    _table({"": list(map(str, files)), **findings(score_images(loaded, pictures, prompts))})


app.add_typer(data.app)


def main() -> None:
    """Run the command; bad input is one message and exit status 2."""
    set_defaults()
    try:
        app()
    except DdpoError as error:
        console.print(f"[bold red]{type(error).__name__}[/]", style=None, highlight=False)
        _say(str(error))
        sys.exit(2)


def _parameters(given: Sequence[str]) -> dict[str, Any]:
    """Read parameters written as a=value, the value as YAML."""
    import yaml

    from ddpo.errors import ConfigError

    parameters = {}
    for each in given:
        name, separator, text = each.partition("=")
        if not separator or not name.strip():
            raise ConfigError(f"--param {each!r} is no `a=value`")
        try:
            parameters[name.strip()] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"--param {each!r} cannot be read as YAML: {error}") from error
    return parameters


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


def _say(text: str) -> None:
    """Print a line as it is: keys and errors may look like markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _open(run_id: str, root: str | None) -> Run:
    from ddpo.run import open_run, storage_root
    from ddpo.store.objects import Store

    return open_run(Store.open(storage_root(root)), run_id)


def _show(run_id: str, epochs: int, run: Callable[[], object], store: Store) -> None:
    """Run a flow under progress bars, then show what came of it."""
    from ddpo.run import open_run
    from flows.bars import Bars
    from flows.stopping import Stop, resume_command, start_server
    from tasks.progress import shown_by

    hide_loading_bars()
    again = resume_command(store, run_id)

    def tell() -> None:
        console.show_cursor()  # hidden by bars that may not have come to their end
        _say(f"stopped; what is committed is kept. Go on with: {again}")

    bars = Bars(console, run_id, epochs)
    try:
        with Stop(tell), without_heartbeats(), bars, shown_by(bars):
            start_server()
            run()
    except Exception as error:
        console.print(f"[bold red]the run failed: {type(error).__name__}[/]", highlight=False)
        _say(str(error))
        _say(f"What is committed is kept. Go on with: {again}")
        sys.exit(1)
    _summarise(open_run(store, run_id))


def _summarise(run: Run) -> None:
    from ddpo.report import reward_curve
    from ddpo.secrets import hide_credentials
    from flows.train import outputs_folder
    from tasks.export import ADAPTER_FOLDER, PIPELINE_FOLDER

    curve = reward_curve(run)
    outputs = outputs_folder(run.config, run.run_id)
    table = Table("", "first epoch", "last epoch", title=run.run_id, title_justify="left")
    first, last = curve[0], curve[-1]
    table.add_row("epoch", str(first.epoch), str(last.epoch))
    table.add_row("reward, mean", f"{first.mean:.4f}", f"{last.mean:.4f}")
    table.add_row("reward, std", f"{first.std:.4f}", f"{last.std:.4f}")
    console.print(table)
    places = Table.grid(padding=(0, 2))
    places.add_column()
    places.add_column(overflow="fold")  # a path that is cut short leads nowhere
    places.add_row("report", str(outputs / "report.png"))
    whole = run.config.trainable.type == "full"
    places.add_row("weights", str(outputs / (PIPELINE_FOLDER if whole else ADAPTER_FOLDER)))
    places.add_row("store", run.store.root)
    places.add_row("MLflow", hide_credentials(run.config.tracking.uri))
    places.add_row("look", "ddpo ui")
    console.print(places)


if __name__ == "__main__":
    main()
