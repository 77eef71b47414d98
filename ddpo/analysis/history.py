"""A run's history as data: its samples, scores, images and trajectories, for notebooks.

Only committed data is read: objects are located through manifests and verified by sha256. Data
folders are never listed, so leftovers of a killed task are never seen. The formats are open and can
be read without this module: docs/data.md.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from os import PathLike, fspath
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
from PIL import Image

from ddpo.basics.images import decode_image
from ddpo.config import RunConfig
from ddpo.errors import ConfigError, NotInHistory
from ddpo.rewards.identity import name_in_keys
from ddpo.runs import Run, open_run
from ddpo.store import epochs as commits
from ddpo.store import keys
from ddpo.store.arrow import join, read_table, union, verified_dataset, with_constants
from ddpo.store.artefacts import RolloutShard
from ddpo.store.epochs import Epoch
from ddpo.store.kinds import EVALUATION
from ddpo.store.objects import Store, StoredObject
from ddpo.store.tables import ADVANTAGE_SCHEMA, EVALUATION_SCHEMA, REWARD_SCHEMA, ROLLOUT_SCHEMA

if TYPE_CHECKING:
    import torch

_logger = logging.getLogger(__name__)

_PARTITIONS = [pa.field("run_id", pa.string()), pa.field("epoch", pa.int32())]
_SCORED = pa.schema([pa.field("reward_name", pa.string()), *_PARTITIONS])
_EVALUATED = pa.schema([pa.field("evaluation", pa.string()), *_PARTITIONS])
ROLLOUTS = pa.schema([*ROLLOUT_SCHEMA, *_PARTITIONS])
"""Schema of `History.rollouts`."""
SAMPLES = pa.schema(
    [
        ("sample_id", pa.string()),
        ("epoch", pa.int32()),
        ("prompt", pa.string()),
        ("seed", pa.int64()),
        ("reward", pa.float32()),
        ("status", pa.string()),
        ("advantage", pa.float32()),
    ]
)
"""Schema of `History.samples`, without the scorer's own columns."""
_NO_ADVANTAGES = pa.schema([SAMPLES.field("sample_id"), SAMPLES.field("advantage")]).empty_table()

_EPOCHS = re.compile(r"(\d+)|(\d*):(\d*)")


def epoch_range(selection: str | None) -> range:
    """Return the epochs that a user selects.

    Args:
        selection: One epoch, or a half-open range ``a:b`` where a or b may be omitted. None
            selects all epochs.

    Raises:
        ConfigError: The selection is invalid.
    """
    match = _EPOCHS.fullmatch(selection or ":")
    if match is None:
        raise ConfigError(
            f"epochs {selection!r} is neither one epoch nor a range a:b; expected for example "
            "3, 0:5 (epochs 0 to 4) or 3: (epoch 3 and later)"
        )
    one, low, high = match.groups()
    first = int(one or low or 0)
    return range(first, first + 1 if one else int(high or sys.maxsize))


def open_history(root: str | PathLike[str], run_id: str) -> History:
    """Open a run's history.

    Args:
        root: The store: a folder, or an fsspec URL such as ``s3://bucket/prefix``.
        run_id: The run's name.

    Returns:
        A snapshot of the history: to see epochs committed later, open it again.

    Raises:
        RunNotFound: The store has no such run; the message suggests similar names.
    """
    return History(open_run(Store.open(fspath(root)), run_id))


class History:
    """Everything a run has committed, read on demand; manifests are cached, data is not.

    Every method raises `CorruptObject`, `UnreadableData` or `MissingObject` if an object it reads
    is damaged or missing, and `RetiredObject` if retention has deleted it (`storage.retention`).
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._epochs: dict[int, Epoch] = {}
        self._warned = False

    def __repr__(self) -> str:
        return f"History({self.run_id!r} in {self.run.store.root}, {len(self.epochs)} epochs)"

    @property
    def run_id(self) -> str:
        """The run's name."""
        return self.run.run_id

    @property
    def config(self) -> RunConfig:
        """The run's config: identity and numerics as frozen, operation as last started."""
        return self.run.config

    @cached_property
    def epochs(self) -> tuple[int, ...]:
        """All committed epochs, including retired ones, sorted."""
        return tuple(commits.committed_epochs(self.run.store, self.run_id))

    @cached_property
    def retired_epochs(self) -> tuple[int, ...]:
        """Epochs whose samples retention has deleted, sorted."""
        return tuple(e for e in self.epochs if self._epoch(e).retirement() is not None)

    def epochs_within(self, selection: str | None) -> list[int]:
        """Return the committed epochs in a user's selection, including retired ones, sorted.

        Args:
            selection: One epoch, or a half-open range ``a:b`` where a or b may be omitted. None
                selects all epochs.

        Raises:
            ConfigError: The selection is invalid.
            NotInHistory: No epoch in the selection is committed.
        """
        selected = epoch_range(selection)
        chosen = [epoch for epoch in self.epochs if epoch in selected]
        if not chosen:
            problem = f"has not committed epochs {selection}" if selection else "is empty"
            raise NotInHistory(f"run {self.run_id!r} {problem}. {self._extent()}")
        return chosen

    @property
    def reward_id(self) -> str | None:
        """Id of the run's own reward, 'NAME-<digest8>'; None before the first committed epoch."""
        return self._epoch(self.epochs[-1]).reward_id if self.epochs else None

    @cached_property
    def rewards(self) -> tuple[str, ...]:
        """Ids of all rewards that have scored samples of this run, the run's own first."""
        first = self.reward_id
        reward_ids = commits.reward_ids(self.run.store, self.run_id)
        return tuple(sorted(reward_ids, key=lambda reward_id: (reward_id != first, reward_id)))

    def resolve_reward(self, reward: str | None) -> str | None:
        """Resolve the id of a reward that has scored this run.

        Args:
            reward: An id, or a name if only one reward of that name has scored the run. None for
                the run's own reward.

        Returns:
            The id; None for the run's own reward.

        Raises:
            NotInHistory: No such reward has scored the run, or several have; the message lists
                them.
        """
        if reward is None or reward in self.rewards:
            return reward
        matches = [i for i in self.rewards if i.rpartition("-")[0] == name_in_keys(reward)]
        if len(matches) == 1:
            return matches[0]
        if matches:
            raise NotInHistory(
                f"{len(matches)} rewards called {reward!r} have scored run {self.run_id!r}; choose "
                f"one by its id: {', '.join(matches)}"
            )
        known = (
            f"It has scores of {', '.join(self.rewards)}" if self.rewards else "It has no scores"
        )
        raise NotInHistory(f"no reward {reward!r} has scored run {self.run_id!r}. {known}")

    def rollouts(self, epochs: Iterable[int] | None = None) -> ds.FileSystemDataset:
        """Open the samples with their images (PNG bytes) as a dataset that is read when scanned.

        Args:
            epochs: The epochs; by default all whose samples are kept.

        Returns:
            The dataset, with ``run_id`` and ``epoch`` as partition columns. A scan reads whole
            shards to verify them, a few at a time, and decodes only the requested columns.

        Raises:
            NotInHistory: An epoch is not committed.
            RetiredObject: An epoch is retired.
        """
        parts = [
            (shard.objects["rollouts"], {"run_id": self.run_id, "epoch": epoch})
            for epoch in self._chosen(epochs)
            for shard in self._epoch(epoch).shards
        ]
        return verified_dataset(self.run.store, ROLLOUTS, parts)

    def samples(self, reward: str | None = None, epochs: Iterable[int] | None = None) -> pa.Table:
        """Read all samples with their scores, without images.

        Args:
            reward: The reward whose scores to read, one of `rewards`, by id or by name; by default
                the run's own.
            epochs: The epochs; by default all whose samples are kept.

        Returns:
            One row per sample in the order of epoch and index, with the columns of `SAMPLES`, then
            the scorer's own columns, prefixed with ``reward.`` where the name is taken. ``reward``
            is null where scoring failed, and ``status`` says why; ``advantage`` is null where none
            was computed from this reward. Samples that the reward has not scored are omitted.

        Raises:
            NotInHistory: An epoch is not committed, or the reward is unknown or ambiguous.
            RetiredObject: An epoch is retired.
        """
        store = self.run.store
        reward_id = self.resolve_reward(reward)
        tables = []
        for epoch in self._chosen(epochs):
            table = self._epoch(epoch).advantages_by(reward_id)
            advantages = _NO_ADVANTAGES
            if table is not None:
                advantages = _advantages(store, table.objects["advantages"])
            for shard, scores in self._epoch(epoch).scores(reward_id):
                wanted = ["sample_id", "prompt", "seed"]
                rows = read_table(store, shard.objects["samples"], wanted)
                rows = with_constants(rows, pa.schema([_SCORED.field("epoch")]), [epoch])
                # Scores come last, since their columns are the ones renamed on a clash.
                rewards = read_table(store, scores.objects["rewards"])
                tables.append(join(join(rows, advantages), rewards, prefix="reward."))
        return union(tables, SAMPLES)

    def reward_table(self) -> pa.Table:
        """Read the scores of all rewards, in all epochs whose samples are kept.

        Returns:
            One row per sample and reward: ``reward_name``, ``run_id``, ``epoch``, then the columns
            of the scores.
        """
        return self._by_reward(
            REWARD_SCHEMA,
            lambda epoch, reward_id: [
                scores.objects["rewards"] for _, scores in epoch.scores(reward_id)
            ],
        )

    def advantage_table(self) -> pa.Table:
        """Read the advantages under all rewards, in all epochs whose samples are kept.

        Returns:
            One row per sample and reward: ``reward_name``, ``run_id``, ``epoch``, then the columns
            of the advantages.
        """

        def advantages(epoch: Epoch, reward_id: str) -> list[StoredObject]:
            table = epoch.advantages_by(reward_id)
            return [] if table is None else [table.objects["advantages"]]

        return self._by_reward(ADVANTAGE_SCHEMA, advantages)

    def evaluation_table(self) -> pa.Table:
        """Read all evaluations of the run's checkpoints.

        Returns:
            One row per image: ``evaluation`` (the name of the evaluation: a set of images and
            judges), ``run_id``, ``epoch`` (of the checkpoint), ``sample_id``, ``prompt``,
            ``seed``, then the columns of scores (``score.LABEL``) and of the image's statistics.
        """
        store = self.run.store
        tables = [
            with_constants(
                read_table(store, EVALUATION.require(store, where).objects["images"]),
                _EVALUATED,
                [where.images_id, self.run_id, where.epoch],
            )
            for where in EVALUATION.partitions_of(store, self.run_id)
        ]
        return union(tables, pa.schema([*_EVALUATED, *EVALUATION_SCHEMA]))

    def _by_reward(
        self, schema: pa.Schema, objects: Callable[[Epoch, str], Sequence[StoredObject]]
    ) -> pa.Table:
        """Read the objects that ``objects`` lists for each reward and kept epoch into one table."""
        tables = [
            with_constants(
                read_table(self.run.store, stored), _SCORED, [reward_id, self.run_id, epoch]
            )
            for reward_id in self.rewards
            for epoch in self._chosen(None)
            for stored in objects(self._epoch(epoch), reward_id)
        ]
        return union(tables, pa.schema([*_SCORED, *schema]))

    def image(self, sample_id: str) -> Image.Image:
        """Read a sample's image, exactly as it was committed (PNG is lossless).

        Args:
            sample_id: For example ``R/00003/000017``.

        Raises:
            NotInHistory: The run has not committed this sample.
        """
        _, rows, row = self._find(sample_id, "image")
        return decode_image(rows["image"][row].as_py()["bytes"])

    def latents(self, sample_id: str) -> torch.Tensor:
        """Read the latents of a sample's trajectory.

        Args:
            sample_id: For example ``R/00003/000017``.

        Returns:
            Latents from noise to clean, [T+1, C, h, w], on the CPU, in the dtype that log-probs
            were computed in. Runs of an algorithm that trains on clean latents only store just
            those, [1, C, h, w].

        Raises:
            NotInHistory: The run has not committed this sample.
        """
        return self._tensor(sample_id, "latents")

    def log_probs(self, sample_id: str) -> torch.Tensor:
        """Read the log-probs of a sample's steps under the policy that generated it.

        Args:
            sample_id: For example ``R/00003/000017``.

        Returns:
            One value per step, averaged over latent dimensions, float32 [T], on the CPU.

        Raises:
            NotInHistory: The run has not committed this sample, or stores no log-probs because its
                algorithm trains on clean latents only (RWR).
        """
        return self._tensor(sample_id, "log_probs")

    def _tensor(self, sample_id: str, name: str) -> torch.Tensor:
        shard, _, row = self._find(sample_id)
        tensors = shard.trajectories()
        if name not in tensors:
            raise NotInHistory(
                f"{name} of {sample_id} were not stored: {self.config.algorithm.type} trains on "
                "clean latents only. Runs of DDPO store them"
            )
        # A copy: a view would keep the whole shard in memory.
        return tensors[name][row].clone()

    def _find(self, sample_id: str, *columns: str) -> tuple[RolloutShard, pa.Table, int]:
        """Return a sample's shard, the columns of its table, and its row (the same in tensors)."""
        parsed = keys.parse_sample_id(sample_id)
        if parsed is None:
            raise NotInHistory(
                f"{sample_id!r} is not a sample id. Expected run, epoch and index, such as "
                f"{self.run_id}/00003/000017"
            )
        _, epoch, index = parsed
        if epoch in self.epochs:  # whichever run it names: a fork inherits samples of its parent
            likely = index // self.config.rollouts.shard_size
            shards = list(enumerate(self._epoch(epoch).shards))
            for _, shard in sorted(shards, key=lambda numbered: numbered[0] != likely):
                table = shard.objects["rollouts" if "image" in columns else "samples"]
                rows = read_table(self.run.store, table, ["sample_id", *columns])
                row = pc.index(rows["sample_id"], pa.scalar(sample_id)).as_py()
                if row >= 0:
                    return shard, rows, row
        raise NotInHistory(
            f"run {self.run_id!r} has not committed sample {sample_id}. {self._extent()}"
        )

    def _chosen(self, epochs: Iterable[int] | None) -> list[int]:
        if epochs is None:
            retired = self.retired_epochs
            if retired and not self._warned:
                self._warned = True
                _logger.warning(
                    "run %s: the samples of %d of %d epochs (%s) were retired and are skipped",
                    *(self.run_id, len(retired), len(self.epochs), _ranges(retired)),
                )
            return [epoch for epoch in self.epochs if epoch not in retired]
        chosen = sorted(set(epochs))
        unknown = [epoch for epoch in chosen if epoch not in self.epochs]
        if unknown:
            problem = f"run {self.run_id!r} has not committed epoch {_ranges(unknown)}"
            raise NotInHistory(f"{problem}. {self._extent()}")
        for epoch in chosen:
            if error := self._epoch(epoch).retirement():
                raise error
        return chosen

    def _epoch(self, epoch: int) -> Epoch:
        if epoch not in self._epochs:
            self._epochs[epoch] = commits.read_epoch(self.run.store, self.run_id, epoch)
        return self._epochs[epoch]

    def _extent(self) -> str:
        committed = _ranges(self.epochs) if self.epochs else "none"
        return f"Committed epochs: {committed}"


def _ranges(epochs: Sequence[int]) -> str:
    """Format sorted epochs as ranges, such as '0-3, 7'."""
    ranges: list[list[int]] = []
    for epoch in epochs:
        if ranges and ranges[-1][-1] == epoch - 1:
            ranges[-1][1:] = [epoch]
        else:
            ranges.append([epoch])
    return ", ".join("-".join(map(str, bounds)) for bounds in ranges)


def _advantages(store: Store, stored: StoredObject) -> pa.Table:
    """Return the advantage of each sample; null if the algorithm computes none (regression)."""
    table = read_table(store, stored)
    wanted = [name for name in _NO_ADVANTAGES.column_names if name in table.column_names]
    return union([table.select(wanted)], _NO_ADVANTAGES.schema)


def mean_rewards(samples: pa.Table) -> dict[int, float | None]:
    """Return the mean reward of each epoch in a table of samples; None if none has a reward."""
    means = samples.group_by("epoch").aggregate([("reward", "mean")]).sort_by("epoch")
    return dict(zip(means["epoch"].to_pylist(), means["reward_mean"].to_pylist(), strict=True))
