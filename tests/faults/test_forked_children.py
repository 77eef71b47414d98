"""Processes that a reward forks: a signal to one of them is not one to the run."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ddpo.basics.images import encode_image
from tests.faults.test_stopping import Started
from tests.rewards.served import pictures, post, prompts_of, wait_for
from tests.servers import free_port

POOL = """
import multiprocessing, time

def size(image):
    return float(image.size[0])

def score(images, prompts):
    with multiprocessing.get_context("fork").Pool(2) as pool:
        pool.apply_async(time.sleep, (600,))  # such as an image that takes too long
        return pool.map(size, images)  # then the pool ends its workers by SIGTERM
"""

CHILD = """
import os, signal, sys, threading, time
from ddpo_workflow.flows.cli.signals import StopHandler

def fork_and_signal(sign):
    ready, go = os.pipe()
    child = os.fork()
    if not child:
        os.write(go, b"x")
        time.sleep(600)
        os._exit(0)
    os.read(ready, 1)
    os.kill(child, sign)
    print("child:", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)

with StopHandler(lambda: print("stopped", flush=True)):
    thread = threading.Thread(target=fork_and_signal, args=(int(sys.argv[1]),))
    thread.start()
    thread.join()
    time.sleep(3)  # a stop that was taken for the run's own is acted on within a second
print("whole", flush=True)
"""


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_a_child_is_not_one_to_the_run(sign: int) -> None:
    command = [sys.executable, "-c", CHILD, str(int(sign))]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "whole" and "stopped" not in lines
    assert lines[0].startswith("child:")  # SIGINT is KeyboardInterrupt in the thread that forked
    assert sign == signal.SIGINT or lines[0] == f"child: {-sign}"


def test_a_run_whose_reward_has_a_pool_is_trained_to_the_end(
    tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "mine.py").write_text(POOL)
    run = Started(tmp_path, tiny_model, "reward.name=mine:score", "epochs=2")
    assert run.start(run.train_command()).wait(900) == 0, run.screen
    assert "stopped" not in run.screen and "Traceback" not in run.screen
    assert run.mlflow_states() == ["FINISHED"]


def test_a_served_reward_may_have_a_pool(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(POOL)
    port = free_port()
    words = ["serve-reward", "mine:score", "--port", str(port)]
    service = subprocess.Popen(
        [sys.executable, "-m", "ddpo_workflow.flows.cli", *words],
        env=Started(tmp_path, tmp_path).environment,
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_for(url)
        answer = post(url, [encode_image(image) for image in pictures(3)], prompts_of(3))
        assert answer.json()["values"] == [16.0] * 3
    finally:
        service.terminate()
        service.wait(300)
