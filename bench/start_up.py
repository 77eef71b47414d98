"""Seconds from the typed command to the first sample: ``python -m bench.start_up``.

Starts the demo in new folders (store, MLflow's database, Prefect's home) and stops it when it
samples. With `--warm` Prefect's home stays, as on a machine that has run the demo before.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

LIMIT_S = 600.0
SAMPLING = "  sampling "
"""What the screen says when the first forward begins: that of the fixed prompts' images."""


def seconds_to_first_sample(folder: Path, home: Path) -> float:
    """Start the demo, stop it when it samples, and return how long that took.

    Args:
        folder: A new one for the run.
        home: Prefect's home.

    Raises:
        RuntimeError: The run ended before it sampled.
    """
    settings = {
        "tracking.uri": f"sqlite:///{folder}/mlflow.db",
        "outputs": folder / "outputs",
    }
    command = [sys.executable, "-u", "-m", "ddpo_workflow.flows.cli"]
    command += ["train", "configs/starter_fast.yaml", "--root", str(folder / "store")]
    for name, value in settings.items():
        command += ["--set", f"{name}={value}"]
    began = time.monotonic()
    with subprocess.Popen(
        command,
        env=os.environ | {"PREFECT_HOME": str(home)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if SAMPLING in line:
                passed = time.monotonic() - began
                process.send_signal(signal.SIGTERM)
                process.wait(LIMIT_S)
                return passed
    raise RuntimeError(f"the run ended with status {process.returncode} before it sampled")


def main() -> None:
    """Start some times, and print each time and the median."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", action="store_true", help="keep Prefect's home between rounds")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        times: list[float] = []
        for number in range(arguments.rounds + arguments.warm):
            folder = Path(name, str(number))
            home = Path(name, "home") if arguments.warm else folder / "prefect"
            home.mkdir(parents=True, exist_ok=True)
            times.append(seconds_to_first_sample(folder, home))
        if arguments.warm:
            times = times[1:]  # the first one made the home
        print(
            f"from the command to the first sample: {median(times):.1f} s "
            f"({', '.join(f'{passed:.1f}' for passed in times)})"
        )


if __name__ == "__main__":
    main()
