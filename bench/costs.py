"""Bytes and forwards a picture of each algorithm: ``python -m bench.costs``.

Runs one epoch of each on the starter, with guidance, and reads what the store then holds and the
checkpoint states.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path

from bench.results import train_run
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT
from ddpo.store.objects import Store
from ddpo_workflow.flows.cli.quiet import hide_loading_bars

ALGORITHMS: Mapping[str, str] = {
    "ddpo_is": "{type: ddpo_is, updates_per_epoch: 1}",
    "ddpo_is, kl_weight": "{type: ddpo_is, updates_per_epoch: 1, kl_weight: 0.01}",
    "ddpo_sf": "{type: ddpo_sf, updates_per_epoch: 1}",
    "rwr, one pass": "{type: rwr, inner_epochs: 1, updates_per_epoch: 1}",
    "nft": "{type: nft, updates_per_epoch: 1}",
    "awm": "{type: awm, updates_per_epoch: 1}",
    "dpo, one pass": "{type: dpo, updates_per_epoch: 1}",
}
SAMPLES = 16
FOLDERS = ("trajectories", "samples", "rollouts")


def main() -> None:
    """Train and print; the table goes to docs/algorithms.md by hand."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    hide_loading_bars()
    lines = [f"| algorithm | {' | '.join(FOLDERS)} | forwards in sampling | in the update |"]
    lines.append("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for number, (algorithm, settings) in enumerate(ALGORITHMS.items()):
            run_id = f"costs-{number}"
            changes = {
                "algorithm": settings,
                "epochs": 1,
                "sampler": f"{{type: ddim, steps: {arguments.steps}, guidance_scale: 5.0}}",
                "rollouts": f"{{samples_per_epoch: {SAMPLES}, shard_size: 16, "
                "samples_per_prompt: 8}",
                "numerics.sample_batch_size": 16,
                "numerics.micro_batch_size": 16,
                "numerics.threads": 1,
            }
            train_run(run_id, "configs/starter.yaml", changes, folder)
            metrics = CHECKPOINT.require(
                Store.open(str(folder / "store")), Partition(run_id, 1)
            ).metrics
            stored = [_bytes(folder / "store" / tree, run_id) / SAMPLES for tree in FOLDERS]
            cells = [f"{each:,.0f}" for each in stored]
            cells += [f"{metrics[key] / SAMPLES:g}" for key in ("sampling_forwards", "forwards")]
            lines.append(f"| {algorithm} | {' | '.join(cells)} |")
    print("\n" + "\n".join(lines), flush=True)


def _bytes(folder: Path, run_id: str) -> int:
    files = folder.rglob(f"run_id={run_id}/epoch=00000/*")
    return sum(file.stat().st_size for file in files)


if __name__ == "__main__":
    main()
