"""`ddpo runs`, `ddpo sample` and `ddpo ui`, as a user types them."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from ddpo.config.files import read_config
from ddpo.runs import start_run
from ddpo_workflow.flows.cli import app as cli
from ddpo_workflow.tasks.tracking.tracker import RunTracker
from tests.fold import run_epochs
from tests.recorded import start_unchecked

SMALL = [
    "sampler.steps=3",
    "rollouts.samples_per_epoch=4",
    "rollouts.shard_size=2",
    "numerics.sample_batch_size=2",
    "numerics.micro_batch_size=2",
    "numerics.threads=1",
    "epochs=1",
]


@pytest.fixture
def root(tiny_model: Path, tmp_path: Path) -> Path:
    """A store with one finished run, `small`."""
    store = tmp_path / "store"
    settings = [*SMALL, f"model={{path: {tiny_model}}}", f"storage.root={store}"]
    run_epochs(start_run(read_config("configs/starter.yaml", settings), "small"), 1)
    return store


def ddpo(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr(sys, "argv", ["ddpo", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)


def test_runs_lists_what_a_store_holds(root, monkeypatch, capsys):
    ddpo(monkeypatch, "runs", "--root", root)
    screen = capsys.readouterr().out
    assert "small" in screen
    assert "1/1" in screen


def test_runs_as_a_tree_stand_below_what_they_branch_off(root, tiny_model, monkeypatch, capsys):
    settings = [*SMALL, f"model={{path: {tiny_model}}}", f"storage.root={root}", "epochs=3"]
    # A fork's name may come before its parent's, as text.
    for run_id, parent, epoch in (("child", "small", 1), ("a-grandchild", "child", 2)):
        branch = [f"fork={{run_id: {parent}, epoch: {epoch}}}"]
        start_unchecked(read_config("configs/starter.yaml", [*settings, *branch]), run_id)
    start_run(read_config("configs/starter.yaml", settings), "alone")
    ddpo(monkeypatch, "runs", "--tree", "--root", root)
    lines = [
        line for line in capsys.readouterr().out.splitlines() if "jpeg_compressibility" in line
    ]
    depth = {}
    for line in lines:
        name = line.strip("│├└─ ").split()[0]
        depth[name] = line.index(name)
    assert depth["small"] == depth["alone"] < depth["child"] < depth["a-grandchild"]
    assert "from epoch 2 of child" in next(line for line in lines if "a-grandchild" in line)
    order = list(depth)
    assert order.index("small") < order.index("child") < order.index("a-grandchild")


def test_verify_names_damage_mends_it_and_gc_finds_nothing(root, monkeypatch, capsys):
    ddpo(monkeypatch, "verify", "small", "--root", root)
    assert capsys.readouterr().out.strip().endswith("intact")
    (shard, *_) = sorted(root.glob("trajectories/**/*.safetensors"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    monkeypatch.setattr(sys, "argv", ["ddpo", "verify", "small", "--root", str(root)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    screen = capsys.readouterr().out
    assert ended.value.code == 1
    assert (
        shard.name in screen
        and f"verify small --repair --root {root}" in screen
        and "1 damaged" in screen
    )
    ddpo(monkeypatch, "verify", "small", "--repair", "--root", root)
    assert "rebuilt" in capsys.readouterr().out
    assert shard.read_bytes() == whole
    ddpo(monkeypatch, "gc", "small", "--dry-run", "--root", root)
    assert "0 objects, 0.0 MB would be deleted" in capsys.readouterr().out


def test_sample_draws_the_picture_that_plain_diffusers_draws(
    root, tiny_model, tmp_path, monkeypatch
):
    out = tmp_path / "pictures" / "cat.png"
    ddpo(
        monkeypatch, "sample", "small", "--prompt", "a cat", "--seed", 7, "--checkpoint", 0,
        "--out", out, "--root", root,
    )  # fmt: skip
    plain = StableDiffusionPipeline.from_pretrained(tiny_model, safety_checker=None)
    plain.scheduler = DDIMScheduler.from_config(plain.scheduler.config)
    plain.set_progress_bar_config(disable=True)
    expected = plain(
        "a cat",
        num_inference_steps=3,
        guidance_scale=3.0,
        eta=1.0,
        generator=torch.Generator().manual_seed(7),
    ).images[0]
    assert np.array_equal(np.asarray(Image.open(out)), np.asarray(expected))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.mark.slow
def test_ui_serves_both_pages_and_ends_with_ctrl_c(tmp_path, command_environment):
    mlflow, prefect = free_port(), free_port()
    shown = RunTracker.open(
        tracking_uri=f"sqlite:///{tmp_path}/mlflow.db", experiment="mine", run_id="r", uid="1",
        params={}, tags={},
    )  # fmt: skip
    log = tmp_path / "screen.log"
    with log.open("w") as stream:
        command = subprocess.Popen(
            [
                sys.executable, "-m", "ddpo_workflow.flows.cli", "ui",
                "--tracking", f"sqlite:///{tmp_path}/mlflow.db",
                "--mlflow-port", str(mlflow), "--prefect-port", str(prefect),
            ],
            stdout=stream, stderr=subprocess.STDOUT, env=command_environment,
        )  # fmt: skip
    try:
        deadline = time.monotonic() + 600  # a busy machine takes minutes to start both
        while "Ctrl-C" not in log.read_text() and time.monotonic() < deadline:
            assert command.poll() is None, log.read_text()
            time.sleep(0.5)
        for port in (mlflow, prefect):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as page:
                assert page.status == 200
        runs = f"http://127.0.0.1:{mlflow}/#/experiments/{shown.experiment_id}/runs"
        address = f"{runs}?workflowType=machine_learning&viewStateShareKey=ddpo"
        assert address in log.read_text().splitlines()[0].split()
    finally:
        command.send_signal(signal.SIGINT)
        assert command.wait(timeout=600) == 0


def test_verify_of_a_run_without_any_committed_epoch_is_no_success(
    tiny_model, tmp_path, monkeypatch, capsys
):
    settings = [*SMALL, f"model={{path: {tiny_model}}}", f"storage.root={tmp_path}/store"]
    start_run(read_config("configs/starter.yaml", settings), "empty")
    monkeypatch.setattr(sys, "argv", ["ddpo", "verify", "empty", "--root", f"{tmp_path}/store"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    screen = capsys.readouterr().out
    assert "no committed epoch found" in screen and "intact" not in screen
