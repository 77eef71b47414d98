"""`ddpo train` with names that look like markup, on a screen that shows ASCII alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

RUN = "a-run-whose-name-is-longer-than-a-terminal-of-eighty-columns-is-wide-so-it-is-not-cut"
PROMPTS = ["[/x] a cat $x_{$", "\u732b\u2028[bold]", "word " * 90]


def test_a_run_is_shown_to_its_end(
    tiny_model: Path, tmp_path: Path, command_environment: dict[str, str]
) -> None:
    folder = tmp_path / "[/x] [bold]\u732b"
    settings = {
        "model": {"path": str(tiny_model)},
        "prompts": {"name": "prompt_list", "parameters": {"prompts": PROMPTS}},
        "reward": {"name": "jpeg_compressibility"},
        "sampler": {"steps": 2},
        "rollouts": {"samples_per_epoch": 4, "shard_size": 2},
        "algorithm": {"type": "ddpo_sf"},
        "numerics": {"sample_batch_size": 2, "micro_batch_size": 2, "threads": 1, "device": "cpu"},
        "epochs": 1,
        "storage": {"root": str(folder / "store")},
        "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db", "system_metrics": False},
        "outputs": str(folder / "outputs"),
    }
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(settings))
    log = tmp_path / "screen.log"
    command = [sys.executable, "-m", "ddpo_workflow.flows.cli", "train", str(config)]
    with log.open("w") as stream:
        done = subprocess.run(
            [*command, "--run-id", RUN],
            env={**command_environment, "PYTHONIOENCODING": "ascii"},
            stdout=stream,
            stderr=subprocess.STDOUT,
            check=False,
        )
    screen = log.read_text(encoding="ascii")
    assert done.returncode == 0, screen
    assert "Traceback" not in screen
    assert f"run {RUN}\n" in screen
    shown = str(folder).encode("ascii", "backslashreplace").decode()
    assert f"file://{shown}/store\n" in screen and f"{shown}/outputs/{RUN}/report.png\n" in screen
    assert "warning: 1 of 3 prompts are longer than the" in screen
