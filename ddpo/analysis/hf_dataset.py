"""A run's samples as a Hugging Face dataset: a folder of Parquet files, and a card.

Parquet rather than `datasets.save_to_disk`'s Arrow files: `load_dataset(FOLDER)` shows the pictures
all the same, the folder can be uploaded as a dataset as it is, and other tools read it too.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import yaml

from ddpo.analysis.history import History
from ddpo.errors import ConfigError, NotInHistory
from ddpo.store import runs
from ddpo.store.arrow import join
from ddpo.store.tables import ROLLOUT_SCHEMA

_CARD = """\
---
{header}---

# Samples of a reinforcement learning run

{count} pictures that a diffusion model drew while [ddpo](https://arxiv.org/abs/2305.13301) trained
it on a reward, with prompt, seed, reward and advantage of each. They are synthetic: no photograph,
no drawing by hand is among them.

| | |
|---|---|
| run | `{run_id}` |
| model | `{model}` |
| prompts | `{prompts}`, sha256 `{prompts_digest}` |
| reward | `{reward_id}` (higher is better) |
| the run's own reward | `{own}`, sha256 `{reward_digest}` |
| algorithm | `{algorithm}` |
| sampler | {sampler} |
| sampler digest | {sampler_digests} |
| seed | {seed} |

`reward` is null where the picture could not be scored, and `status` says why. `advantage` is what
the update weighed the picture by (before a value function's baseline, if the run has one), null
where none was computed from this reward. `sample_id` is run, epoch and index. Columns after
`advantage` are the scorer's own.

Epochs, and the policy that drew each:

| epoch | pictures | mean reward | policy digest |
|---|---|---|---|
{epochs}
"""


@dataclass
class _Drawn:
    """What the card says of an epoch."""

    count: int
    total: float
    scored: int
    policy: str


def write_dataset(
    history: History,
    folder: Path,
    *,
    epochs: Iterable[int] | None = None,
    reward: str | None = None,
) -> int:
    """Write a run's samples as a Hugging Face dataset, a shard at a time.

    Args:
        history: The run's history.
        folder: Where to; absent or empty. It is there whole, or not at all.
        epochs: Which; by default all whose samples are kept.
        reward: Whose scores; by default the run's own.

    Returns:
        How many samples were written.

    Raises:
        ConfigError: The folder is not empty, or cannot be written to.
        NotInHistory: No sample, epoch or reward is as asked.
        RetiredObject: An epoch that is retired was asked for.
        StoreError: What is read is damaged or gone.
    """
    _check_folder(folder)
    samples = history.samples(reward, epochs)
    # A scorer's own column gives way to the picture, as to the others.
    names = [f"reward.{name}" if name == "image" else name for name in samples.column_names]
    samples = samples.rename_columns(names)
    if not len(samples):
        raise NotInHistory(f"run {history.run_id!r} has no samples to export")
    chosen = sorted(set(samples["epoch"].to_pylist()))
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
            made = Path(scratch) / "dataset"
            (made / "data").mkdir(parents=True)
            drawn, samplers = _write_shards(history, samples, chosen, made / "data")
            card = _card(history, reward, len(samples), drawn, samplers)
            (made / "README.md").write_text(card, encoding="utf-8")
            if folder.exists():
                folder.rmdir()
            shutil.move(made, folder)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written: {error.strerror}") from error
    return len(samples)


def _check_folder(folder: Path) -> None:
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ConfigError(
            f"{folder} is there already and is not an empty folder; nothing is overwritten: name "
            "another, or remove it first"
        )


def _write_shards(
    history: History, samples: pa.Table, epochs: list[int], folder: Path
) -> tuple[dict[int, _Drawn], set[str]]:
    fields = [ROLLOUT_SCHEMA.field("image"), *(f for f in samples.schema if f.name != "sample_id")]
    schema = pa.schema([samples.schema.field("sample_id"), *fields])
    schema = schema.with_metadata({"huggingface": json.dumps(_features(schema))})
    drawn: dict[int, _Drawn] = {}
    samplers: set[str] = set()
    wanted = ["sample_id", "image", "policy_digest", "sampler_digest", "epoch"]
    rollouts = history.rollouts(epochs)
    scored = pc.SetLookupOptions(samples["sample_id"])
    for number, fragment in enumerate(rollouts.get_fragments()):
        shard = fragment.to_table(schema=rollouts.schema, columns=wanted)
        shard = shard.filter(pc.call_function("is_in", [shard["sample_id"]], scored))
        if not len(shard):
            continue
        samplers.update(shard["sampler_digest"].to_pylist())
        epoch = shard["epoch"][0].as_py()
        rows = join(shard.select(["sample_id", "image"]), samples)
        known = drawn.setdefault(epoch, _Drawn(0, 0.0, 0, shard["policy_digest"][0].as_py()))
        known.count += len(rows)
        known.total += pc.call_function("sum", [rows["reward"]]).as_py() or 0.0
        known.scored += len(rows) - rows["reward"].null_count
        rows = rows.select(schema.names).cast(schema)
        pq.write_table(rows, folder / f"train-{number:05d}.parquet", compression="zstd")
    return drawn, samplers


def _features(schema: pa.Schema) -> dict[str, dict[str, dict[str, dict[str, str]]]]:
    """Return what `datasets` wants to know of columns, so that it shows the struct as a picture."""
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
    count: int,
    drawn: dict[int, _Drawn],
    samplers: set[str],
) -> str:
    config = history.config
    identity = runs.load_run(history.run.store, history.run_id).identity
    digests = identity.get("digests")
    digests = digests if isinstance(digests, dict) else {}
    path = Path(config.model.path)
    # A folder of this machine says nothing elsewhere, and may say too much.
    model = path.name if path.is_absolute() else config.model.path
    header = {
        "pretty_name": f"Samples of the run {history.run_id}",
        "task_categories": ["text-to-image"],
        "tags": ["ddpo", "reinforcement-learning", "synthetic"],
        "configs": [
            {
                "config_name": "default",
                "data_files": [{"split": "train", "path": "data/*.parquet"}],
            }
        ],
    }
    rows = [
        f"| {epoch} | {each.count} | {_mean(each)} | `{each.policy[:12]}` |"
        for epoch, each in drawn.items()
    ]
    sampler = config.sampler
    return _CARD.format(
        header=yaml.safe_dump(header, sort_keys=False),
        count=count,
        run_id=history.run_id,
        model=model if config.model.revision is None else f"{model}@{config.model.revision}",
        prompts=config.prompts.name,
        prompts_digest=digests.get("prompts"),
        reward_id=history.resolve_reward(reward) or history.reward_id,
        own=history.reward_id,
        reward_digest=digests.get("reward"),
        algorithm=config.algorithm.type,
        sampler=f"{sampler.steps} steps, eta {sampler.eta}, guidance {sampler.guidance_scale}",
        sampler_digests=", ".join(f"`{digest}`" for digest in sorted(samplers)),
        seed=config.seed,
        epochs="\n".join(rows),
    )


def _mean(drawn: _Drawn) -> str:
    return f"{drawn.total / drawn.scored:.4g}" if drawn.scored else "none"
