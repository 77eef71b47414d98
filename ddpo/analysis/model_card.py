"""The model card of an exported LoRA: README.md as the Hugging Face Hub shows it, with images."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from ddpo.analysis.lora_plan import CARD, DIFFUSERS_FILE, IMAGES_FOLDER, LoraExport
from ddpo.analysis.report import checkpoint_pictures, save_curve
from ddpo.analysis.rewards import EpochRewards, reward_curve
from ddpo.config import RunConfig
from ddpo.diffusion import PlainScheduler
from ddpo.models import hub
from ddpo.starter import FLOW_STARTER_PATH, STARTER_PATH
from ddpo.store.kinds import IMAGES
from ddpo.store.tables import RolloutRow

_MOST_IMAGES = 8  # before, and as many after
_MOST_ROWS = 20  # of the table of rewards

_CARD = """\
---
{header}---

# {title}

A LoRA for `{base}`, fine-tuned by reinforcement learning
([DDPO](https://arxiv.org/abs/2305.13301)) to maximize the reward `{reward}`.
There is no trigger word: it acts on every prompt.

{images}

## How to load it

### diffusers

```python
from diffusers import {classes}
{base_model}
pipeline.load_lora_weights({place}, weight_name="{diffusers_file}")
{scheduler}image = pipeline({prompt}, {arguments}).images[0]
```

### ComfyUI and AUTOMATIC1111

{programs}

Weights are in float32, with alpha / rank already multiplied in, so that the alpha that a reader
applies is the rank.

## Reward

{rewards}

## Training

| | |
|---|---|
{settings}

## Licence

{licence}
This card makes no statement of its own about the terms of these weights.
"""

_SCHEDULER = """\
pipeline.scheduler = {name}.from_config(
    pipeline.scheduler.config, {settings}
)
"""

_PROGRAMS = """\
- ComfyUI: copy `{file}` to `ComfyUI/models/loras`, and put the node *Load LoRA* between the
  checkpoint and the sampler. Only `strength_model` has an effect; 1 is what was trained.
- AUTOMATIC1111: copy `{file}` to `stable-diffusion-webui/models/Lora`, and write
  `<lora:{name}:1>` into the prompt.

Use a checkpoint of the base model, or of one that was derived from it."""

_DIFFUSERS_PROGRAMS = """\
ComfyUI reads diffusers' names of this transformer: copy `{file}` to `ComfyUI/models/loras` under a
name of your choice. It was not tried."""

_NO_PROGRAMS = """\
`{file}` has the layout that they read. They know Stable Diffusion 1.x, 2.x and XL, and this base
model is none of them."""


def write_card(
    export: LoraExport,
    folder: Path,
    *,
    pipeline: str,
    scheduler: PlainScheduler | None,
    other_programs: bool,
) -> None:
    """Write the model card and its images.

    Args:
        export: What is exported.
        folder: The folder that receives them, and has the weights.
        pipeline: The class of the base model's pipeline in diffusers.
        scheduler: What the run samples with; None for the pipeline's own scheduler.
        other_programs: Whether ComfyUI and AUTOMATIC1111 know the base model.
    """
    run, config = export.run, export.run.config
    (folder / IMAGES_FOLDER).mkdir()
    curve = [point for point in reward_curve(run) if point.epoch < export.epoch]
    before, after = _fixed_images(export)
    for label, rows in (("before", before), ("after", after)):
        for row, name in zip(rows, _image_names(label, rows), strict=True):
            (folder / name).write_bytes(row.image_png)
    rewards = "No epoch was trained before this checkpoint."
    if curve:
        save_curve(curve, config.reward.name, folder / IMAGES_FOLDER / "reward.png")
        rewards = _reward_table(curve)
    file, programs = export.kohya_file, _PROGRAMS if other_programs else _NO_PROGRAMS
    if not (folder / file).exists():
        file, programs = DIFFUSERS_FILE, _DIFFUSERS_PROGRAMS
    header = yaml.safe_dump(_header(export, after), sort_keys=False, allow_unicode=True)
    card = _CARD.format(
        header=header,
        title=run.run_id,
        base=export.base_model,
        reward=config.reward.name,
        images=_image_table(export, before, after),
        classes=f"{scheduler.name}, {pipeline}" if scheduler else pipeline,
        scheduler=_scheduler_line(scheduler) if scheduler else "",
        base_model=_loading(export, pipeline),
        place=json.dumps(export.repository or "."),
        diffusers_file=DIFFUSERS_FILE,
        prompt=json.dumps(after[0].prompt if after else "a cat"),
        arguments=", ".join(f"{name}={value}" for name, value in _arguments(config).items()),
        programs=programs.format(file=file, name=file.removesuffix(".safetensors")),
        rewards=rewards,
        settings="\n".join(f"| {k} | {v} |" for k, v in _settings(export).items()),
        licence=_licence(export),
    )
    (folder / CARD).write_text(card, encoding="utf-8")


def _header(export: LoraExport, after: Sequence[RolloutRow]) -> dict[str, Any]:
    """Return the card's metadata in the Hub's terms; no licence, which is not ours to state."""
    named = {"base_model": export.base_model, "base_model_relation": "adapter"}
    shown = [
        {"text": row.prompt, "output": {"url": name}}
        for row, name in zip(after, _image_names("after", after), strict=True)
    ]
    return {
        **(named if hub.on_hub(export.run.config.model) else {}),
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "instance_prompt": None,  # no trigger word
        "tags": [
            *("text-to-image", "diffusers", "lora", "stable-diffusion"),
            *("reinforcement-learning", "ddpo", "template:sd-lora"),
        ],
        **({"widget": shown} if shown else {}),
    }


def _fixed_images(export: LoraExport) -> tuple[list[RolloutRow], list[RolloutRow]]:
    """Return the images of fixed prompts before the run's first epoch and at the checkpoint.

    Both are empty if either is not in the store. Of several sets of prompts, which the run then had
    one after another, the one with the most checkpoints.
    """
    run = export.run
    sets = Counter(w.images_id for w in IMAGES.partitions_of(run.store, run.run_id))
    for images_id, _ in sorted(sets.items(), key=lambda item: (-item[1], str(item[0]))):
        before, after = (
            checkpoint_pictures(run, str(images_id), epoch)[:_MOST_IMAGES]
            for epoch in (run.first_epoch, export.epoch)
        )
        if before and after:
            return before, after
    return [], []


def _image_names(label: str, rows: Sequence[RolloutRow]) -> list[str]:
    return [f"{IMAGES_FOLDER}/{label}-{index:02d}.png" for index in range(len(rows))]


def _image_table(
    export: LoraExport, before: Sequence[RolloutRow], after: Sequence[RolloutRow]
) -> str:
    """Return a table in HTML, where a prompt may hold any characters."""
    if not after:
        return "The store has no images of fixed prompts for this checkpoint."
    fork = export.run.fork
    first = f"before epoch {fork.epoch}, where the fork began" if fork else "before"
    lines = [
        "<table>",
        f"<tr><th>prompt</th><th>{first}</th><th>after {export.epoch} epochs</th></tr>",
    ]
    names = (_image_names(label, after) for label in ("before", "after"))
    for row, *images in zip(after, *names, strict=True):
        prompt = escape(" ".join(row.prompt.split()))
        cells = "".join(f'<td><img src="{name}" width="256"></td>' for name in images)
        lines.append(f"<tr><td>{prompt}</td>{cells}</tr>")
    sampler = export.run.config.sampler.summary
    lines += ["</table>", "", f"The same prompts and seeds, drawn as in training: {sampler}."]
    return "\n".join(lines)


def _reward_table(curve: Sequence[EpochRewards]) -> str:
    """Return the curve's picture, and a table of at most `_MOST_ROWS` of its epochs."""
    step = max(math.ceil((len(curve) - 1) / (_MOST_ROWS - 1)), 1)
    shown = [*curve[:-1:step], curve[-1]]
    rows = [
        f"| {point.epoch} | {_number(point.mean)} | {_number(point.std)} | {point.samples} |"
        for point in shown
    ]
    head = "| epoch | mean reward | standard deviation | samples |\n|---|---|---|---|\n"
    return f"![reward by epoch]({IMAGES_FOLDER}/reward.png)\n\n{head}" + "\n".join(rows)


def _number(value: float) -> str:
    return "none" if math.isnan(value) else f"{value:.4g}"


def _settings(export: LoraExport) -> dict[str, str]:
    config, lora = export.run.config, export.lora
    model, optimizer, ema = config.model, config.optimizer, config.optimizer.ema_decay
    revision = f" at revision `{model.revision}`" if model.revision else ""
    algorithm = config.algorithm.model_dump(mode="json", exclude_defaults=True)
    options = ", ".join(f"{k}: {v}" for k, v in algorithm.items() if k != "type")
    return {
        "base model": f"`{export.base_model}`{revision}",
        "run": f"`{export.run.run_id}`, checkpoint after {export.epoch} epochs",
        "weights": f"moving average, decay {ema}" if ema else "as trained",
        "reward": f"`{export.run.reward_id}` (higher is better)",
        "prompts": f"`{config.prompts.name}`",
        "algorithm": f"`{config.algorithm.type}`" + (f" ({_cell(options)})" if options else ""),
        "samples": f"{config.rollouts.samples_per_epoch} an epoch",
        "sampler": config.sampler.summary,
        "LoRA": f"rank {lora.rank}, alpha {lora.alpha}, on {_cell(', '.join(lora.target_modules))}",
        "optimizer": f"AdamW, learning rate {optimizer.learning_rate}",
        "seed": str(config.seed),
    }


_STARTERS = {STARTER_PATH: "STARTER_PATH", FLOW_STARTER_PATH: "FLOW_STARTER_PATH"}
"""What `ddpo.starter` calls the folders."""


def _cell(text: str) -> str:
    return escape(text).replace("|", "&#124;")


def _loading(export: LoraExport, pipeline: str) -> str:
    """Return how the base model is loaded, in Python.

    Args:
        export: What is exported.
        pipeline: The pipeline's class.
    """
    model, name = export.run.config.model, export.base_model
    made = f"pipeline = {pipeline}"
    without = "" if model.t5 else ", text_encoder_3=None, tokenizer_3=None"
    if model.path in hub.STARTERS:
        folder = _STARTERS[hub.STARTERS[model.path]]
        return f"from ddpo.starter import {folder}\n\n{made}.from_pretrained({folder}{without})"
    revision = f", revision={json.dumps(model.revision)}" if model.revision else ""
    if hub.on_hub(model):
        return f"\n{made}.from_pretrained({json.dumps(name)}{revision}{without})"
    way = "single_file" if name.endswith(".safetensors") else "pretrained"
    return f"\n{made}.from_{way}({json.dumps(f'path/to/{name}')}{without})"


def _scheduler_line(scheduler: PlainScheduler) -> str:
    """Return how a pipeline gets a scheduler, in Python."""
    settings = ", ".join(f"{name}={value!r}" for name, value in scheduler.settings.items())
    return _SCHEDULER.format(name=scheduler.name, settings=settings)


def _arguments(config: RunConfig) -> dict[str, float]:
    """Return what a user passes to the pipeline to sample as in training."""
    sampler, size, tokens = config.sampler, config.model.size, config.model.text_tokens
    steps = {name: value for name, value in sampler.pipeline_arguments.items() if name != "eta"}
    return {
        **steps,
        **({} if tokens is None else {"max_sequence_length": tokens}),
        **({"width": size[0], "height": size[1]} if size else {}),
    }


def _licence(export: LoraExport) -> str:
    model = export.run.config.model
    if model.path in hub.STARTERS:
        return "The base model ships with ddpo under the Apache License 2.0."
    if hub.on_hub(model):
        page = f"https://huggingface.co/{model.path}"
        return f"The licence of the base model applies to what is derived from it: see <{page}>."
    return (
        f"The base model was a local copy called `{export.base_model}`.\nIts licence applies to "
        "what is derived from it: see where the model came from."
    )
