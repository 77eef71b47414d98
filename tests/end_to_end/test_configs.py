"""Every shipped config is valid, and runs one tiny epoch by the command that users type."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from ddpo.analysis.report import reward_curve
from ddpo.config import FullConfig, LoraConfig
from ddpo.config.files import read_config
from ddpo.runs import open_run
from ddpo.store.objects import Store
from ddpo_workflow.flows.cli import app as cli
from tests.rewards.tiny_models import head_tensors, save_clip, save_tensors
from tests.rewards.tiny_vlm import save_deberta, save_llava
from tests.sweeps import swept
from tests.tiny_families import FAMILIES, SETTINGS

COMPARISONS = sorted(Path("configs").glob("*_compare.yaml"))
CONFIGS = [path for path in sorted(Path("configs").glob("*.yaml")) if path not in COMPARISONS]
PUBLISHED = [path for path in CONFIGS if path.name.startswith("sd14_")]

# Prompts; pictures, updates and epochs of LoRA; rewards remembered a prompt.
TASKS = {
    "compressibility": ("imagenet_animals", 256, 4, 100, 16),
    "incompressibility": ("imagenet_animals", 256, 4, 100, 16),
    "aesthetic": ("simple_animals", 256, 2, 200, 32),
    "alignment": ("animal_activities", 288, 2, 200, 32),
}

# Sizes, paths and batches; nothing that makes the algorithm another one.
TINY = {
    "sampler.steps": 4,  # some train a window of three
    "rollouts.samples_per_epoch": 4,
    "rollouts.shard_size": 2,
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
    prompts, samples, updates, epochs, buffer_size = TASKS[path.stem.split("_")[1]]
    assert config.rollouts.samples_per_epoch == samples
    assert config.algorithm.updates_per_epoch == updates
    assert config.algorithm.type == "ddpo_is"
    assert config.algorithm.clip_range == 1e-4
    advantages = config.algorithm.advantages
    assert advantages.clip == (10 if whole else 5)
    assert advantages.type == "per_prompt"
    assert (advantages.buffer_size, advantages.min_count) == (buffer_size, 16)
    optimizer = config.optimizer
    assert optimizer.learning_rate == (1e-5 if whole else 3e-4)
    assert (optimizer.betas, optimizer.epsilon) == ((0.9, 0.999), 1e-8)
    assert (optimizer.weight_decay, optimizer.max_grad_norm) == (1e-4, 1.0)
    assert config.epochs == (200 if whole else epochs)
    if isinstance(config.trainable, LoraConfig):
        assert (config.trainable.rank, config.trainable.alpha) == (4, 4)
        assert config.trainable.target_modules == ("to_q", "to_k", "to_v", "to_out.0")
    assert config.prompts.name == prompts


@pytest.fixture(scope="module")
def tracking_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    """One MLflow database for all: making it takes longer than a tiny epoch."""
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(scope="module")
def tiny_rewards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str | int]]:
    """Parameters that put tiny models of the same classes in the place of published weights."""
    clip, llava, deberta = (tmp_path_factory.mktemp(name) for name in ("clip", "llava", "deberta"))
    save_clip(clip)
    head = save_tensors(clip / "head.safetensors", head_tensors(16))
    save_llava(llava)
    save_deberta(deberta)
    caption = {"model": str(llava), "dtype": "float32", "max_new_tokens": 4}
    return {
        "laion_aesthetic": {"model": str(clip), "head": head},
        "pickscore": {"model": str(clip), "processor": str(clip)},
        "vlm_alignment": {**caption, "bert_model": str(deberta), "bert_layer": 3},
    }


def tiny_family(path: Path, folder: Path) -> dict[str, object]:
    """Settings that put a tiny model of a config's family in the place of the published one."""
    first = path.stem.split("_")[0]
    name = "sd3" if path.stem == "starter_flow" else {"sd35": "sd3"}.get(first, first)
    if name not in FAMILIES:
        return {}
    model = {
        **SETTINGS[name].get("model", {}),
        **({"t5": False, "text_tokens": 0} if path.stem == "starter_flow" else {}),
        "path": str(FAMILIES[name](folder)),
        "resolution": 16,
    }
    settings: dict[str, object] = {
        "model": json.dumps(model),
        "sampler.window.steps": 2,
        "evaluation.steps": 2,
        "evaluation.count": 2,
    }
    config = read_config(path)
    if config.sampler.window is None:
        del settings["sampler.window.steps"]
    elif config.sampler.window.before is not None:
        settings["sampler.window.before"] = 3
    if config.evaluation is None:
        del settings["evaluation.steps"], settings["evaluation.count"]
    return settings


def kind(path: Path) -> tuple[str, ...]:
    """What a config shares with others of which one run in `make test` is enough."""
    config = read_config(path)
    family = path.stem.split("_")[0]
    return family, config.algorithm.type, config.trainable.type, config.sampler.type


FIRST = {kind(path): path for path in reversed(CONFIGS)}


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    swept(zip(CONFIGS), often=lambda path: FIRST[kind(path)] == path),
    ids=lambda path: path.stem,
)
def test_every_shipped_config_runs_one_tiny_epoch_by_the_command(
    path: Path, tiny_model: Path, tiny_rewards, tracking_uri: str, tmp_path: Path, monkeypatch
):
    settings = TINY | {
        "storage.root": tmp_path / "store",
        "model": f"{{path: {tiny_model}}}",
        "tracking.uri": tracking_uri,
        "outputs": tmp_path / "outputs",
        **tiny_family(path, tmp_path / "model"),
    }
    if read_config(path).rollouts.samples_per_prompt > 1:
        settings["rollouts.samples_per_prompt"] = 2
    reward = read_config(path).reward.name
    if reward in tiny_rewards:
        settings["reward.parameters"] = json.dumps(tiny_rewards[reward])
    words = ["ddpo", "train", str(path), "--run-id", path.stem]
    for name, value in settings.items():
        words += ["--set", f"{name}={value}"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)
    assert len(reward_curve(open_run(Store.open(str(tmp_path / "store")), path.stem))) == 1
    outputs = tmp_path / "outputs" / path.stem
    assert (outputs / "report.png").is_file()
    whole = isinstance(read_config(path).trainable, FullConfig)
    weights = "pipeline/model_index.json" if whole else "lora/pytorch_lora_weights.safetensors"
    assert (outputs / weights).is_file()
