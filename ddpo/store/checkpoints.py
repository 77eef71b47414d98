"""Checkpoints: the training state before an epoch, committed atomically."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from ddpo.basics.digests import canonical_json
from ddpo.store import keys
from ddpo.store.backends import Maker
from ddpo.store.manifests import Artefact
from ddpo.store.objects import Objects, StoredObject
from ddpo.store.statistics import statistics_from, statistics_to_json
from ddpo.store.tensors import read_tensors, write_tensors
from ddpo.training.loss_scale import LossScale
from ddpo.training.state import PromptStatistics, TrainState

if TYPE_CHECKING:
    from torch import Tensor

    from ddpo.models import WeightSet

TENSOR_ROLES = ("weights", "optimizer", "ema", "value", "old")
"""Roles of a checkpoint's tensors, fields of `TrainState`; the last three may be absent."""

_DIGESTS: Mapping[WeightSet, str] = {"average": "ema_digest", "old": "old_digest"}

FILE_BYTES = 2 * 10**9
"""Tensors of a role that take more are in several files, of so many bytes at most unless a single
tensor takes more."""


@dataclass(frozen=True)
class Checkpoint(Artefact):
    """The state before an epoch."""

    @cached_property
    def digests(self) -> dict[str, str]:
        """Digests of the policy with each of its weight sets, of base model and sampler.

        Their names: 'policy_digest', 'ema_digest', 'old_digest', 'base_digest', 'sampler_digest'.
        """
        return self.document("digests")

    def policy_digest(self, weights: WeightSet) -> str:
        """Return the policy's digest with a set of weights; the trained ones if it is not kept."""
        return self.digests.get(_DIGESTS.get(weights, ""), self.digests["policy_digest"])

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """Metrics of the update that made it; empty for a run's first checkpoint."""
        return self.document("metrics") if "metrics" in self.objects else {}

    @property
    def samples(self) -> int:
        """Samples generated so far."""
        return self._progress["samples"]

    @property
    def updates(self) -> int:
        """Optimizer steps so far."""
        return self._progress["updates"]

    def statistics(self) -> PromptStatistics:
        """Return the last rewards of each prompt, the oldest first."""
        return statistics_from(self._progress["statistics"])

    def state(self) -> TrainState:
        """Return the state, tensors on the CPU and mapped from temporary files.

        Raises:
            RetiredObject: Retention deleted its tensors.
            MissingObject: An object is missing.
            CorruptObject: An object is damaged.
        """
        return TrainState(
            weights=self._tensors("weights"),
            optimizer=self._tensors("optimizer"),
            statistics=self.statistics(),
            epoch=self._progress["epoch"],
            updates=self.updates,
            samples=self.samples,
            ema=self._tensors("ema"),
            value=self._tensors("value"),
            old=self._tensors("old"),
            loss_scale=LossScale(**scale) if (scale := self._progress.get("loss_scale")) else None,
        )

    def _tensors(self, role: str) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        for stored in self.files(role):
            with self.store.fetch(stored) as file:
                tensors |= read_tensors(file)[0]
        return tensors

    @cached_property
    def _progress(self) -> dict[str, Any]:
        return self.document("progress")


def checkpoint_objects(
    state: TrainState,
    digests: Mapping[str, str],
    metrics: Mapping[str, Any] | None = None,
    *,
    inherited: Mapping[str, Sequence[StoredObject]] | None = None,
) -> Objects:
    """Return the objects of a checkpoint by role, as `Kind.commit` stores them.

    Args:
        state: The state.
        digests: See `Checkpoint.digests`.
        metrics: Metrics of the update; None for a first checkpoint.
        inherited: Files of another run's checkpoint, by role, that already hold this state's
            tensors: they are listed instead of written again.
    """
    progress = {
        "epoch": state.epoch,
        "updates": state.updates,
        "samples": state.samples,
        "statistics": statistics_to_json(state.statistics),
        **({"loss_scale": asdict(state.loss_scale)} if state.loss_scale else {}),
    }
    objects: dict[str, bytes | Maker | StoredObject] = {
        "progress": canonical_json(progress),
        "digests": canonical_json(digests),
    }
    if metrics is not None:
        objects["metrics"] = canonical_json(metrics)
    for role in TENSOR_ROLES:
        tensors = getattr(state, role)
        if tensors or role in ("weights", "optimizer"):
            files = (inherited or {}).get(role) or [
                partial(write_tensors, part) for part in _split(tensors)
            ]
            for number, file in enumerate(files, 1):
                objects[keys.part_role(role, number, len(files))] = file
    return objects


def _split(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """Divide tensors among files, in the order of names."""
    from huggingface_hub import split_state_dict_into_shards_factory  # slow to import

    split = split_state_dict_into_shards_factory(
        {name: tensors[name] for name in sorted(tensors)},
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="file{suffix}",
        max_shard_size=FILE_BYTES,
    )
    parts = split.filename_to_tensors.values()
    return [{name: tensors[name] for name in names} for names in parts] or [{}]
