"""Draw images with exported weights and plain diffusers: a program of its own.

It runs in a fresh process and imports nothing of this project, so that what it draws is what a user
of the weights gets. `python redraw.py JOB` reads the job, a JSON file, and writes `0.png`, `1.png`,
... beside it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any


def main(job_file: Path) -> None:
    """Draw the images of a job.

    Args:
        job_file: See `Job` in `ddpo.analysis.evaluation.proof`.
    """
    import diffusers
    import torch
    from diffusers import (
        AutoencoderKL,  # pyright: ignore[reportPrivateImportUsage]
        DiffusionPipeline,  # pyright: ignore[reportPrivateImportUsage]
    )

    job: dict[str, Any] = json.loads(job_file.read_text())
    torch.set_num_threads(job["threads"])
    given: dict[str, Any] = {}
    if job["vae"]:
        given["vae"] = AutoencoderKL.from_pretrained(
            job["vae"],
            torch_dtype=getattr(torch, job["dtype"]),
            use_safetensors=True,
            local_files_only=True,
        )
    pipeline: Any = DiffusionPipeline.from_pretrained(
        job["pipeline"],
        torch_dtype=getattr(torch, job["dtype"]),
        variant=job["variant"],
        use_safetensors=True,
        local_files_only=True,
        **{part: None for part in job["without"]},
        **given,
    )
    if job["lora"]:
        pipeline.load_lora_weights(job["lora"])
    if job["scheduler"]:
        kind: Any = getattr(diffusers, job["scheduler"]["name"])
        settings = job["scheduler"]["settings"]
        pipeline.scheduler = kind.from_config(pipeline.scheduler.config, **settings)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(job["device"])
    for number, (prompt, seed) in enumerate(zip(job["prompts"], job["seeds"], strict=True)):
        image = pipeline(
            prompt, generator=torch.Generator().manual_seed(seed), **job["arguments"]
        ).images[0]
        image.save(job_file.with_name(f"{number}.png"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
