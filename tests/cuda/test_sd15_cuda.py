"""Stable Diffusion 1.5's real sizes on a GPU: random weights, since nothing is downloaded.

`pytest tests/cuda -s` prints what was measured.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ddpo.config import RunConfig
from ddpo.training.loop import initial_state
from tests.epochs import MeasuredEpoch, build_pipeline_like_sd15, run_epoch, run_two_epochs
from tests.tiny import load_policy, tiny_config


def config_on(folder: Path, device: str, dtype: str, *, micro: int = 4) -> RunConfig:
    return tiny_config(
        folder,
        sampler={"steps": 5, "guidance_scale": 5.0},
        rollouts={"samples_per_epoch": 8, "shard_size": 8},
        numerics={
            "device": device,
            "dtype": dtype,
            "sample_batch_size": 4,
            "micro_batch_size": micro,
        },
    )


def assert_ratio_is_fit_to_train_on(epoch: MeasuredEpoch, config: RunConfig) -> None:
    """Either the graphs round alike, or the old log-probs were made anew."""
    limit = config.algorithm.clip_range / 10
    deviation = epoch.metrics["initial_ratio_deviation"]
    assert epoch.metrics["recomputed_log_probs"] or deviation["p99"] <= limit
    timesteps = set(map(int, epoch.metrics["initial_ratio_deviation_by_timestep"]))
    assert timesteps == {801, 601, 401, 201, 1}
    assert epoch.metrics["grad_norm"] > 0


def assert_resuming_changes_no_byte(config: RunConfig) -> None:
    straight = run_two_epochs(config, resumed=False)
    resumed = run_two_epochs(config, resumed=True)
    assert [epoch.digest for epoch in resumed] == [epoch.digest for epoch in straight]
    assert straight[0].digest != straight[1].digest


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_pipeline_like_sd15(tmp_path_factory.mktemp("sd15") / "model", device="cuda")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_pipeline_like_sd15(
        tmp_path_factory.mktemp("small") / "model",
        device="cpu",
        unet_channels=(8, 8, 16, 16),
        vae_channels=(4, 4, 8, 8),
        text_width=16,
        text_layers=1,
        heads=2,
        groups=4,
        resolution=64,
    )


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize("micro", [4, 8])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_low_precision_trains_on_ratios_near_1(sd15: Path, dtype: str, micro: int) -> None:
    config = config_on(sd15, "cuda", dtype, micro=micro)
    policy = load_policy(config)
    parameters = sum(p.numel() for p in policy.pipeline.unet.parameters() if not p.requires_grad)
    assert 859e6 < parameters < 861e6 and policy.size == (512, 512)
    epoch = run_epoch(policy, initial_state(policy), config)
    print(f"\nSD 1.5 at 512 px, {dtype}, batches of 4 sampled and {micro} updated: {epoch}")
    assert_ratio_is_fit_to_train_on(epoch, config)
    assert 0 < epoch.update_peak_bytes < torch.cuda.get_device_properties(0).total_memory


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize("setting", ["gradient_checkpointing", "offload_activations"])
def test_activations_that_do_not_stay_save_memory(sd15: Path, setting: str) -> None:
    peaks = []
    for switch in (False, True):
        config = config_on(sd15, "cuda", "bfloat16")
        changed = {setting: switch}
        numerics = config.numerics.model_copy(update=changed)
        config = config.model_copy(update={"numerics": numerics})
        policy = load_policy(config)
        epoch = run_epoch(policy, initial_state(policy), config)
        print(f"\nSD 1.5 at 512 px, bfloat16, {setting} {switch}: {epoch}")
        peaks.append(epoch.update_peak_bytes)
        del policy
    assert peaks[1] < 0.7 * peaks[0]


@pytest.mark.cuda
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_resuming_on_a_gpu_changes_no_byte(sd15: Path, dtype: str) -> None:
    assert_resuming_changes_no_byte(config_on(sd15, "cuda", dtype))


# The same functions on the CPU, so that they do not rot where no GPU is.


@pytest.mark.parametrize("micro", [4, 8])
def test_the_cpu_takes_the_same_path(small: Path, micro: int) -> None:
    config = config_on(small, "cpu", "bfloat16", micro=micro)
    policy = load_policy(config)
    epoch = run_epoch(policy, initial_state(policy), config)
    assert_ratio_is_fit_to_train_on(epoch, config)
    assert "initial |ratio - 1|: mean" in str(epoch)


def test_resuming_on_the_cpu_changes_no_byte(small: Path) -> None:
    assert_resuming_changes_no_byte(config_on(small, "cpu", "float32"))
