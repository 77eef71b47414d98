"""Export a run's samples as a Hugging Face dataset: a folder of Parquet files and a dataset card.

Parquet rather than the Arrow files of `datasets.save_to_disk`: `load_dataset(FOLDER)` decodes the
images either way, the folder can be uploaded as is, and other tools can read it too.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from ddpo.analysis.history import History, mean_rewards
from ddpo.errors import ConfigError, NotInHistory
from ddpo.store import runs
from ddpo.store.arrow import join
from ddpo.store.tables import ROLLOUT_SCHEMA

_CARD = """\
---
{header}---

# Samples of a reinforcement learning run

{count} images that a diffusion model was trained on by [ddpo](https://arxiv.org/abs/2305.13301),
each with its prompt, seed, reward and advantage. {origin}

| | |
|---|---|
| run | `{run_id}` |
| model | `{model}` |
| prompts | `{prompts}`, sha256 `{prompts_digest}` |
| reward | `{reward_id}` (higher is better) |
| the run's own reward | `{run_reward_id}`, sha256 `{reward_digest}` |
| algorithm | `{algorithm}` |
| sampler | {sampler} |
| sampler digest | {sampler_digests} |
| seed | {seed} |

`reward` is null where the image could not be scored, and `status` says why. `advantage` is the
weight of the image in the update (before a value function's baseline, if the run has one), and null
where none was computed from this reward. `sample_id` consists of run, epoch and index. The columns
after `advantage` are specific to the scorer.

The epochs, and the policy that generated each:

| epoch | images | mean reward | policy digest |
|---|---|---|---|
{epochs}
"""

_SYNTHETIC = """The model generated them while it was trained: all images
are synthetic, and there are no photographs and no hand-made drawings among them."""

_PREFERENCES = """The model generated some of them, or none:
others are preference pairs that people made, whose origin and terms this card does not know."""


def write_dataset(
    history: History,
    folder: Path,
    *,
    epochs: Iterable[int] | None = None,
    reward: str | None = None,
) -> int:
    """Write a run's samples as a Hugging Face dataset, one shard at a time.

    Args:
        history: The run's history.
        folder: The target, which must be absent or empty. It appears complete or not at all.
        epochs: The epochs to export; by default all whose samples are kept.
        reward: The reward whose scores to export; by default the run's own.

    Returns:
        The number of samples written.

    Raises:
        ConfigError: The folder is not empty or not writable.
        NotInHistory: There are no such samples, epochs or reward.
        RetiredObject: Retention has deleted the samples of a requested epoch.
        StoreError: An object is damaged or missing.
    """
    _check_folder(folder)
    samples = history.samples(reward, epochs)
    # A scorer's column called `image` is renamed, as `History.samples` does for other names.
    names = [f"reward.{name}" if name == "image" else name for name in samples.column_names]
    samples = samples.rename_columns(names)
    if not len(samples):
        raise NotInHistory(f"run {history.run_id!r} has no samples to export")
    chosen = sorted(set(samples["epoch"].to_pylist()))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            dataset = Path(scratch) / "dataset"
            (dataset / "data").mkdir(parents=True)
            policies, samplers = _write_shards(history, samples, chosen, dataset / "data")
            card = _card(history, reward, samples, policies, samplers)
            (dataset / "README.md").write_text(card, encoding="utf-8")
            if folder.exists():
                folder.rmdir()
            shutil.move(dataset, folder)
    except OSError as error:
        raise ConfigError(f"cannot write {folder}: {error.strerror}") from error
    return len(samples)


def _check_folder(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(
            f"{folder} exists and is not an empty folder; choose another folder or delete it first"
        )


def _write_shards(
    history: History, samples: pa.Table, epochs: list[int], folder: Path
) -> tuple[dict[int, str], set[str]]:
    """Write a file per shard; return the policy digest of each epoch, and all sampler digests."""
    fields = [ROLLOUT_SCHEMA.field("image"), *(f for f in samples.schema if f.name != "sample_id")]
    schema = pa.schema([samples.schema.field("sample_id"), *fields])
    schema = schema.with_metadata({"huggingface": json.dumps(_features(schema))})
    policies: dict[int, str] = {}
    samplers: set[str] = set()
    columns = ["sample_id", "image", "policy_digest", "sampler_digest", "epoch"]
    rollouts = history.rollouts(epochs)
    scored = pc.SetLookupOptions(samples["sample_id"])
    for number, fragment in enumerate(rollouts.get_fragments()):
        shard = fragment.to_table(schema=rollouts.schema, columns=columns)
        shard = shard.filter(pc.call_function("is_in", [shard["sample_id"]], scored))
        if not len(shard):
            continue
        samplers.update(shard["sampler_digest"].to_pylist())
        policies.setdefault(shard["epoch"][0].as_py(), shard["policy_digest"][0].as_py())
        rows = join(shard.select(["sample_id", "image"]), samples)
        rows = rows.select(schema.names).cast(schema)
        pq.write_table(rows, folder / f"train-{number:05d}.parquet", compression="zstd")
    return policies, samplers


def _features(schema: pa.Schema) -> dict[str, dict[str, dict[str, dict[str, str]]]]:
    """Describe the columns to `datasets`, so that it decodes the image struct as an image."""
    names = {pa.float32(): "float32", pa.float64(): "float64"}
    return {
        "info": {
            "features": {
                field.name: {"_type": "Image"}
                if field.name == "image"
                else {"dtype": names.get(field.type, str(field.type)), "_type": "Value"}
                for field in schema
            }
        }
    }


def _card(
    history: History,
    reward: str | None,
    samples: pa.Table,
    policies: dict[int, str],
    samplers: set[str],
) -> str:
    config = history.config
    identity = runs.load_run(history.run.store, history.run_id).identity
    digests = identity.get("digests")
    digests = digests if isinstance(digests, dict) else {}
    path = Path(config.model.path)
    # A local path means nothing on another machine and may be private.
    model = path.name if path.is_absolute() else config.model.path
    # The digest of preference pairs stands for the policy and the sampler, which are unknown.
    has_pairs = not samplers.isdisjoint(policies.values())
    header = {
        "pretty_name": f"Samples of the run {history.run_id}",
        "task_categories": ["text-to-image"],
        "tags": ["ddpo", "reinforcement-learning", *([] if has_pairs else ["synthetic"])],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": "data/*.parquet"}],
            }
        ],
    }
    counts = Counter(samples["epoch"].to_pylist())
    means = mean_rewards(samples)
    rows = [
        f"| {epoch} | {counts[epoch]} | {'none' if mean is None else f'{mean:.4g}'} "
        f"| `{policies[epoch][:12]}` |"
        for epoch, mean in means.items()
    ]
    return _CARD.format(
        header=yaml.safe_dump(header, sort_keys=False),
        count=len(samples),
        origin=_PREFERENCES if has_pairs else _SYNTHETIC,
        run_id=history.run_id,
        model=model if config.model.revision is None else f"{model}@{config.model.revision}",
        prompts=config.prompts.name,
        prompts_digest=digests.get("prompts"),
        reward_id=history.resolve_reward(reward) or history.reward_id,
        run_reward_id=history.reward_id,
        reward_digest=digests.get("reward"),
        algorithm=config.algorithm.type,
        sampler=config.sampler.summary,
        sampler_digests=", ".join(f"`{digest}`" for digest in sorted(samplers)),
        seed=config.seed,
        epochs="\n".join(rows),
    )
