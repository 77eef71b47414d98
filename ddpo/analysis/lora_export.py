"""Take a run's LoRA home: its files for other programs, with a model card, in one folder."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddpo.analysis.lora_plan import DIFFUSERS_FILE, IMAGES_FOLDER, LoraExport
from ddpo.analysis.model_card import write_card
from ddpo.diffusion.window import whole_process
from ddpo.errors import ConfigError, PolicyMismatch
from ddpo.models import Policy, load_policy
from ddpo.models.numerics import resolve_elsewhere


def write_export(export: LoraExport) -> None:
    """Write the LoRA's files and its model card.

    A new folder appears complete or not at all. In an earlier export of the run, what was exported
    is replaced, and other files stay.

    Args:
        export: What to export.

    Raises:
        ConfigError: The folder cannot be written.
        RetiredObject: Retention has deleted the checkpoint's weights.
        PolicyMismatch: The base model is not the one that the run was started with.
        ModelError: It cannot be loaded, or diffusers reads other weights than were written.
        StoreError: An object is damaged or missing.
    """
    folder = export.folder
    with _writing(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent)
    with scratch:
        policy = _trained_policy(export)
        with _writing(folder):
            made = Path(scratch.name) / "export"
            made.mkdir()
            base = policy.export_lora(
                made / DIFFUSERS_FILE, made / export.kohya_file, notes=export.notes
            )
            write_card(
                export,
                made,
                pipeline=policy.pipeline_name,
                scheduler=whole_process(policy, export.run.config.sampler).plain_scheduler,
                other_programs=base is not None,
            )
            _move(made, folder)


def _move(made: Path, folder: Path) -> None:
    if not folder.exists() or not any(folder.iterdir()):
        if folder.exists():
            folder.rmdir()
        made.rename(folder)
        return
    shutil.rmtree(folder / IMAGES_FOLDER, ignore_errors=True)
    for path in made.iterdir():
        path.replace(folder / path.name)


def _trained_policy(export: LoraExport) -> Policy:
    """Load the base model on the CPU, where it need not compute, with the exported weights."""
    run, config = export.run, export.run.config
    state = export.checkpoint.state()
    numerics = resolve_elsewhere(run.numerics, "cpu")
    policy = load_policy(config.model, config.trainable, numerics, seed=config.seed)
    policy.weights.load(state.shown_weights)
    expected = export.checkpoint.digests["ema_digest" if state.ema else "policy_digest"]
    if policy.digest != expected:
        raise PolicyMismatch(
            f"checkpoint {export.epoch} of run {run.run_id!r} with the base model in "
            f"{policy.folder} has policy digest {policy.digest}, expected {expected}: the base "
            "model's files have changed since the run started. Restore the original files"
        )
    return policy


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be written: {error.strerror or error}") from error
