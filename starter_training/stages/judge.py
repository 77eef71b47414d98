"""A stage: the judge, on its own images."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ddpo.basics.randomness import derive_seed, generator
from ddpo.starter.judge import ACTIVITY_LABELS, COUNT_LABELS, NAME_LABELS, JudgeNetwork, build_clip
from ddpo.starter.scenes import SCENES
from ddpo.starter.text import build_tokenizer
from starter_training.loop import fit
from starter_training.losses import clip_loss
from starter_training.networks import to_model
from starter_training.prompt_table import PromptTable
from starter_training.stages.pictures import judge_seed, read_pictures, scene_numbers
from starter_training.work import Recipe, WorkFolder

SPOILED = 0.5
"""Share of images that get blur and noise, so that the judge does not depend on sharp edges."""


def spoil(pictures: Tensor, draws: torch.Generator) -> Tensor:
    """Blend half of the images [B, 3, 64, 64] with a blurred copy, and add noise."""
    amount = torch.rand(len(pictures), 1, 1, 1, generator=draws)
    chosen = torch.rand(len(pictures), 1, 1, 1, generator=draws) < SPOILED
    amount = amount * chosen
    blurred = F.avg_pool2d(pictures, 3, 1, 1, count_include_pad=False)
    grain = 0.15 * amount * torch.randn(pictures.shape, generator=draws)
    return torch.lerp(pictures, blurred, amount) + grain


def train_judge(work: WorkFolder, recipe: Recipe) -> None:
    """Train CLIP and heads together, in float32, on all pairs including the held-out ones."""
    torch.manual_seed(derive_seed(recipe.seed, "judge weights"))
    network = JudgeNetwork(build_clip(build_tokenizer()))
    pictures = read_pictures(work.judge_pictures)
    scenes = scene_numbers(judge_seed(recipe), len(pictures), all_pairs=True)
    prompts = PromptTable()
    answers = {
        "name": torch.tensor([NAME_LABELS.index(scene.name) for scene in SCENES]),
        "activity": torch.tensor([ACTIVITY_LABELS.index(scene.activity or "") for scene in SCENES]),
        "count": torch.tensor([COUNT_LABELS.index(scene.count) for scene in SCENES]),
    }

    def loss_of_shard(step: int, shard: int) -> Tensor:
        draws = generator(derive_seed(recipe.seed, "judge", step, shard))
        chosen = torch.randint(len(pictures), (recipe.judge.shard,), generator=draws)
        shown = scenes[chosen]
        used, place = prompts.choose(shown, 0.0, draws).unique(return_inverse=True)
        seen, logits = network.see(spoil(to_model(pictures[chosen.numpy()]), draws))
        texts = network.read(prompts.tokens[used])
        loss = clip_loss(seen, texts, place, network.clip.logit_scale.exp().clamp(max=100))
        for question, right in answers.items():
            loss = loss + F.cross_entropy(logits[question], right[shown])
        return loss

    fit("judge", network, loss_of_shard, recipe.judge, work.judge)
