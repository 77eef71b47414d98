"""What a run's page says, read from the store."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

from pydantic import JsonValue

from ddpo.analysis.commit_times import commit_times, seconds_per_epoch
from ddpo.analysis.evaluation.alarms import alarms
from ddpo.analysis.evaluation.champion import champion_text, gate_reason
from ddpo.analysis.evaluation.summary import labels_in
from ddpo.analysis.page.device_time import DeviceTime, device_time
from ddpo.analysis.page.thumbnails import even, thumbnail_uri, within
from ddpo.analysis.rewards import EpochRewards, rewards_of
from ddpo.config import EvaluationConfig
from ddpo.errors import NotInHistory
from ddpo.runs import Run
from ddpo.store.artefacts import Evaluation
from ddpo.store.epochs import Epoch, committed_epochs, read_epoch
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT, EVALUATION, EVALUATION_SHARD, IMAGES
from ddpo.store.manifests import Ref
from ddpo.store.usage import stored_bytes

IMAGES_LIMIT_BYTES = 11 * 10**6
"""For the images that the slider shows."""
_MOST_STEPS = 60
_MOST_PICTURES = 16
_EXTREMES = 6
_READERS = 8


@dataclass(frozen=True)
class Step:
    """The images of the fixed prompts and seeds after a number of epochs."""

    epoch: int
    """Epochs trained."""
    images: tuple[str, ...]
    """Data URIs."""


@dataclass(frozen=True)
class Pictures:
    """The same prompts and seeds in the course of training."""

    captions: tuple[tuple[str, int], ...]
    """Prompt and seed of each image."""
    steps: tuple[Step, ...]
    """The first and the last, and some in between."""
    drawn: int
    """How many steps there are in the store."""


@dataclass(frozen=True)
class Sample:
    """A sample of the run."""

    prompt: str
    reward: float
    image: str
    """Data URI."""


@dataclass(frozen=True)
class Extremes:
    """The samples of an epoch with the highest and the lowest rewards."""

    epoch: int
    best: tuple[Sample, ...]
    worst: tuple[Sample, ...]


@dataclass(frozen=True)
class PromptRewards:
    """The rewards of a prompt."""

    prompt: str
    count: int
    """Samples with a reward."""
    first: float
    """Mean reward in the first epoch that sampled it."""
    last: float
    """Mean reward in the last one."""


@dataclass(frozen=True)
class Evaluated:
    """The evaluations of one set of prompts, seeds and rewards."""

    set_id: str
    """Its name in keys."""
    weights: str
    """'trained' or 'averaged'."""
    scores: int
    """Of all checkpoints, images and rewards together."""
    checkpoints: tuple[tuple[int, Mapping[str, float]], ...]
    """Epochs trained, and the summary's values by name."""
    alarms: tuple[str, ...] = ()
    """What looks wrong with the last checkpoint, a clause each."""


@dataclass(frozen=True)
class Content:
    """All that a page says of a run."""

    run_id: str
    reward: str
    reward_id: str
    curve: tuple[EpochRewards, ...]
    """At least one epoch."""
    metrics: Mapping[str, Sequence[tuple[int, float]]]
    """Epochs and values of each metric of the updates."""
    pictures: Pictures | None
    extremes: Extremes | None
    prompts: tuple[PromptRewards, ...]
    evaluations: tuple[Evaluated, ...]
    gate: str
    """Why the gate has ended training; empty if it has not."""
    champion: str
    """Which checkpoint is the champion."""
    epoch_s: float | None
    """Median of the seconds between the commits of two epochs."""
    device: DeviceTime | None
    """How long the run has had its devices."""
    stored: Mapping[str, int]
    """Bytes by folder of the store."""
    facts: Mapping[str, str]
    """The settings that a reader asks for first."""
    identity: Mapping[str, JsonValue]
    operation: Mapping[str, JsonValue]


@dataclass(frozen=True)
class _EpochData:
    """What is read of one epoch."""

    epoch: Epoch
    rewards: EpochRewards
    by_prompt: Mapping[str, Sequence[float]]
    """Empty if retention has deleted the samples."""
    metrics: Mapping[str, float]
    kept: bool
    """Whether its samples are."""


def read_content(run: Run) -> Content:
    """Read all that a run's page says.

    Args:
        run: The run.

    Raises:
        NotInHistory: It has not committed an epoch.
        StoreError: An object is damaged or missing.
    """
    store, run_id = run.store, run.run_id
    numbers = committed_epochs(store, run_id)
    if not numbers:
        raise NotInHistory(f"run {run_id!r} has not committed an epoch yet; there is no report")
    with ThreadPoolExecutor(_READERS, "report") as pool:
        epochs = list(pool.map(partial(_read_epoch, run), numbers))
    kept = [each.epoch for each in epochs if each.kept]
    commits = commit_times(run, even(numbers, _MOST_STEPS))
    return Content(
        run_id=run_id,
        reward=run.config.reward.name,
        reward_id=run.reward_id,
        curve=tuple(each.rewards for each in epochs),
        metrics=_metrics(epochs),
        pictures=_pictures(run),
        extremes=_extremes(kept[-1]) if kept else None,
        prompts=_prompts(epochs),
        evaluations=_evaluations(run),
        gate=gate_reason(run),
        champion=champion_text(run),
        epoch_s=seconds_per_epoch(commits),
        device=device_time(run, [at for _, at in commits]),
        stored=stored_bytes(store, run_id),
        facts=_facts(run),
        identity=run.config.identity(),
        operation=run.config.operation(),
    )


def _read_epoch(run: Run, number: int) -> _EpochData:
    epoch = read_epoch(run.store, run.run_id, number)
    advantages = epoch.advantages_by(None)
    assert advantages is not None
    rows = advantages.rows()
    kept = epoch.retirement() is None
    by_prompt: dict[str, list[float]] = {}
    if kept:
        rewards = {row.sample_id: row.reward for row in rows}
        for sample in (sample for shard in epoch.shards for sample in shard.samples()):
            reward = rewards.get(sample.sample_id)
            if reward is not None:
                by_prompt.setdefault(sample.prompt, []).append(reward)
    document = CHECKPOINT.load(run.store, epoch.commit.next_checkpoint).metrics
    metrics = {n: float(v) for n, v in document.items() if isinstance(v, int | float)}
    return _EpochData(epoch, rewards_of(number, rows), by_prompt, metrics, kept)


def _metrics(epochs: Sequence[_EpochData]) -> dict[str, list[tuple[int, float]]]:
    found: dict[str, list[tuple[int, float]]] = {}
    for each in epochs:
        for name, value in each.metrics.items():
            found.setdefault(name, []).append((each.rewards.epoch, value))
    return found


def _prompts(epochs: Sequence[_EpochData]) -> tuple[PromptRewards, ...]:
    found: dict[str, PromptRewards] = {}
    for each in epochs:
        for prompt, rewards in each.by_prompt.items():
            mean = sum(rewards) / len(rewards)
            before = found.get(prompt, PromptRewards(prompt, 0, mean, mean))
            count = before.count + len(rewards)
            found[prompt] = PromptRewards(prompt, count, before.first, mean)
    return tuple(found[prompt] for prompt in sorted(found))


def _pictures(run: Run) -> Pictures | None:
    """Return the images of the set that was drawn for most checkpoints; None if there are none."""
    sets: dict[str, list[Partition]] = {}
    for where in IMAGES.partitions_of(run.store, run.run_id):
        sets.setdefault(str(where.images_id), []).append(where)
    if not sets:
        return None
    drawn = sorted(max(sets.values(), key=len), key=lambda where: where.epoch)
    steps, captions = [], ()
    for where in even(drawn, _MOST_STEPS):
        rows = IMAGES.require(run.store, where).rows()[:_MOST_PICTURES]
        captions = tuple((row.prompt, _seed(row.prompt_metadata)) for row in rows)
        steps.append(Step(where.epoch, tuple(thumbnail_uri(row.image_png) for row in rows)))
    fitting = within(steps, IMAGES_LIMIT_BYTES, lambda step: sum(map(len, step.images)))
    return Pictures(captions, tuple(fitting), len(drawn))


def _seed(metadata: Mapping[str, JsonValue]) -> int:
    seed = metadata.get("seed")
    return seed if isinstance(seed, int) else 0


def _extremes(epoch: Epoch) -> Extremes:
    scores = [row for _, scored in epoch.scores(None) for row in scored.rows()]
    found = [(row.reward, row.sample_id) for row in scores if row.reward is not None]
    ranked = sorted(found, key=lambda item: (-item[0], item[1]))
    count = min(_EXTREMES, len(ranked) // 2)
    best, worst = ranked[:count], ranked[len(ranked) - count :][::-1]
    wanted = {sample_id for _, sample_id in (*best, *worst)}
    images: dict[str, tuple[str, str]] = {}
    for shard in epoch.shards:
        if wanted & {sample.sample_id for sample in shard.samples()}:
            for row in shard.rows():
                if row.sample_id in wanted:
                    images[row.sample_id] = (row.prompt, thumbnail_uri(row.image_png))

    def samples(chosen: Sequence[tuple[float, str]]) -> tuple[Sample, ...]:
        return tuple(Sample(images[i][0], reward, images[i][1]) for reward, i in chosen)

    return Extremes(epoch.where.epoch, samples(best), samples(worst))


def _evaluations(run: Run) -> tuple[Evaluated, ...]:
    sets: dict[str, list[Partition]] = {}
    for where in EVALUATION.partitions_of(run.store, run.run_id):
        sets.setdefault(str(where.images_id), []).append(where)
    found = []
    for set_id, wheres in sets.items():
        wheres.sort(key=lambda where: where.epoch)
        opened = [(w.epoch, EVALUATION.require(run.store, w)) for w in wheres]
        scores = sum(len(each.rows()) * len(labels_in(each.metrics)) for _, each in opened)
        found.append(
            Evaluated(
                set_id=set_id,
                weights=_weights_of(run, wheres[-1]),
                scores=scores,
                checkpoints=tuple((epoch, each.metrics) for epoch, each in opened),
                alarms=tuple(_alarms(run, opened)),
            )
        )
    # The one with most checkpoints is the run's own, and comes first.
    return tuple(
        sorted(found, key=lambda each: (each.weights != "trained", -len(each.checkpoints)))
    )


def own_labels(reward: str, reward_id: str) -> tuple[str, str]:
    """Return what an evaluation may call the run's own reward: its name, or its id."""
    return reward.rpartition(":")[2], reward_id


def _alarms(run: Run, opened: Sequence[tuple[int, Evaluation]]) -> list[str]:
    """Return what looks wrong with the last checkpoint, compared with the run's first one."""
    (first, baseline), (last, evaluation) = opened[0], opened[-1]
    labels = own_labels(run.config.reward.name, run.reward_id)
    own = next((label for label in labels if f"{label}/failed" in evaluation.metrics), None)
    if first != run.first_epoch or last == first or own is None:
        return []
    config = run.config.evaluation or EvaluationConfig()
    return alarms(own, evaluation.metrics, baseline.metrics, baseline.rows(), config.gate)


def _weights_of(run: Run, where: Partition) -> str:
    """Return which weights an evaluation sampled with; its images name the policy."""
    if run.config.optimizer.ema_decay is None:
        return "trained"
    first = EVALUATION.require(run.store, where).inputs["samples"][0]
    (row, *_) = EVALUATION_SHARD.load(run.store, Ref.model_validate(first)).rows()
    checkpoint = CHECKPOINT.require(run.store, Partition(run.run_id, where.epoch))
    trained = checkpoint.digests["policy_digest"]
    return "trained" if row.policy_digest == trained else "averaged"


def _facts(run: Run) -> dict[str, str]:
    config = run.config
    facts = {
        "Model": str(config.model.path),
        "Reward": config.reward.name,
        "Algorithm": config.algorithm.type,
        "Prompts": config.prompts.name,
        "Samples an epoch": str(config.rollouts.samples_per_epoch),
        "Sampler": f"{config.sampler.steps} steps, guidance {config.sampler.guidance_scale:g}",
        "Learning rate": f"{config.optimizer.learning_rate:g}",
        "Seed": str(config.seed),
    }
    if config.fork is not None:
        facts["Fork of"] = f"{config.fork.run_id} at epoch {config.fork.epoch}"
    return facts
