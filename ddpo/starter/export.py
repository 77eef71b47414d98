"""From checkpoints to the folders that ship."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from ddpo.starter.judge import Judge, JudgeNetwork, build_clip
from ddpo.starter.loop import console, load_ema, write_json
from ddpo.starter.measure import FRESH_PICTURES, accuracy, fresh_pictures, psnr_db, reconstruct
from ddpo.starter.networks import Denoiser, assemble, build_vae, whiten
from ddpo.starter.text import build_tokenizer
from ddpo.starter.work import Recipe, WorkFolder


@contextmanager
def _replacing_folder(destination: Path) -> Iterator[Path]:
    """Gives a folder to fill, and puts it in the old one's place at the end."""
    fresh = destination.with_name(destination.name + ".partial")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    yield fresh
    for weights in fresh.rglob("*.safetensors"):
        weights.chmod(0o644)  # safetensors lets only the owner read, also once installed
    old = destination.with_name(destination.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if destination.exists():
        destination.replace(old)
    fresh.replace(destination)
    shutil.rmtree(old, ignore_errors=True)


def trained_vae(work: WorkFolder) -> AutoencoderKL:
    """Returns the averaged autoencoder, whitened.

    Args:
        work: a run that has encoded its latents.
    """
    vae = build_vae()
    load_ema(vae, work.vae)
    statistics = load_file(work.latents)
    whiten(vae, statistics["mean"], statistics["std"])
    return vae


def trained_judge(work: WorkFolder) -> Judge:
    """Returns the averaged judge of a run that has trained one."""
    network = JudgeNetwork(build_clip(build_tokenizer()))
    load_ema(network, work.judge)
    return Judge(network)


def measure(work: WorkFolder, recipe: Recipe) -> dict[str, Any]:
    """Measures autoencoder and judge on fresh pictures.

    Returns:
        `psnr_db` of reconstructions, and the judge's shares of right answers on `renders` and on
        their `reconstructions`.
    """
    pictures = fresh_pictures(recipe.seed, FRESH_PICTURES)
    scenes = [picture.scene for picture in pictures]
    judge = trained_judge(work)
    pixels = np.stack([picture.pixels for picture in pictures])
    made = reconstruct(trained_vae(work), pixels)
    return {
        "psnr_db": psnr_db(pictures, made),
        "judge": {
            name: accuracy(judge, [Image.fromarray(picture) for picture in shown], scenes)
            for name, shown in (("renders", pixels), ("reconstructions", made))
        },
    }


def export(work: WorkFolder, recipe: Recipe, pipeline_folder: Path, judge_folder: Path) -> None:
    """Writes the averaged weights of the latest checkpoints, in place of the old folders.

    Autoencoder and noise predictor are stored in float16, which halves the folder, and load as
    float32.

    Args:
        work: a training run that has come at least to the first checkpoint of the last stage.
        recipe: of the run; stored beside the weights with what is known of its stages.
        pipeline_folder: gets the pipeline.
        judge_folder: gets the judge.

    Raises:
        FileNotFoundError: the run has not come that far.
    """
    if not work.unet.exists():
        raise FileNotFoundError(
            f"{work.unet} does not exist: train on (with --resume) until the generator stage has "
            "saved its first checkpoint, then export"
        )
    denoiser = Denoiser()
    step = load_ema(denoiser, work.unet)
    vae = trained_vae(work)
    record = {
        "command": recipe.command,
        "recipe": recipe.as_json(),
        "stages": work.read_journal(),
        "unet_pictures_seen": step * recipe.unet.batch,
        "figures": measure(work, recipe),
    }
    # Not the text encoder: transformers would load it as float16, diffusers loads float32.
    pipeline = assemble(vae.half(), denoiser)
    denoiser.unet.half()
    with _replacing_folder(pipeline_folder) as fresh:
        pipeline.save_pretrained(fresh, safe_serialization=True)
        write_json(fresh / "training.json", record)
    with _replacing_folder(judge_folder) as fresh:
        trained_judge(work).save(fresh)
        write_json(fresh / "training.json", record)
    console.log(f"exported step {step} of the generator to {pipeline_folder}")
