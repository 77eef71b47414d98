"""The examples run as they are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpo.errors import ConfigError
from ddpo.prompts import Prompt
from ddpo.rewards import load_reward, score_images
from tests.recorded import folder_of, record_run

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(folder: Path, *words: str, **environment: str) -> str:
    """Run Python in a bare folder."""
    path = os.pathsep.join([str(EXAMPLES), str(EXAMPLES.parent)])
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_here() -> None:
    names = {file.name for file in EXAMPLES.iterdir() if not file.name.startswith("__")}
    assert names == {"train_in_python.py", "own_reward.py", "explore_a_run.ipynb"}


@pytest.mark.slow
def test_the_library_trains_without_prefect(tmp_path: Path) -> None:
    script = EXAMPLES / "train_in_python.py"
    small = ("rollouts.samples_per_epoch=8", "rollouts.shard_size=8", "epochs=2")
    batches = ("numerics.sample_batch_size=8", "numerics.micro_batch_size=8")
    settings = [word for value in (*small, *batches) for word in ("--set", value)]
    shown = run(tmp_path, str(script), *settings).splitlines()
    assert [line.partition(":")[0] for line in shown] == ["epoch 0", "epoch 1"]
    with Image.open(tmp_path / "sample.png") as image:
        assert image.size == (64, 64) and np.asarray(image).std() > 0
    assert list((tmp_path / "adapter").glob("*.safetensors"))
    assert len(script.read_text().splitlines()) <= 60


@pytest.mark.slow
def test_an_own_reward_scores_from_the_command_line(tmp_path: Path) -> None:
    Image.linear_gradient("L").save(tmp_path / "photo.png")
    command = "from ddpo_workflow.flows.cli.app import main; main()"
    arguments = ("score", "own_reward:sharpness", "photo.png", "--prompt", "a cat")
    assert "73.9" in run(tmp_path, "-c", command, *arguments)


def test_an_own_reward_takes_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES)
    reward = load_reward("own_reward:Near", {"color": [0, 0, 255]})
    images = [Image.new("RGB", (4, 4), color) for color in ("blue", "black")]
    scores = score_images(reward, images, [Prompt("a cat")] * 2)
    assert scores.values.tolist() == [0.0, -85.0]
    assert list(scores.columns["red"]) == [0.0, 0.0]
    with pytest.raises(ConfigError, match="color"):
        load_reward("own_reward:Near", {"colour": [0, 0, 255]})


@pytest.mark.slow
def test_the_notebook_runs_on_a_run_from_top_to_bottom(tiny_model: Path, tmp_path: Path) -> None:
    recorded = record_run(tiny_model, tmp_path / "store")
    cells = json.loads((EXAMPLES / "explore_a_run.ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) == 5
    code.append("import json; print(json.dumps([by_epoch, ranked, len(log_probs), hardest]))")
    shown = run(
        tmp_path,
        "-c",
        "\n".join(code),
        DDPO_ROOT=str(folder_of(recorded)),
        DDPO_RUN=recorded.run_id,
        MPLBACKEND="agg",
    )
    by_epoch, ranked, steps, hardest = json.loads(shown.splitlines()[-1])
    assert by_epoch["epoch"] == [0, 1] and len(ranked) == 8 and steps == 2
    assert [row["reward"] for row in hardest] == sorted(row["reward"] for row in hardest)
    assert all(mean < 0 for mean in by_epoch["reward_mean"])  # minus a size in kB


def test_the_notebook_holds_no_output() -> None:
    cells = json.loads((EXAMPLES / "explore_a_run.ipynb").read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
