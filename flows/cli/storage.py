"""`ddpo verify`, `gc`, `delete` and `doctor`: check and delete what is stored; check a setup."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

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
from ddpo_workflow.flows.cli.screen import busy, say
from ddpo_workflow.flows.messages import as_called, store_command

if TYPE_CHECKING:
    from ddpo.store.upkeep.delete import Deletion

app = typer.Typer()

_LONGEST = 100 * 365 * 24  # hours


@app.command()
def verify(
    run_id: RunId,
    repair: Annotated[
        bool, typer.Option("--repair", help="Rebuild damaged parts from intact ones.")
    ] = False,
    root: Root = None,
    trust: Trust = False,
) -> None:
    """Read everything a run committed; report what is damaged, and rebuild what can be rebuilt.

    Only --repair runs code that the run names. The exit status is 1 if anything is damaged, or if
    no committed epoch is found.
    """
    from ddpo.runs import open_run, storage_root
    from ddpo.store.objects import Store
    from ddpo.store.upkeep.verify import Verification, repairable_part, verify_run

    store = Store.open(storage_root(root))

    def check() -> Verification:
        with busy("reading") as update:
            return verify_run(store, run_id, lambda key: update(f"reading {key}"))

    found = check()
    reasons: dict[str, str] = {}
    if found.damages and repair:
        from ddpo_workflow.tasks.repair import repair as repair_parts

        hide_loading_bars()
        run = open_run(store, run_id)
        if trust:
            run.trust()
        for outcome in repair_parts(run, found.damages):
            reasons[outcome.manifest] = outcome.reason
            status = "rebuilt" if outcome.done else "not rebuilt"
            say(f"{status}: {outcome.manifest}")
        found = check()
    rebuild = store_command(store, "verify", run_id, "--repair")
    for damage in found.damages:
        derivable = repairable_part(damage.manifest) is not None
        way_out = f"rebuild it with: {rebuild}" if derivable else "restore it from a copy"
        say(f"damaged: {damage}")
        say(as_called(f"    listed in {damage.manifest}; {reasons.get(damage.manifest, way_out)}"))
    retired = f", {found.retired} retired on purpose" if found.retired else ""
    outcome = "intact" if found.epochs else "no committed epoch found"
    if found.damages:
        outcome = f"{len(found.damages)} damaged"
    say(f"{found.objects} objects, {found.bytes / 1e6:.1f} MB{retired}: {outcome}")
    if found.damages or not found.epochs:
        sys.exit(1)


@app.command()
def gc(
    run_id: RunId,
    older_than: Annotated[
        float,
        typer.Option(
            help="Minimum age in hours; younger objects may belong to a running task.",
            min=6,
            max=_LONGEST,
        ),
    ] = 24.0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only list what would be deleted.")
    ] = False,
    root: Root = None,
) -> None:
    """Delete objects of a run that no manifest lists, left behind by killed tasks."""
    from datetime import timedelta

    from ddpo.errors import StoreCallFailed
    from ddpo.store.upkeep.sweep import find_unreferenced, sweep
    from ddpo.store.upkeep.uploads import abort_uploads

    run = saved_run(run_id, root)
    grace = timedelta(hours=older_than)
    found = (find_unreferenced if dry_run else sweep)(run.store, run_id, grace=grace)
    for key, size in found.items():
        say(f"{size:>12,}  {key}")
    verb = "would be deleted" if dry_run else "deleted"
    megabytes = sum(found.values()) / 1e6
    say(f"{len(found)} objects, {megabytes:.1f} MB {verb}")
    try:
        for key in abort_uploads(run.store, run_id, grace=grace, dry_run=dry_run):
            say(f"unfinished upload {verb}: {key}")
    except StoreCallFailed as error:  # the right to list them is one of its own
        say(f"unfinished uploads were left alone: {error.reason}")


@app.command()
def delete(
    run_id: RunId,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    root: Root = None,
) -> None:
    """Delete a run from the store, and mark its pages in MLflow as deleted."""
    from ddpo.runs import storage_root
    from ddpo.runs.lease import wait_until_free
    from ddpo.store.objects import Store
    from ddpo.store.upkeep.delete import begin_deletion, finish_deletion, plan_deletion

    store = Store.open(storage_root(root))
    wait_until_free(store, run_id)
    deletion = plan_deletion(store, run_id)
    say(_described(deletion))
    if not yes and not typer.confirm("Delete it?"):
        say("nothing was deleted")
        return
    from ddpo_workflow.tasks.tracking.deletion import delete_pages  # imports MLflow

    begin_deletion(deletion)
    for reason in delete_pages(deletion.record):
        say(f"a page in MLflow was not marked as deleted: {reason}")
    with busy("deleting") as update:
        finish_deletion(deletion, lambda key: update(f"deleting {key}"))
    say(f"deleted {run_id}. Exported files, such as those in the outputs folder, remain")


def _described(deletion: Deletion) -> str:
    """Say what a deletion deletes."""
    from ddpo.basics.redaction import hide_credentials

    record, sizes = deletion.record, deletion.sizes
    size = f"{len(sizes)} objects, {sum(sizes.values()) / 1e6:.1f} MB in {deletion.store.root}"
    pages = "".join(
        f"; its pages in the experiment {place.experiment!r} of {hide_credentials(place.uri)}"
        for place in record.tracked_at
    )
    begun = ", the rest of an interrupted deletion" if deletion.begun else ""
    return f"{record.run_id}: {size}{begun}{pages}"


@app.command()
def doctor(
    config: ConfigFile,
    set_: Settings = None,
    root: ConfigRoot = None,
) -> None:
    """Check storage, model, device, MLflow and Prefect before starting a long run."""
    from ddpo.config.files import read_config
    from ddpo_workflow.flows.cli.doctor import examine

    settings = read_config(config, set_ or (), {"storage.root": root})
    failed = 0
    for finding in examine(settings):
        failed += not finding.ok
        mark = ("ok  ", "green") if finding.ok else ("no  ", "bold red")
        say(Text.assemble(mark, (finding.part, "bold")))
        say(f"    {finding.message}")
    if failed:
        checks = "1 check" if failed == 1 else f"{failed} checks"
        say(f"{checks} failed; see the suggested fixes above")
        sys.exit(1)
    say("ready")
