"""Tiny, randomly initialised Stable Diffusion pipelines of the real classes, and configs for them.

Pictures are 16 x 16 px, latents 4 x 8 x 8: a whole epoch takes a fraction of a second on one core.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

from ddpo import models
from ddpo.config import RunConfig
from ddpo.config.files import parse_config
from ddpo.diffusion import Process
from ddpo.diffusion.sampling import Trajectories, sample
from ddpo.diffusion.window import process_of
from ddpo.models import Policy
from ddpo.models.numerics import resolve_numerics
from ddpo.starter.text import build_tokenizer
from ddpo.training.samples import Rollouts

Credit = dict[str, torch.Tensor]

PROMPTS = ("a cat", "a dog", "a horse", "two cats", "a fox", "a bee")

# The noise schedule that Stable Diffusion 1.x and 2.x share.
SCHEDULE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


def build_tiny_model(
    folder: Path,
    *,
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon",
    seed: int = 0,
) -> Path:
    """Write a pipeline as the hub's are: with PNDM as SD 1.x (epsilon), DDIM as SD 2.x (v)."""
    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            in_channels=4,
            out_channels=4,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(8, 16),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=4,
        )
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=16,
                intermediate_size=32,
                projection_dim=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=tokenizer.model_max_length,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    _make_lively(vae, unet)
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=_scheduler(prediction_type),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def tiny_config(folder: Path | str, /, **changes: Any) -> RunConfig:
    """Return a small run on a model; keywords are the config's parts, each a mapping of changes."""
    raw: dict[str, Any] = {
        "model": {"path": str(folder)},
        "prompts": {"name": "simple_animals"},
        "reward": {"name": "jpeg_compressibility"},
        "sampler": {"steps": 4, "guidance_scale": 3.0},
        "rollouts": {"samples_per_epoch": 8, "shard_size": 4},
        "algorithm": {"type": "ddpo_is", "updates_per_epoch": 2},
        "numerics": {
            "device": "cpu",
            "dtype": "float32",
            "threads": 1,
            "sample_batch_size": 4,
            "micro_batch_size": 4,
        },
        "tracking": {"system_metrics": False},
    }
    for part, value in changes.items():
        old = raw.get(part)
        raw[part] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    return parse_config(raw, "a test's config")


def load_policy(config: RunConfig) -> Policy:
    return models.load_policy(
        config.model, config.trainable, resolve_numerics(config.numerics), seed=config.seed
    )


def draw(
    policy: Policy, config: RunConfig, prompts: Sequence[str] | None = None, first_seed: int = 100
) -> Trajectories:
    """Draw an epoch's samples; by default the prompts repeat in turn."""
    if prompts is None:
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(config.rollouts.samples_per_epoch)]
    seeds = range(first_seed, first_seed + len(prompts))
    return sample(policy, prompts, list(seeds), config.sampler)


def ddim_on(policy: Policy, **changes: float) -> Process:
    """Return the process of `tiny_config`'s sampler."""
    return process_of(policy, tiny_config(policy.folder, sampler=changes).sampler)


def rollouts_of(drawn: Trajectories, prompts: Sequence[str] | None = None) -> Rollouts:
    if prompts is None:
        prompts = [PROMPTS[i % len(PROMPTS)] for i in range(len(drawn.latents))]
    return Rollouts(prompts, drawn.latents, drawn.log_probs)


def alternating_advantages(count: int) -> torch.Tensor:
    """Return advantages of both signs, no two alike."""
    return torch.tensor([(0.5 + 0.25 * i) * (-1.0) ** i for i in range(count)])


def as_credit(advantages: torch.Tensor, scored: torch.Tensor | None = None) -> Credit:
    """Return a credit table of these advantages; by default of samples that all have a reward."""
    rewards = torch.zeros(len(advantages))
    if scored is not None:
        rewards[~scored] = torch.nan
    return {"reward": rewards, "advantage": advantages}


def grow_adapter(policy: Policy, scale: float = 0.3, seed: int = 7) -> None:
    """Make lora_B nonzero, as training would, so that the adapter changes what is drawn."""
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in policy.weights.parameters().items():
            if "lora_B" in name:
                parameter.copy_(scale * torch.randn(parameter.shape, generator=noise))


def make_float64(policy: Policy) -> None:
    """Let the UNet and the text encoder compute in float64: sums then agree to 1e-10."""
    policy.pipeline.unet.double()
    policy.pipeline.text_encoder.double()
    policy._encoded.clear()


def as_float64(rollouts: Rollouts) -> Rollouts:
    return Rollouts(
        rollouts.prompts,
        rollouts.latents.double(),
        rollouts.log_probs.double(),
    )


@contextmanager
def counted(policy: Policy) -> Iterator[list[int]]:
    """Collect the images of each forward of the network within this context."""
    seen: list[int] = []

    def note(_module: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        seen.append(len(given[0] if given else named["hidden_states"]))

    hook = policy.weights.network.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield seen
    finally:
        hook.remove()


def _scheduler(prediction_type: str) -> DDIMScheduler | PNDMScheduler:
    if prediction_type == "v_prediction":
        return DDIMScheduler(**SCHEDULE, prediction_type="v_prediction")
    # As SD 1.4 ships: PNDM, whose file says clip_sample although PNDM itself has no such setting.
    return PNDMScheduler.from_config({**SCHEDULE, "skip_prk_steps": True})


@torch.no_grad()
def _make_lively(vae: AutoencoderKL, unet: UNet2DConditionModel) -> None:
    """Scale fresh weights up until pictures show contrast and prompts make a difference."""
    vae.decoder.conv_out.weight *= 0.5
    for name, parameter in unet.named_parameters():
        if ".attn2.to_" in name and name.endswith("weight"):
            parameter *= 3.0


def flat(tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.double().flatten() for value in tensors.values()])


def assert_same_tensors(
    found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]
) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
