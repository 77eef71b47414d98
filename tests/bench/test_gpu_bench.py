"""bench.gpu at tiny sizes on the CPU, so that it is ready where a GPU is."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import gpu


def measured(folder: Path, *options: str) -> dict[str, Any]:
    tiny = ("--device", "cpu", "--tiny", "--batch", "2", "--steps", "2", "--rounds", "1")
    gpu.main([*tiny, *options, "--out", str(folder)])
    return json.loads((folder / "gpu.json").read_text())


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which the command sets for good


def test_every_family_is_measured(tmp_path: Path) -> None:
    families = ["sdxl", "sd3", "flux"]
    found = measured(tmp_path, "--families", *families, "--dtype", "float32")
    assert [row["family"] for row in found["cases"]] == families
    for row in found["cases"]:
        assert "error" not in row, row
        assert row["initial_ratio_deviation"]["max"] == 0.0
        parts = (row["sampling_tflops"], row["update_tflops"])
        assert 0 < min(parts) <= row["tflops"] <= max(parts)
    assert found["ceilings_tflops"]["float32"] > 0
    assert found["machine"]["versions"]["torch"] == version("torch")
    lines = (tmp_path / "gpu.md").read_text().splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [f"| {name}" for name in families]


def test_another_process_continues_in_the_same_bytes(tmp_path: Path) -> None:
    found = measured(tmp_path, "--dtype", "float32", "--resume")
    assert [row["equal"] for row in found["resumed"]] == [True]
    assert (tmp_path / "gpu.md").read_text().rstrip().endswith("| yes |")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to measure")
def test_without_a_gpu_the_command_says_so_and_loads_neither_prefect_nor_mlflow() -> None:
    code = "import sys, bench.gpu as gpu; print(*sys.modules); gpu.main([])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "torch finds no CUDA device" in done.stderr and "--device cpu --tiny" in done.stderr
    loaded = {name.partition(".")[0] for name in done.stdout.split()}
    assert "torch" in loaded and not loaded & {"prefect", "mlflow"}
