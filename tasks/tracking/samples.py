"""An epoch's samples on a run's page: a dataset with their digest, and a table of their rewards."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from ddpo.basics.digests import json_digest
from ddpo.runs import Run
from ddpo.store.epochs import Epoch, read_epoch
from ddpo.store.kinds import ADVANTAGES, ROLLOUTS
from ddpo.store.tables import AdvantageRow, SampleRow
from ddpo_workflow.tasks.tracking.tracker import RunTracker

_COLUMNS = ("reward", "status", "prompt", "seed", "sample_id")
_MOST_ROWS = 500  # MLflow's page shows no more of a table


def log_prompts(page: RunTracker, run: Run) -> None:
    """Log a run's prompt set as a dataset of its page.

    Args:
        page: The run's page.
        run: The run.
    """
    page.log_dataset(
        name=f"prompts-{run.config.prompts.name}",
        context="prompts",
        digest=run.pins.prompts,
        source={"prompts": run.config.prompts.name},
    )


def log_samples(page: RunTracker, run: Run, epoch: int) -> None:
    """Log a committed epoch's samples; what retention has deleted has no table.

    Args:
        page: The run's page.
        run: The run.
        epoch: The epoch.
    """
    committed = read_epoch(run.store, run.run_id, epoch)
    rollouts = committed.commit.rollouts
    # The folder of the samples: a fork's first ones are its parent's.
    folder = ROLLOUTS.stem("rollouts", ROLLOUTS.partition(rollouts[0])).rpartition("/")[0]
    credit = ADVANTAGES.load(run.store, committed.commit.advantages).rows()
    page.log_dataset(
        name=f"rollouts-epoch-{epoch:05}",
        context="rollouts",
        digest=json_digest([ref.sha256 for ref in rollouts]),
        source={"uri": run.store.url(folder)},
        rows=len(credit),
    )
    if committed.retirement() is None:
        page.log_text(_table(committed, credit), f"samples/epoch-{epoch:05}.csv")


def _table(epoch: Epoch, credit: Sequence[AdvantageRow]) -> str:
    """Return the samples with their rewards as CSV, the best first."""
    samples: dict[str, SampleRow] = {
        row.sample_id: row for shard in epoch.shards for row in shard.samples()
    }
    lowest = float("-inf")
    rows = sorted(credit, key=lambda row: lowest if row.reward is None else row.reward)[::-1]
    if len(rows) > _MOST_ROWS:
        rows = [*rows[: _MOST_ROWS // 2], *rows[-_MOST_ROWS // 2 :]]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in rows:
        sample = samples[row.sample_id]
        reward = "" if row.reward is None else f"{row.reward:.6g}"
        writer.writerow((reward, row.status, sample.prompt, sample.seed, row.sample_id))
    return text.getvalue()
