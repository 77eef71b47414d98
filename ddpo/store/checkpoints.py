"""Checkpoints: the training state before an epoch, committed atomically."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from ddpo.basics.digests import canonical_json
from ddpo.store.manifests import Artefact
from ddpo.store.objects import Objects, StoredObject
from ddpo.store.statistics import statistics_from, statistics_to_json
from ddpo.store.tensors import decode_tensors, encode_tensors
from ddpo.training.loss_scale import LossScale
from ddpo.training.state import PromptStatistics, TrainState

TENSOR_ROLES = ("weights", "optimizer", "ema", "value")
"""Roles of a checkpoint's tensors, fields of `TrainState`; the last two may be absent."""


@dataclass(frozen=True)
class Checkpoint(Artefact):
    """The state before an epoch."""

    @cached_property
    def digests(self) -> dict[str, str]:
        """Digests of the policy ('policy_digest', 'ema_digest'), base model and sampler."""
        return self.document("digests")

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
        """Return the state, tensors on the CPU.

        Raises:
            RetiredObject: Retention deleted its tensors.
            MissingObject: An object is missing.
            CorruptObject: An object is damaged.
        """
        tensors = {
            role: decode_tensors(self.store.get(self.objects[role]))[0]
            for role in TENSOR_ROLES
            if role in self.objects
        }
        return TrainState(
            weights=tensors["weights"],
            optimizer=tensors["optimizer"],
            statistics=self.statistics(),
            epoch=self._progress["epoch"],
            updates=self.updates,
            samples=self.samples,
            ema=tensors.get("ema", {}),
            value=tensors.get("value", {}),
            loss_scale=LossScale(**scale) if (scale := self._progress.get("loss_scale")) else None,
        )

    @cached_property
    def _progress(self) -> dict[str, Any]:
        return self.document("progress")


def checkpoint_objects(
    state: TrainState,
    digests: Mapping[str, str],
    metrics: Mapping[str, Any] | None = None,
    *,
    inherited: Mapping[str, StoredObject] | None = None,
) -> Objects:
    """Return the objects of a checkpoint by role, as `Kind.commit` stores them.

    Args:
        state: The state.
        digests: See `Checkpoint.digests`.
        metrics: Metrics of the update; None for a first checkpoint.
        inherited: Objects of another run's checkpoint, by role, that already hold this state's
            tensors: they are listed instead of written again.
    """
    progress = {
        "epoch": state.epoch,
        "updates": state.updates,
        "samples": state.samples,
        "statistics": statistics_to_json(state.statistics),
        **({"loss_scale": asdict(state.loss_scale)} if state.loss_scale else {}),
    }
    objects: dict[str, bytes | StoredObject] = {
        "progress": canonical_json(progress),
        "digests": canonical_json(digests),
    }
    if metrics is not None:
        objects["metrics"] = canonical_json(metrics)
    for role in TENSOR_ROLES:
        tensors = getattr(state, role)
        if tensors or role in ("weights", "optimizer"):
            known = (inherited or {}).get(role)
            objects[role] = known or encode_tensors(tensors)
    return objects
