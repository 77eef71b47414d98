"""One epoch through the library, measured: what the GPU test runs, and the CPU exercises."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from ddpo.basics.digests import tensors_digest
from ddpo.config import RunConfig
from ddpo.diffusion.sampling import sample
from ddpo.models import Policy
from ddpo.starter.text import build_tokenizer
from ddpo.store.kinds import CHECKPOINT
from ddpo.store.objects import Store
from ddpo.training.loop import initial_state, update
from ddpo.training.samples import Rollouts
from ddpo.training.state import TrainState
from tests.states import commit_state
from tests.tiny import PROMPTS, SCHEDULE, as_credit, load_policy


@dataclass(frozen=True)
class MeasuredEpoch:
    state: TrainState
    metrics: dict[str, Any]
    digest: str
    """Of the trained weights and the optimizer after the epoch."""
    sampling_peak_bytes: int
    update_peak_bytes: int

    def __str__(self) -> str:
        deviation = self.metrics["initial_ratio_deviation"]
        return (
            f"initial |ratio - 1|: mean {deviation['mean']:.2e}, p99 {deviation['p99']:.2e}, max "
            f"{deviation['max']:.2e}; old log-probs "
            f"{'recomputed' if self.metrics['recomputed_log_probs'] else 'stored'}; peak memory "
            f"{self.sampling_peak_bytes / 2**30:.2f} GiB sampling, "
            f"{self.update_peak_bytes / 2**30:.2f} GiB updating"
        )


def run_epoch(policy: Policy, state: TrainState, config: RunConfig) -> MeasuredEpoch:
    """Run epoch ``state.epoch`` with prompts, seeds and advantages that depend on it alone."""
    count = config.rollouts.samples_per_epoch
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(count)]
    first_seed = 1000 * (state.epoch + 1)
    reset_peak()
    drawn = sample(policy, prompts, list(range(first_seed, first_seed + count)), config.sampler)
    sampling_peak = peak_bytes()
    reset_peak()
    rollouts = Rollouts(prompts, drawn.latents, drawn.log_probs)
    after, metrics = update(policy, state, rollouts, as_credit(advantages(count)), {}, config)
    digest = tensors_digest({**after.weights, **after.optimizer})
    return MeasuredEpoch(after, metrics, digest, sampling_peak, peak_bytes())


def run_two_epochs(config: RunConfig, *, resumed: bool) -> list[MeasuredEpoch]:
    """Run two epochs, in one go or with the model loaded anew from the store in between."""
    policy = load_policy(config)
    epochs = [run_epoch(policy, initial_state(policy), config)]
    state = epochs[0].state
    if resumed:
        store = Store.open(f"memory://{uuid.uuid4().hex}")
        ref = commit_state(store, state)
        state = CHECKPOINT.load(store, ref).state()
        del policy
        policy = load_policy(config)
        policy.weights.load(state.weights)
    return [*epochs, run_epoch(policy, state, config)]


def advantages(count: int) -> torch.Tensor:
    return torch.linspace(-2, 2, count)


def reset_peak() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def build_pipeline_like_sd15(
    folder: Path,
    *,
    device: str,
    unet_channels: Sequence[int] = (320, 640, 1280, 1280),
    vae_channels: Sequence[int] = (128, 256, 512, 512),
    text_width: int = 768,
    text_layers: int = 12,
    heads: int = 8,
    groups: int = 32,
    resolution: int = 512,
) -> Path:
    """Write a random pipeline; by default of Stable Diffusion 1.5's own sizes (860M UNet)."""
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 77
    torch.manual_seed(0)
    with torch.device(device):
        unet = UNet2DConditionModel(
            sample_size=resolution // 8,
            block_out_channels=tuple(unet_channels),
            cross_attention_dim=text_width,
            attention_head_dim=heads,
            norm_num_groups=groups,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=tuple(vae_channels),
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=groups,
            sample_size=resolution,
        )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=text_width,
            intermediate_size=4 * text_width,
            projection_dim=text_width,
            num_hidden_layers=text_layers,
            num_attention_heads=max(text_width // 64, 2),
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    pipeline = StableDiffusionPipeline(
        vae=vae.cpu(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet.cpu().half(),  # half the disk
        scheduler=DDIMScheduler(**SCHEDULE),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder
