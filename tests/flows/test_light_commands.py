"""Commands that need no model load none of the libraries that would make one wait for seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.recorded import folder_of, record_run

HEAVY = (
    *("torch", "diffusers", "transformers", "peft", "mlflow", "prefect", "matplotlib", "scipy"),
    "inflect",
)
# What only a bucket, the Hub or a data set needs, each a quarter of a second.
REMOTE = ("aiohttp", "botocore", "httpx", "huggingface_hub", "pandas")

# Runs commands one after another; prints which heavy libraries each of them has imported.
PROGRAM = """
import contextlib, io, json, sys

commands, heavy = json.loads(sys.argv[1])
from ddpo_workflow.flows.cli.app import main

imported = {}
for words in commands:
    before = set(sys.modules)
    sys.argv = ["ddpo", *words]
    with contextlib.redirect_stdout(io.StringIO()) as screen:
        with contextlib.redirect_stderr(screen), contextlib.suppress(SystemExit):
            main()
    new = [name for name in heavy if name in sys.modules and name not in before]
    imported[" ".join(words)] = (new, screen.getvalue())
print(json.dumps(imported))
"""


def heavy_imports(commands: dict[str, str], heavy: Sequence[str] = HEAVY) -> dict[str, list[str]]:
    """Return what each command imports, once it has shown what it should.

    Args:
        commands: What each shows.
        heavy: The libraries to look for.
    """
    words = json.dumps([[command.split() for command in commands], heavy])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, words], capture_output=True, text=True, check=True
    )
    found = json.loads(done.stdout)
    for command, shown in commands.items():
        assert shown in " ".join(found[command][1].split()), found[command][1]
    return {command: new for command, (new, _) in found.items() if new}


@pytest.mark.slow
def test_lists_and_help_load_no_model_library(tiny_model: Path, tmp_path: Path) -> None:
    root = folder_of(record_run(tiny_model, tmp_path / "store", epochs=2))
    commands = {
        "--help": "Usage",
        "train --help": "Usage",
        "rewards": "clip_score",
        f"runs --root {root}": "mine",
        f"runs --tree --root {root}": "mine",
        f"runs --json --sort started --root {root}": "mine",
        f"show mine --root {root}": "finished",
        f"show mine --json --root {root}": "finished",
        f"watch mine --root {root}": "finished",
        f"diff mine mine --root {root}": "no setting differs",
        f"gc mine --dry-run --root {root}": "0 objects",
        f"verify mine --root {root}": "intact",
        f"query mine select:1 --root {root}": "syntax error",
        f"export-lora mine --epoch 9 --out {root}/lora --root {root}": "it has 0 to 2",
        f"export-lora mine --out {root} --root {root}": "nor an earlier export",
        f"report mine --out {tmp_path}/new/mine.html --root {root}": "mine.html",
    }
    assert heavy_imports(commands) == {}
    assert "jpeg_compressibility" in (tmp_path / "new" / "mine.html").read_text()


def test_a_local_store_is_read_without_what_buckets_need(tiny_model: Path, tmp_path: Path) -> None:
    root = folder_of(record_run(tiny_model, tmp_path / "store", epochs=2))
    commands = {
        "--help": "Usage",
        f"runs --root {root}": "mine",
        f"runs --tree --root {root}": "mine",
        f"show mine --root {root}": "finished",
        f"watch mine --root {root}": "finished",
        f"diff mine mine --root {root}": "no setting differs",
        f"verify mine --root {root}": "intact",
        f"report mine --out {tmp_path}/mine.html --root {root}": "mine.html",
    }
    assert heavy_imports(commands, [*HEAVY, *REMOTE]) == {}


def test_what_cannot_be_run_is_refused_without_a_model_library(tmp_path: Path) -> None:
    start = f"train configs/starter.yaml --root {tmp_path}/store"
    commands = {
        "train configs/starer.yaml": "there is no config file",
        "train": "Missing argument",
        f"{start} --set sampler.stps=3": "no such key",
        f"{start} --set sampler.eta=0": "deterministic",
        f"{start} --set prompts.name=simple_animal": "simple_animals",
        f"{start} --set reward.name=jpeg_compresibility": "jpeg_compressibility",
        f"{start} --set model=no/such/folder": "neither a folder here nor a Hub id",
        f"{start} --set tracking.uri=./mlruns": "sqlite",
        f"resume nothing --root {tmp_path}/store": "no run 'nothing'",
        f"fork nothing --epoch 3 --root {tmp_path}/store": "no run 'nothing'",
        f"rescore nothing --reward colorfulness --root {tmp_path}/store": "no run 'nothing'",
        f"sample nothing --prompt cat --out {tmp_path}/a.jpg": ".png",
        f"sample nothing --prompt cat --out {tmp_path}/a.png --root {tmp_path}/store": "no run",
        f"export nothing --to-hf-dataset {tmp_path}/d --root {tmp_path}/store": "no run 'nothing'",
        f"export-lora nothing --out {tmp_path}/l --root {tmp_path}/store": "no run 'nothing'",
        f"report nothing --root {tmp_path}/store": "no run 'nothing'",
        "compare configs/starter.yaml": "variants",
        "score nothing picture.png": "there is no reward",
        "serve-reward nothing": "there is no reward",
    }
    assert heavy_imports(commands) == {}
