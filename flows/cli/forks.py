"""`ddpo rescore`, `fork` and `compare`: saved samples under other rewards and algorithms."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ddpo_workflow.flows.cli.common import (
    ConfigFile,
    ConfigRoot,
    Epochs,
    Parameters,
    Root,
    RunId,
    Settings,
    Trust,
    read_parameters,
)
from ddpo_workflow.flows.cli.running import NOTHING_BEGUN, checked, running, show_run
from ddpo_workflow.flows.cli.screen import busy, console, say, show, show_places

if TYPE_CHECKING:
    from ddpo.analysis.comparison.plan import Comparison
    from ddpo.analysis.comparison.report import Table as Cells
    from ddpo.store.objects import Store
    from ddpo_workflow.flows.run_requests import Rescoring

app = typer.Typer()


@app.command()
def rescore(
    run_id: RunId,
    reward: Annotated[str, typer.Option(help="A name listed by `ddpo rewards`, or module:name.")],
    param: Parameters = None,
    epochs: Epochs = None,
    root: Root = None,
    trust: Trust = False,
) -> None:
    """Score a run's saved samples with another reward; nothing is sampled again."""
    from ddpo.runs import storage_root
    from ddpo_workflow.flows.run_requests import RescoreRequest

    request = RescoreRequest(
        run_id=run_id,
        reward=reward,
        parameters=read_parameters(param or ()),
        epochs=epochs,
        storage=storage_root(root),
        trust=trust,
    )
    with checked(request) as rescoring:
        from ddpo_workflow.flows.rescore import rescore as rescore_flow

        again = "Scored shards are kept; run the same command again to continue"
        with running("scoring", lambda: again), busy(f"scoring {len(rescoring.epochs)} epochs"):
            rescore_flow(**dict(request))
    _show_rescored(rescoring, reward)


@app.command()
def fork(
    run_id: RunId,
    epoch: Annotated[
        int,
        typer.Option(
            help="The fork's first epoch; it starts from the checkpoint before this epoch, and "
            "trains on its saved samples.",
            min=0,
        ),
    ],
    reward: Annotated[
        str | None, typer.Option(help="The fork's reward. By default the same reward.")
    ] = None,
    param: Parameters = None,
    set_: Settings = None,
    fork_id: Annotated[
        str | None, typer.Option("--run-id", help="The fork's name. An existing fork is resumed.")
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(help="Total number of epochs, including those before the fork.", min=1),
    ] = None,
    reset_statistics: Annotated[
        bool,
        typer.Option(
            "--reset-statistics",
            help="Start without prompt statistics, instead of scoring the epochs before the fork.",
        ),
    ] = False,
    root: Root = None,
    trust: Trust = False,
) -> None:
    """Start a run from another run's checkpoint and samples, with another reward or settings.

    Runs the code that the other run names.
    """
    from ddpo.runs import storage_root
    from ddpo_workflow.flows.run_requests import ForkRequest

    request = ForkRequest(
        run_id=run_id,
        epoch=epoch,
        reward=reward,
        parameters=read_parameters(param or ()),
        fork_id=fork_id,
        epochs=epochs,
        statistics="reset" if reset_statistics else "rebuild",
        overrides=tuple(set_ or ()),
        storage=storage_root(root),
        trust=trust,
    )
    with checked(request) as plan:
        from ddpo_workflow.flows.fork import fork as fork_flow

        show_run(plan, lambda: fork_flow(**dict(request)))


@app.command()
def compare(
    config: ConfigFile,
    name: Annotated[
        str | None,
        typer.Option(
            help="The comparison's name. An existing comparison is resumed. By default the file's."
        ),
    ] = None,
    set_: Settings = None,
    root: ConfigRoot = None,
) -> None:
    """Compare algorithms over several seeds, with shared first samples and equal reward queries."""
    from ddpo_workflow.flows.run_requests import CompareRequest

    request = CompareRequest(
        config_file=config, name=name, overrides=tuple(set_ or ()), storage=root
    )
    with checked(request) as plan:
        from ddpo_workflow.flows.cli.bars import bars_in_terminal
        from ddpo_workflow.flows.compare import compare as compare_flow

        comparison = plan.comparison
        bars = bars_in_terminal(console, comparison.name, plan.epochs)

        def advice() -> str:
            if any(run.begun.is_set() for run in plan.runs.values()):
                return "Committed work is kept; run the same command again to continue"
            return NOTHING_BEGUN

        with running("the comparison", advice), bars:
            folder = Path(str(compare_flow(**dict(request))))
    _show_comparison(comparison, plan.store, folder)


def _show_comparison(comparison: Comparison, store: Store, folder: Path) -> None:
    """Print the results of a comparison, and where they are."""
    from ddpo.analysis.comparison.report import (
        MARKDOWN,
        PLOT,
        explanation,
        ratio_table,
        result_table,
    )
    from ddpo.analysis.comparison.result import read_result
    from ddpo.basics.redaction import hide_credentials

    result = read_result(comparison, store)
    _show_table(result_table(comparison, result), comparison.name)
    if result.ratios:
        _show_table(ratio_table(result), "importance ratios on the shared history")
    for paragraph in explanation(comparison):
        say(paragraph, style="dim")
    show_places(
        {
            "page": str(folder / MARKDOWN),
            "plot": str(folder / PLOT),
            "store": store.root,
            "MLflow": hide_credentials(comparison.members[0].config.tracking.uri),
        }
    )


def _show_table(cells: Cells, title: str) -> None:
    headings, rows = cells
    say(title, style="bold")
    table = Table(*headings)
    for row in rows:
        table.add_row(*row)
    show(table)


def _show_rescored(rescoring: Rescoring, reward: str) -> None:
    """Print the mean of both rewards by epoch, and where the new scores are."""
    from ddpo.analysis.history import History
    from ddpo.analysis.rewards import summarize
    from ddpo.basics.redaction import hide_credentials

    run, reward_id = rescoring.run, rescoring.reward_id
    history = History(run)
    say(run.run_id, style="bold")
    table = Table("epoch", run.config.reward.name, reward)
    for epoch in history.epochs:
        if epoch in history.retired_epochs:
            continue
        summaries = [
            summarize(history.samples(name, epochs=[epoch]).column("reward").to_pylist())
            for name in (None, reward_id)
        ]
        table.add_row(str(epoch), *[f"{s.mean:.4g}" if s.scored else "" for s in summaries])
    show(table)
    root = run.store.root.removeprefix("file://")
    show_places(
        {
            "scores": f"{root}/rewards/reward_name={reward_id}/run_id={run.run_id}",
            "MLflow": hide_credentials(run.config.tracking.uri),
        }
    )
