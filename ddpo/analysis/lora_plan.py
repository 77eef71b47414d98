"""What an export of a run's LoRA consists of, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ddpo.analysis.evaluation.champion import champion_epoch
from ddpo.analysis.saved_checkpoint import saved_checkpoint
from ddpo.basics.version import VERSION
from ddpo.config import FullConfig, LoraConfig
from ddpo.errors import ConfigError
from ddpo.models import hub
from ddpo.runs import Run
from ddpo.store.checkpoints import Checkpoint

DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"
"""The name under which diffusers looks for a LoRA."""
CARD = "README.md"
IMAGES_FOLDER = "images"

_UID = "ddpo.uid"


@dataclass(frozen=True)
class LoraExport:
    """What is exported, and where to; nothing is loaded or written yet."""

    run: Run
    """The run."""
    lora: LoraConfig
    """The settings of its adapter."""
    epoch: int
    """Number of epochs trained."""
    checkpoint: Checkpoint
    """The checkpoint after them."""
    folder: Path
    """The target."""
    repository: str | None
    """The repository of the Hub that it is uploaded to afterwards; None for none."""

    @property
    def kohya_file(self) -> str:
        """Name of the file for ComfyUI and AUTOMATIC1111, which show it to their users."""
        return f"{self.run.run_id}-kohya.safetensors"

    @property
    def base_model(self) -> str:
        """The base model's Hub id, or a name: a local path may be private."""
        model = self.run.config.model
        return model.path if hub.on_hub(model) else Path(model.path).name

    @property
    def files(self) -> tuple[str, ...]:
        """Names of all files in the folder, as patterns."""
        return (DIFFUSERS_FILE, self.kohya_file, CARD, f"{IMAGES_FOLDER}/*.png")

    @property
    def notes(self) -> dict[str, str]:
        """What the headers of the files say of their origin."""
        return {
            "ddpo.version": VERSION,
            "ddpo.run": self.run.run_id,
            _UID: self.run.uid,
            "ddpo.epoch": str(self.epoch),
            "ddpo.base_model": self.base_model,
            "ddpo.reward": self.run.reward_id,
            # As trained; in the weights, alpha / rank is already multiplied in.
            "ddpo.rank": str(self.lora.rank),
            "ddpo.alpha": str(self.lora.alpha),
        }


def plan_export(
    run: Run,
    folder: Path,
    *,
    epoch: int | None = None,
    champion: bool = False,
    repository: str | None = None,
) -> LoraExport:
    """Check that a run's LoRA can be exported.

    Args:
        run: The run.
        folder: The target: absent, empty, or an earlier export of the same run.
        epoch: Number of epochs trained; None for the latest checkpoint.
        champion: Export the best evaluated checkpoint instead.
        repository: As in `LoraExport`.

    Raises:
        ConfigError: The run trains no LoRA, there is no such checkpoint, or the folder is taken.
    """
    lora = run.config.trainable
    if isinstance(lora, FullConfig):
        raise ConfigError(
            f"run {run.run_id!r} trains the whole network (trainable.type: full) and has no LoRA; "
            f"expected a run with trainable.type: lora. Its weights are the folder pipeline in "
            f"{run.config.outputs}/{run.run_id}, which diffusers loads as it is; `ddpo resume "
            f"{run.run_id}` writes it again"
        )
    if champion:
        epoch = champion_epoch(run)
    epoch, checkpoint = saved_checkpoint(run, epoch)
    taken = folder.exists() and not (folder.is_dir() and not any(folder.iterdir()))
    if taken and _owner(folder / DIFFUSERS_FILE) != run.uid:
        raise ConfigError(
            f"--out {folder} exists, and is neither an empty folder nor an earlier export of run "
            f"{run.run_id!r}; choose another folder, or delete it first"
        )
    return LoraExport(run, lora, epoch, checkpoint, folder, repository)


def _owner(file: Path) -> str | None:
    """Return the run whose LoRA a file is, by its random id; None if it is none of ours."""
    try:
        with safe_open(file, "np") as stored:
            return (stored.metadata() or {}).get(_UID)
    except (OSError, SafetensorError):
        return None
