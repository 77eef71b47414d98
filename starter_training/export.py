"""Export checkpoints to the folders that ship."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file, save_file

from starter_training import flow_networks
from starter_training.loop import console, load_ema, write_json
from starter_training.measure import measure
from starter_training.networks import Denoiser, assemble
from starter_training.stages.flow_generator import shipped_vae
from starter_training.trained import trained_judge, trained_vae
from starter_training.work import FlowRecipe, Recipe, WorkFolder, WorkFolderError


@contextmanager
def _replacing_folder(destination: Path) -> Iterator[Path]:
    """Yield a folder to fill, and replace the old one with it at the end."""
    fresh = destination.with_name(destination.name + ".partial")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    yield fresh
    for weights in fresh.rglob("*.safetensors"):
        weights.chmod(0o644)  # safetensors makes files readable by their owner only
    old = destination.with_name(destination.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if destination.exists():
        destination.replace(old)
    fresh.replace(destination)
    shutil.rmtree(old, ignore_errors=True)


def _prefix_names(file: Path, prefix: str) -> None:
    """Put a prefix before the names of a safetensors file's tensors, unless it is there."""
    tensors = load_file(file)
    if not all(name.startswith(prefix) for name in tensors):
        tensors = {prefix + name: value for name, value in tensors.items()}
    save_file(tensors, file, metadata={"format": "pt"})


def export(work: WorkFolder, recipe: Recipe, pipeline_folder: Path, judge_folder: Path) -> None:
    """Write the averaged weights of the latest checkpoints, replacing the old folders.

    Autoencoder and noise predictor are stored in float16, which halves their size, and load as
    float32.

    Args:
        work: A training run with at least the first checkpoint of its last stage.
        recipe: The run's recipe, stored beside the weights with the journal of its stages.
        pipeline_folder: Destination of the pipeline.
        judge_folder: Destination of the judge.

    Raises:
        WorkFolderError: The last stage has no checkpoint yet.
    """
    if not work.unet.exists():
        raise _without_checkpoint(work.unet)
    denoiser = Denoiser()
    step = load_ema(denoiser, work.unet)
    # Measure what ships: weights rounded to float16.
    vae, judge = trained_vae(work).half().float(), trained_judge(work)
    record = {
        "command": recipe.command,
        "recipe": recipe.as_json(),
        "stages": work.read_journal(),
        "unet_pictures_seen": step * recipe.unet.batch,
        "figures": measure(vae, judge, recipe.seed),
    }
    # Not the text encoder: transformers would load it as float16, diffusers loads float32.
    pipeline = assemble(vae.half(), denoiser)
    denoiser.unet.half()
    with _replacing_folder(pipeline_folder) as fresh:
        pipeline.save_pretrained(fresh, safe_serialization=True)
        # What transformers 4 looks for, and 5 reads too: names with a prefix, and a tokenizer's
        # vocabulary and merges as files of their own.
        _prefix_names(fresh / "text_encoder" / "model.safetensors", "text_model.")
        denoiser.tokenizer.backend_tokenizer.model.save(str(fresh / "tokenizer"))
        write_json(fresh / "training.json", record)
    with _replacing_folder(judge_folder) as fresh:
        judge.save(fresh)
        write_json(fresh / "training.json", record)
    console.log(f"exported step {step} of the generator to {pipeline_folder}")


def export_flow(work: WorkFolder, recipe: FlowRecipe, folder: Path) -> None:
    """Write the averaged weights of the flow starter's latest checkpoint, replacing the old folder.

    Autoencoder and velocity predictor are stored in float16, as the starter's are.

    Args:
        work: A training run with at least the first checkpoint of its last stage.
        recipe: The run's recipe, stored beside the weights with the journal of its stages.
        folder: Destination of the pipeline.

    Raises:
        WorkFolderError: The last stage has no checkpoint yet.
    """
    if not work.flow.exists():
        raise _without_checkpoint(work.flow)
    denoiser = flow_networks.FlowDenoiser()
    step = load_ema(denoiser, work.flow)
    record = {
        "command": recipe.command,
        "recipe": recipe.as_json(),
        "stages": work.read_journal(),
        "flow_pictures_seen": step * recipe.flow.batch,
    }
    vae = shipped_vae().half()
    vae.register_to_config(shift_factor=0.0)  # which diffusers adds, whether it is there or not
    pipeline = flow_networks.assemble(vae, denoiser)
    denoiser.transformer.half()
    with _replacing_folder(folder) as fresh:
        pipeline.save_pretrained(fresh, safe_serialization=True)
        write_json(fresh / "training.json", record)
    console.log(f"exported step {step} of the flow generator to {folder}")


def _without_checkpoint(file: Path) -> WorkFolderError:
    return WorkFolderError(
        f"{file} does not exist: resume training until the generator stage has saved its first "
        "checkpoint, then export"
    )
