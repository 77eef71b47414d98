"""The base model that is digested is the one that samples, however its files change meanwhile."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from ddpo.errors import ModelError
from ddpo.models.files import ModelFiles
from ddpo.models.pipeline_policy import PipelinePolicy
from tests.tiny import load_policy, tiny_config

PARTS = ("unet", "vae", "text_encoder")


@pytest.fixture
def model(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def overwrite(file: Path) -> None:
    """Overwrite the second half of a file in place, as a copy over it does."""
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.seek(size // 2)
        stream.write(bytes(size - size // 2))


def test_a_loaded_model_does_not_follow_its_files(model: Path) -> None:
    policy = load_policy(tiny_config(model))
    states = [getattr(policy.pipeline, part).state_dict() for part in PARTS]
    before = [{name: value.clone() for name, value in state.items()} for state in states]
    for part in PARTS:
        for file in (model / part).glob("*.safetensors"):
            overwrite(file)
    for state, kept in zip(states, before, strict=True):
        for name, value in state.items():
            assert torch.equal(value, kept[name]), name


def test_a_model_that_changes_while_it_is_loaded_is_refused(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = PipelinePolicy._loaded

    def changing(policy: PipelinePolicy, files: ModelFiles, *rest: Any) -> object:
        pipeline = load(policy, files, *rest)
        file = files.folder / "scheduler" / "scheduler_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"beta_end": 0.02}))
        return pipeline

    monkeypatch.setattr(PipelinePolicy, "_loaded", changing)
    with pytest.raises(ModelError, match=r"changed while it was in use \(scheduler/scheduler_c"):
        load_policy(tiny_config(model))


def test_a_pipeline_is_not_exported_with_other_files_than_it_was_loaded_from(
    model: Path, tmp_path: Path
) -> None:
    policy = load_policy(tiny_config(model, trainable={"type": "full"}))
    (model / "tokenizer" / "special_tokens_map.json").write_text("{}")
    with pytest.raises(ModelError, match="changed while it was in use"):
        policy.export(tmp_path / "exported")
