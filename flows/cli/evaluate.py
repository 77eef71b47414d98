"""`ddpo evaluate`: a run's checkpoints on fixed prompts and seeds, against its first one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from ddpo_workflow.flows.cli.common import Epochs, Root, RunId, Settings, Trust
from ddpo_workflow.flows.cli.running import checked, running
from ddpo_workflow.flows.cli.screen import busy, say, show

if TYPE_CHECKING:
    from ddpo_workflow.flows.run_requests import EvaluationPlan

app = typer.Typer()


@app.command()
def evaluate(
    run_id: RunId,
    epochs: Epochs = None,
    reward: Annotated[
        list[str] | None,
        typer.Option(help="Another reward to score the images with; may be repeated."),
    ] = None,
    set_: Settings = None,
    root: Root = None,
    trust: Trust = False,
) -> None:
    """Evaluate a run's checkpoints on fixed prompts and seeds, against its first one."""
    from ddpo.runs import storage_root
    from ddpo_workflow.flows.run_requests import EvaluateRequest

    request = EvaluateRequest(
        run_id=run_id,
        epochs=epochs,
        rewards=tuple(reward or ()),
        overrides=tuple(set_ or ()),
        storage=storage_root(root),
        trust=trust,
    )
    with checked(request) as plan:
        from ddpo_workflow.flows.evaluate import evaluate as evaluate_flow

        again = "What was sampled and scored is kept; run the same command again to continue"
        count = len(plan.epochs)
        with running("the evaluation", lambda: again), busy(f"evaluating {count} checkpoints"):
            evaluate_flow(**dict(request))
    _show(plan)


def _show(plan: EvaluationPlan) -> None:
    """Print each reward's mean and gain by checkpoint, then what the images are like."""
    from ddpo.analysis.evaluation.champion import champion_text
    from ddpo.analysis.evaluation.summary import labels_in, score_text
    from ddpo_workflow.tasks.evaluated import alarms_of, metrics_of

    summaries = [(epoch, metrics_of(plan.run, plan.config, epoch)) for epoch in plan.epochs]
    labels = labels_in(summaries[0][1])
    scores = Table("checkpoint", *(label for label in labels))
    for epoch, metrics in summaries:
        scores.add_row(str(epoch), *(score_text(metrics, label) for label in labels))
    show(scores)
    caption = "mean score, and the gain over the first checkpoint with its 95% confidence interval"
    say(caption, style="dim")
    names = [n for n in ("kl_to_base", "diversity", "repetition") if n in summaries[-1][1]]
    names += [name for name in summaries[0][1] if name.startswith("images/")]
    images = Table("checkpoint", *(name.removeprefix("images/") for name in names))
    for epoch, metrics in summaries:
        images.add_row(str(epoch), *(_number(metrics.get(name)) for name in names))
    show(images)
    for epoch in plan.epochs:
        for alarm in alarms_of(plan.run, plan.config, epoch):
            say(f"checkpoint {epoch} may exploit its reward: {alarm}", style="yellow")
    say(champion_text(plan.run))


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
