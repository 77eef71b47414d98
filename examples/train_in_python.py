"""DDPO in plain Python, on the starter model: no Prefect, no storage, no MLflow.

    python examples/train_in_python.py --set rollouts.samples_per_epoch=64

`ddpo train` does the same and stores every part, so that a run can be resumed and forked.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch

from ddpo.algorithms.base import Scored
from ddpo.basics.randomness import derive_seed, generator
from ddpo.config.files import read_config
from ddpo.diffusion.sampling import sample
from ddpo.diffusion.window import sampler_of_epoch
from ddpo.models import load_policy
from ddpo.models.numerics import resolve_numerics
from ddpo.prompts import draw_prompt, load_prompts
from ddpo.rewards import load_reward, score_images
from ddpo.training.loop import initial_state, update
from ddpo.training.samples import Rollouts

settings = Path(__file__).parents[1] / "configs/starter.yaml"
config = read_config(settings, [word for word in sys.argv[1:] if word != "--set"])
numerics = resolve_numerics(config.numerics)
policy = load_policy(config.model, config.trainable, numerics, seed=config.seed)
prompts = load_prompts(config.prompts.name, config.prompts.parameters)
reward = load_reward(config.reward.name, config.reward.parameters)


def seeds(purpose: str, epoch: int) -> list[int]:
    """Return a seed for every sample of an epoch."""
    count = config.rollouts.samples_per_epoch
    return [derive_seed(config.seed, purpose, epoch, index) for index in range(count)]


state = initial_state(policy)
for epoch in range(config.epochs):
    asked = [draw_prompt(prompts, generator(seed)) for seed in seeds("prompt", epoch)]
    texts = [prompt.text for prompt in asked]
    sampler = sampler_of_epoch(policy, config, epoch)
    drawn = sample(policy, texts, seeds("noise", epoch), sampler)
    scores = score_images(reward, drawn.images, asked).values
    credit = config.algorithm.credit(Scored(texts, scores.astype(np.float64)), state.statistics)
    columns = {"reward": scores, **credit.columns}
    table = {name: torch.tensor(column, dtype=torch.float32) for name, column in columns.items()}
    rollouts = Rollouts(texts, drawn.latents, drawn.log_probs)
    state, metrics = update(policy, state, rollouts, table, credit.statistics, config)
    print(f"epoch {epoch}: mean reward {scores.mean():.3f}, loss {metrics['loss']:.5f}")
    drawn.images[0].save("sample.png")

policy.export(Path("adapter"))  # loads into plain diffusers
