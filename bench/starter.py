"""A starter's images, as the judge sees them: ``python -m bench.starter [--flow]``.

Generates 45 animals x 20 seeds of singles, activities and counts, and the 24 other words x 5 seeds,
with 20 steps, and asks the judge. Prints the figures of docs/starter.md and makes its images (`make
starter-report`). Exits with status 1 if a share is below its target; the flow starter has none.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ddpo.basics.randomness import derive_seed
from ddpo.config import RunConfig
from ddpo.config.files import read_config
from ddpo.diffusion.sampling import sample
from ddpo.models import Policy, load_policy
from ddpo.models.numerics import resolve_numerics
from ddpo.rewards.builtin.jpeg import jpeg_kb
from ddpo.starter import FLOW_STARTER_PATH, JUDGE_PATH, STARTER_PATH
from ddpo.starter.glyphs import ACTIVITIES, ANIMALS
from ddpo.starter.judge import Judge
from ddpo.starter.scenes import COUNTS, Kind, Scene, scenes
from ddpo_workflow.flows.cli.quiet import hide_loading_bars
from starter_training.report import grid

CONFIG = Path("configs/starter.yaml")
FLOW_CONFIG = Path("configs/starter_flow.yaml")
STEPS = 20  # the demo takes fewer, to learn from more images; this is what the model can do
SEEDS = 20
BARS = {Kind.SINGLE: 0.90, Kind.ACTIVITY: 0.75, Kind.COUNT: 0.70}


def asked(kind: Kind, seeds: int) -> list[Scene]:
    """Return the scenes to generate of a kind: every animal with every seed.

    Args:
        kind: Activities and numbers alternate, so that each animal gets each of them.
        seeds: Images per animal.

    Returns:
        Scenes, grouped by animal. For other words, every word with every seed.
    """
    if kind is Kind.OTHER:
        return [scene for scene in scenes(kind) for _ in range(seeds)]
    return [
        Scene(animal)
        if kind is Kind.SINGLE
        else Scene(animal, activity=ACTIVITIES[(place + seed) % 3])
        if kind is Kind.ACTIVITY
        else Scene(animal, count=COUNTS[(place + seed) % 3])
        for place, animal in enumerate(ANIMALS)
        for seed in range(seeds)
    ]


def draw(policy: Policy, config: RunConfig, wanted: Sequence[Scene]) -> list[Image.Image]:
    """Generate scenes with the config's sampler, each from its own noise.

    Args:
        policy: The base model.
        config: Gives the sampler; a flow's draws no noise here, as evaluations.
        wanted: The scenes to generate.

    Returns:
        One image per scene.
    """
    sampler = config.sampler
    if sampler.type == "flow_sde":
        sampler = sampler.at_inference(0.0)
    noise = [
        derive_seed(0, "starter report", scene.prompt, place) for place, scene in enumerate(wanted)
    ]
    return sample(policy, [scene.prompt for scene in wanted], noise, sampler).images


def spread(images: Sequence[Image.Image], seeds: int) -> str:
    """Describe how JPEG sizes differ between seeds of one prompt, and between prompts.

    Args:
        images: Seeds of a prompt together.
        seeds: Images a prompt.

    Returns:
        One line.
    """
    sizes = np.array([jpeg_kb(image) for image in images]).reshape(-1, seeds)
    within = np.sqrt(sizes.var(axis=1, ddof=1).mean())
    # The means of prompts vary by chance too: by the variance within over the number of seeds.
    between = np.sqrt(max(sizes.mean(axis=1).var(ddof=1) - within**2 / seeds, 0))
    return (
        f"JPEG size of singles: mean {sizes.mean():.2f} kB, from {sizes.min():.2f} to "
        f"{sizes.max():.2f}; standard deviation {within:.2f} between seeds of one prompt, "
        f"{between:.2f} between prompts"
    )


def digest(images: Sequence[Image.Image]) -> str:
    """Return the sha256 of images' pixels, 64 hex digits."""
    return hashlib.sha256(b"".join(image.tobytes() for image in images)).hexdigest()


def error(share: float, count: int) -> float:
    """Return the standard error of a share of `count` images."""
    return float(np.sqrt(share * (1 - share) / count))


def groups(kind: Kind, wanted: Sequence[Scene]) -> dict[str, NDArray[np.bool_]]:
    """Return the rows of the table for a kind: which of its images each is about."""
    found = {kind.value: np.full(len(wanted), True)}
    if kind is Kind.ACTIVITY:
        held_out = np.array([scene.held_out for scene in wanted])
        found |= {"... trained pairs": ~held_out, "... held-out pairs": held_out}
        for doing in ACTIVITIES:
            found[f"... {doing}"] = np.array([scene.activity == doing for scene in wanted])
    if kind is Kind.COUNT:
        for count in COUNTS:
            found[f"... {count}"] = np.array([scene.count == count for scene in wanted])
    return found


def print_origin(model: Path) -> None:
    """Print what made the weights, and how autoencoder and judge did on fresh images.

    Args:
        model: Folder of the pipeline.
    """
    made = json.loads((model / "training.json").read_text())
    print(f"made by: {made['command']}")
    for name, stage in made["stages"].items():
        commits = ", ".join(commit[:12] for commit in stage["commits"])
        print(f"  {name}: commit {commits}, {stage['seconds'] / 60:.1f} min")
    if "figures" not in made:  # the flow starter shares autoencoder and judge
        return
    for name, figures in made["figures"]["judge"].items():
        shares = ", ".join(f"{kind} {share:.1%}" for kind, share in figures.items())
        print(f"judge on fresh {name}: {shares}")
    psnr = ", ".join(f"{name} {value:.1f}" for name, value in made["figures"]["psnr_db"].items())
    print(f"reconstruction, PSNR in dB: {psnr}")


@dataclass(frozen=True)
class Job:
    """What one process measures.

    Attributes:
        kind: The scenes it draws.
        seeds: Images per animal.
        model: Folder of the pipeline.
        judge: Folder of the judge.
        images: Folder that gets a sheet of the first seed's images.
        flow: Whether the pipeline is the flow starter's.
    """

    kind: Kind
    seeds: int
    model: Path
    judge: Path
    images: Path
    flow: bool


def load(model: Path, threads: int, *, flow: bool) -> tuple[Policy, RunConfig]:
    """Load the base model with a starter's config.

    Args:
        model: Folder of the pipeline.
        threads: CPU threads of torch.
        flow: Whether the pipeline is the flow starter's.

    Returns:
        The policy, and the config whose sampler draws.
    """
    settings = {
        "model.path" if flow else "model": model,
        "sampler.steps": STEPS,
        "sampler.window": "null",
        "numerics.threads": threads,
    }
    config = read_config(
        FLOW_CONFIG if flow else CONFIG, [f"{name}={value}" for name, value in settings.items()]
    )
    numerics = resolve_numerics(config.numerics)
    numerics.apply()
    return load_policy(config.model, config.trainable, numerics, seed=config.seed), config


@dataclass(frozen=True)
class Measured:
    """What one process found.

    Attributes:
        rows: Of the table.
        notes: About the images.
        missed: The bar that was missed, in words.
    """

    rows: list[str]
    notes: list[str]
    missed: list[str]


def measure(job: Job) -> Measured:
    """Generate one kind of scene, ask the judge, and save a contact sheet.

    Args:
        job: What to do.

    Returns:
        What was found.
    """
    hide_loading_bars()
    policy, config = load(job.model, threads=1, flow=job.flow)
    wanted = asked(job.kind, job.seeds)
    images = draw(policy, config, wanted)
    right = Judge.load(job.judge).look(images).right(wanted)
    bars = {} if job.flow else BARS
    rows = []
    for name, chosen in groups(job.kind, wanted).items():
        share, count = float(right[chosen].mean()), int(chosen.sum())
        bar = f"{bars[job.kind]:.0%}" if job.kind in bars and name == job.kind else ""
        rows.append(f"| {name} | {count} | {share:.1%} | {error(share, count):.1%} | {bar} |")
    sheet = grid(images[:: job.seeds], 9, 2)
    sheet.save(job.images / f"starter_{'flow_' * job.flow}{job.kind}.png", optimize=True)
    share, wanted_share = float(right.mean()), bars.get(job.kind, 0.0)
    missed = [f"{job.kind}: {share:.1%} right, below {wanted_share:.0%}"]
    missed = missed if share < wanted_share else []
    if job.kind is not Kind.SINGLE:
        return Measured(rows, [], missed)
    by_animal = right.reshape(-1, job.seeds).mean(1)
    weakest = ", ".join(
        f"{ANIMALS[place]} {by_animal[place]:.0%}" for place in by_animal.argsort()[:5]
    )
    notes = [spread(images, job.seeds), f"weakest singles: {weakest}"]
    notes.append(f"sha256 of all singles: {digest(images)[:16]}")
    return Measured(rows, notes, missed)


def main() -> None:
    """Generate, judge, print; the tables are copied to docs/starter.md by hand."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--seeds",
        type=int,
        default=SEEDS,
        help="images per animal (a quarter of that per other word)",
    )
    parser.add_argument("--images", type=Path, default=Path("docs/images"))
    parser.add_argument("--flow", action="store_true", help="measure the flow starter")
    parser.add_argument("--model", type=Path, help="by default, the shipped one")
    parser.add_argument("--judge", type=Path, default=JUDGE_PATH)
    parser.add_argument("--jobs", type=int, default=2, help="processes, of one thread each")
    arguments = parser.parse_args()
    hide_loading_bars()
    model = arguments.model or (FLOW_STARTER_PATH if arguments.flow else STARTER_PATH)
    print_origin(model)
    jobs = [
        Job(
            kind=kind,
            seeds=arguments.seeds if kind is not Kind.OTHER else max(arguments.seeds // 4, 1),
            model=model.absolute(),
            judge=arguments.judge.absolute(),
            images=arguments.images,
            flow=arguments.flow,
        )
        for kind in Kind
    ]
    print("\n| generated by the starter | images | right | s.e. | target |\n|---|---|---|---|---|")
    notes: list[str] = []
    missed: list[str] = []
    arguments.images.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(arguments.jobs, get_context("spawn")) as pool:
        for found in pool.map(measure, jobs):
            print("\n".join(found.rows), flush=True)
            notes += found.notes
            missed += found.missed
    policy, config = load(model, threads=os.cpu_count() or 1, flow=arguments.flow)
    wanted = asked(Kind.SINGLE, 1)
    draw(policy, config, wanted[:16])
    started = time.monotonic()
    draw(policy, config, [*wanted, *wanted][:64])
    notes.append(f"64 images in {time.monotonic() - started:.1f} s on {os.cpu_count()} cores")
    print("\n" + "\n".join(notes))
    if missed:
        sys.exit("missed: " + "; ".join(missed))


if __name__ == "__main__":
    main()
