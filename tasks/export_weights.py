"""The task that exports trained weights: files for plain diffusers, a model in MLflow."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from prefect import task
from prefect.cache_policies import NO_CACHE

from ddpo.config import FullConfig
from ddpo.models import hub
from ddpo.store.checkpoints import Checkpoint
from ddpo.store.kinds import CHECKPOINT
from ddpo.store.manifests import Ref
from ddpo_workflow.tasks.retries import STORAGE
from ddpo_workflow.tasks.tracking.tracker import TrackingHandle, tracker
from ddpo_workflow.tasks.worker import RunHandle, opened, policy_at

ADAPTER_FOLDER = "lora"
PIPELINE_FOLDER = "pipeline"
CHAMPION_FOLDER = "champion"


@task(name="export", task_run_name="export checkpoint {epoch}", cache_policy=NO_CACHE, **STORAGE)
def export_weights(
    handle: RunHandle,
    tracking: TrackingHandle,
    checkpoint: Ref[Checkpoint],
    outputs: str | None,
    epoch: int,
    champion: bool = False,
) -> None:
    """Log a checkpoint's adapter as an MLflow model, or its whole pipeline as a folder.

    Args:
        handle: The run.
        tracking: Its MLflow run.
        checkpoint: The checkpoint.
        outputs: A local folder that receives the same files; None for MLflow alone.
        epoch: The checkpoint's epoch.
        champion: Whether it is the run's best one, which MLflow's registry names `champion`.
    """
    run = opened(handle)
    whole = isinstance(run.config.trainable, FullConfig)
    digests = CHECKPOINT.load(run.store, checkpoint).digests
    names = ("policy_digest", "ema_digest")  # the second if the average is exported
    exported = {name: digests[name] for name in names if name in digests}
    temporary = tempfile.TemporaryDirectory()
    folder = Path(temporary.name) / (PIPELINE_FOLDER if whole else ADAPTER_FOLDER)
    with policy_at(run, checkpoint, weights="average") as lease:
        lease.policy.export(folder)
        local = str(lease.policy.folder)
    if outputs is not None:
        shutil.copytree(folder, Path(outputs) / folder.name, dirs_exist_ok=True)
    page = tracker(tracking)

    def log() -> None:
        if whole:
            # A folder of its own: an earlier champion's version refers to its files.
            place = f"{CHAMPION_FOLDER}/epoch-{epoch:05}" if champion else PIPELINE_FOLDER
            page.log_folder(folder, place)
            model_uri = page.artifact_uri(place)
        else:
            # A hub id stays one: the user who loads the adapter has another cache.
            model = run.config.model
            on_hub = hub.on_hub(model)
            model_uri = page.log_adapter(
                folder,
                base_model=model.path if on_hub else local,
                base_model_revision=model.revision if on_hub else None,
                name=f"{run.run_id}-adapter".replace(".", "_"),
                step=max(epoch - 1, 0),
                metadata={"epochs": epoch, **exported},
            )
        if champion:
            page.crown(model_uri, run.run_id, run.uid, epoch)
        temporary.cleanup()

    page.backlog.log(log)  # the folder stays until that is done
