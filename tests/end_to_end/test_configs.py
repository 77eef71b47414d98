"""Every shipped config is valid, and runs one tiny epoch by the command that users type."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from ddpo.config import FullConfig, LoraConfig
from ddpo.config_files import read_config
from ddpo.report import reward_curve
from ddpo.run import open_run
from ddpo.store.objects import Store

CONFIGS = sorted(Path("configs").glob("*.yaml"))
PUBLISHED = [path for path in CONFIGS if path.name.startswith("sd14_")]

# Sizes, paths and batches; nothing that makes the algorithm another one.
TINY = {
    "sampler.steps": 2,
    "sampler.samples_per_epoch": 4,
    "sampler.shard_size": 2,
    "numerics.sample_batch_size": 2,
    "numerics.micro_batch_size": 2,
    "numerics.device": "cpu",
    "numerics.threads": 1,
    "epochs": 1,
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_is_valid(path: Path):
    read_config(path)


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_stable_diffusion_configs_have_the_published_settings(path: Path):
    config = read_config(path)
    whole = isinstance(config.trainable, FullConfig)
    assert config.model.path == "CompVis/stable-diffusion-v1-4"
    assert config.model.revision is not None
    assert (config.sampler.steps, config.sampler.eta, config.sampler.guidance_scale) == (50, 1, 5)
    assert config.sampler.samples_per_epoch == 256
    assert config.algorithm.updates_per_epoch == 4
    assert config.algorithm.type == "ddpo_is"
    assert config.algorithm.clip_range == 1e-4
    assert config.advantages.clip == (10 if whole else 5)
    assert config.advantages.type == "per_prompt"
    assert (config.advantages.buffer_size, config.advantages.min_count) == (16, 16)
    optimizer = config.optimizer
    assert optimizer.learning_rate == (1e-5 if whole else 3e-4)
    assert (optimizer.betas, optimizer.epsilon) == ((0.9, 0.999), 1e-8)
    assert (optimizer.weight_decay, optimizer.max_grad_norm) == (1e-4, 1.0)
    assert config.epochs == (200 if whole else 100)
    if isinstance(config.trainable, LoraConfig):
        assert (config.trainable.rank, config.trainable.alpha) == (4, 4)
        assert config.trainable.target_modules == ("to_q", "to_k", "to_v", "to_out.0")
    assert config.prompts.name == "imagenet_animals"


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_config_runs_one_tiny_epoch_by_the_command(
    path: Path, tiny_model: Path, tmp_path: Path, command_environment: dict[str, str]
):
    settings = TINY | {
        "model": f"{{path: {tiny_model}}}",
        "tracking.uri": f"sqlite:///{tmp_path}/mlflow.db",
        "outputs": tmp_path / "outputs",
    }
    command = [sys.executable, "-m", "flows.cli", "train", str(path), "--run-id", "tiny"]
    command += ["--root", str(tmp_path / "store")]
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env=command_environment, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(reward_curve(open_run(Store.open(str(tmp_path / "store")), "tiny"))) == 1
    assert (tmp_path / "outputs" / "tiny" / "report.png").is_file()
