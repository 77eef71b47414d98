"""What a work folder has trained: averaged weights in modules of their own."""

from diffusers import AutoencoderKL
from safetensors.torch import load_file

from ddpo.starter.judge import Judge, JudgeNetwork, build_clip
from ddpo.starter.text import build_tokenizer
from starter_training.loop import load_ema
from starter_training.networks import build_vae, whiten
from starter_training.work import WorkFolder


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
