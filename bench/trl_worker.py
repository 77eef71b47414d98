"""TRL's DDPO trainer, an epoch at a time: what `bench.trl` runs in TRL's own environment.

Reads its settings as a line of JSON, then runs one epoch for each further line, and answers with a
line of JSON: what the epoch took, and its mean reward. It imports nothing of this repository.
"""

from __future__ import annotations

import importlib
import io
import json
import random
import sys
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image


def minus_jpeg_kb(
    images: torch.Tensor, prompts: Sequence[str], metadata: Sequence[Any]
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return TRL's form of the compressibility reward: minus the kB as a JPEG of quality 95.

    Args:
        images: [B, 3, H, W] in 0..1.
        prompts: Ignored.
        metadata: Ignored.
    """
    pixels = (images * 255).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    rewards = []
    for each in pixels:
        file = io.BytesIO()
        Image.fromarray(each).save(file, format="JPEG", quality=95)
        rewards.append(-file.tell() / 1000)
    return torch.tensor(rewards), {}


def main() -> None:
    """Serve epochs until the input ends."""
    warnings.simplefilter("ignore")
    answers, sys.stdout = sys.stdout, sys.stderr  # libraries print too
    given = json.loads(sys.stdin.readline())
    torch.set_num_threads(1)
    trl: Any = importlib.import_module("trl")  # TRL's own: this folder is not on the path

    pipeline = trl.DefaultDDPOStableDiffusionPipeline(given["pipeline"], use_lora=True)
    rewards: list[float] = []

    def reward(*batch: Any) -> tuple[torch.Tensor, dict[str, Any]]:
        values, metadata = minus_jpeg_kb(*batch)
        rewards.extend(values.tolist())
        return values, metadata

    draw = random.Random(0)
    config = trl.DDPOConfig(
        mixed_precision="no",
        sample_num_steps=given["steps"],
        sample_guidance_scale=given["guidance_scale"],
        sample_batch_size=given["sample_batch"],
        sample_num_batches_per_epoch=given["samples"] // given["sample_batch"],
        train_batch_size=given["train_batch"],
        train_gradient_accumulation_steps=given["accumulated"],
        train_learning_rate=given["learning_rate"],
    )
    trainer = trl.DDPOTrainer(config, reward, lambda: (draw.choice(given["prompts"]), {}), pipeline)
    pipeline.set_progress_bar_config(disable=True)
    for _ in sys.stdin:
        rewards.clear()
        cpu, wall = time.process_time(), time.perf_counter()
        trainer.step(0, 0)
        took = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
        print(json.dumps({**took, "reward": sum(rewards) / len(rewards)}), file=answers, flush=True)


if __name__ == "__main__":
    main()
