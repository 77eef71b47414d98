"""The averaged weights of a work folder, loaded into modules."""

from __future__ import annotations

from diffusers import AutoencoderKL
from safetensors.torch import load_file

from ddpo.starter.judge import Judge, JudgeNetwork, build_clip
from ddpo.starter.text import build_tokenizer
from starter_training.loop import load_ema
from starter_training.networks import build_vae, whiten
from starter_training.work import WorkFolder


def trained_vae(work: WorkFolder) -> AutoencoderKL:
    """Return the averaged, whitened autoencoder of a run that has encoded its latents."""
    vae = build_vae()
    load_ema(vae, work.vae)
    statistics = load_file(work.latents)
    whiten(vae, statistics["mean"], statistics["std"])
    return vae


def trained_judge(work: WorkFolder) -> Judge:
    """Return the averaged judge of a run that has trained one."""
    network = JudgeNetwork(build_clip(build_tokenizer()))
    load_ema(network, work.judge)
    return Judge(network)
