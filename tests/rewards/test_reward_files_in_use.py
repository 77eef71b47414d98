"""What a reward's identity pins is what it scores with, however its files change meanwhile."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from ddpo.basics.tensors import detach_from_files
from ddpo.errors import RewardError
from ddpo.prompts import Prompt
from ddpo.rewards import Reward, load_reward, score_images
from ddpo.rewards.builtin import starter_vqa
from ddpo.rewards.models.pinned import find_weights
from ddpo.rewards.models.pretrained import LoadedOnce
from ddpo.starter import JUDGE_PATH
from ddpo.starter.judge import Judge
from tests.rewards.tiny_models import save_tensors


def score(reward: Reward) -> float:
    return float(
        score_images(reward, [Image.new("RGB", (64, 64), "red")], [Prompt("a cat")]).values[0]
    )


def overwrite(file: Path) -> None:
    """Overwrite the second half of a file in place, as a copy over it does."""
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.seek(size // 2)
        stream.write(bytes(size - size // 2))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the judge's folder, which is a CLIP model."""
    shutil.copytree(JUDGE_PATH, tmp_path / "clip")
    return tmp_path / "clip"


@pytest.mark.parametrize("name", ["model.safetensors", "preprocessor_config.json"])
def test_a_model_folder_that_changed_before_the_first_image_is_refused(
    folder: Path, name: str
) -> None:
    reward = load_reward("clip_score", {"model": str(folder)})
    file = folder / name
    if name.endswith(".json"):
        file.write_text(file.read_text().replace("0.5", "0.4"))
    else:
        overwrite(file)
    with pytest.raises(RewardError, match=r"have changed since the reward was built.*sha256:"):
        score(reward)


def test_a_loaded_model_does_not_follow_its_files(folder: Path) -> None:
    reward = load_reward("clip_score", {"model": str(folder)})
    before = score(reward)
    overwrite(folder / "model.safetensors")
    assert score(reward) == before


def test_a_judge_that_changed_before_the_first_image_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starter_vqa, "JUDGE_PATH", folder)
    monkeypatch.setattr(starter_vqa, "_loaded_judge", starter_vqa._loaded_judge.__wrapped__)
    reward = starter_vqa.StarterVqa()
    overwrite(folder / "heads.safetensors")
    with pytest.raises(RewardError, match=r"judge .* has changed since the reward was built"):
        reward([Image.new("RGB", (64, 64))], [Prompt("a cat")])


def test_a_loaded_judge_does_not_follow_its_files(folder: Path) -> None:
    judge = Judge.load(folder)
    before = {name: value.clone() for name, value in judge.network.state_dict().items()}
    for file in folder.glob("*.safetensors"):
        overwrite(file)
    for name, value in judge.network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_weights_without_a_given_sha256_are_those_that_were_pinned(tmp_path: Path) -> None:
    path = save_tensors(tmp_path / "head.safetensors", {"w": torch.ones(8)})
    weights = find_weights(path, None, None)
    save_tensors(tmp_path / "head.safetensors", {"w": torch.zeros(8)})
    with pytest.raises(RewardError, match=r"head\.safetensors has the sha256 \w{64}, expected"):
        weights.tensors()


def test_weights_that_change_while_they_are_loaded_are_refused(tmp_path: Path) -> None:
    path = save_tensors(tmp_path / "head.safetensors", {"w": torch.ones(8)})
    weights = find_weights(path, None, None)

    def load() -> dict[str, torch.Tensor]:
        tensors = weights.tensors()
        save_tensors(tmp_path / "head.safetensors", {"w": torch.zeros(8)})
        return tensors

    with pytest.raises(RewardError, match="has the sha256"):
        LoadedOnce(load, weights).get()


def test_a_modules_tensors_are_detached_from_the_file_that_they_view(tmp_path: Path) -> None:
    file = Path(save_tensors(tmp_path / "w.safetensors", {"weight": torch.ones(64, 64)}))
    layer = nn.Linear(64, 64, bias=False)
    layer.load_state_dict(load_file(file), assign=True)
    detach_from_files(layer)
    overwrite(file)
    assert torch.equal(layer.weight, torch.ones(64, 64))
