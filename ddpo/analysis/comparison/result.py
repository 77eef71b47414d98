"""Results of a comparison: rewards by queries, differences between variants, ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ddpo.analysis.comparison.budgets import (
    Budget,
    Costs,
    at_equal_budget,
    forwards_of,
    seconds_of,
)
from ddpo.analysis.comparison.plan import Comparison, Member
from ddpo.analysis.intervals import Interval, interval
from ddpo.analysis.rewards import reward_curve
from ddpo.errors import MissingObject
from ddpo.runs import Run, open_run
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT, EPOCH
from ddpo.store.objects import Store


@dataclass(frozen=True)
class VariantResult:
    """The result of one variant; all intervals are over seeds."""

    name: str
    """The variant."""
    by_seed: tuple[tuple[float, ...], ...]
    """One row per seed: the mean reward of each reported epoch."""
    curve: tuple[Interval, ...]
    """Mean reward over seeds, one entry per reported epoch."""
    gain: Interval
    """Last epoch minus first, seed by seed."""
    difference: Interval | None
    """Last epoch minus the first variant's, seed by seed; None for the first variant."""
    beyond_control: Interval | None
    """Last epoch minus its control's, seed by seed; None without a control."""


@dataclass(frozen=True)
class Ratios:
    """Importance ratios of an update to the policy that generated its samples, over all seeds."""

    variant: str
    """The variant."""
    epoch: int
    """The epoch."""
    mean: float
    """Mean importance ratio."""
    smallest: float
    """Smallest importance ratio."""
    largest: float
    """Largest importance ratio."""
    clip_fraction: float
    """Share of (sample, timestep) pairs outside the clip range; 0 if the algorithm has none."""


@dataclass(frozen=True)
class Result:
    """The result of a comparison."""

    epochs: tuple[int, ...]
    """Reported epochs: those that each policy sampled itself, and the shared first one."""
    queries: tuple[int, ...]
    """For each reported epoch, the number of reward queries its policy has learned from."""
    variants: tuple[VariantResult, ...]
    """One per variant, in the comparison's order."""
    ratios: tuple[Ratios, ...]
    """On a shared history, one per epoch trained on it, if the algorithm has importance ratios."""
    budgets: tuple[Budget, ...]
    """Equal reward queries, equal forwards and equal time; none on a shared history."""


def read_result(comparison: Comparison, store: Store) -> Result:
    """Read the result of a comparison whose runs are complete.

    Raises:
        MissingObject: A run lacks an epoch.
    """
    last = comparison.epochs - 1
    epochs = (0, last) if comparison.config.offline else tuple(range(comparison.epochs))
    curves = {
        name: [_means(store, member, epochs) for member in members]
        for name, members in comparison.variants.items()
    }
    ratios: list[Ratios] = []
    if comparison.config.offline:
        for name, members in comparison.variants.items():
            for epoch in range(last):
                ratios += _ratios(store, name, members, epoch)
    queries = tuple(epoch * comparison.samples_per_epoch for epoch in epochs)
    variants = compare_curves(curves, comparison.config.controls)
    budgets = () if comparison.config.offline else _budgets(comparison, store, queries, curves)
    return Result(epochs, queries, variants, tuple(ratios), budgets)


def _budgets(
    comparison: Comparison,
    store: Store,
    queries: Sequence[int],
    curves: Mapping[str, Sequence[Sequence[float]]],
) -> tuple[Budget, ...]:
    epochs = range(comparison.epochs)
    by_unit: dict[str, dict[str, list[Costs | None]]] = {
        unit: {} for unit in ("reward queries", "forwards", "seconds")
    }
    for name, members in comparison.variants.items():
        runs = [open_run(store, member.run_id) for member in members]
        by_unit["reward queries"][name] = [queries for _ in runs]
        by_unit["forwards"][name] = [forwards_of(run, epochs) for run in runs]
        by_unit["seconds"][name] = [seconds_of(run, epochs) for run in runs]
    found = []
    for unit, costs in by_unit.items():
        known = {name: [row for row in rows if row is not None] for name, rows in costs.items()}
        if all(len(known[name]) == len(rows) for name, rows in costs.items()):
            found.append(at_equal_budget(unit, known, curves))
    return tuple(found)


def compare_curves(
    curves: Mapping[str, Sequence[Sequence[float]]],
    controls: Mapping[str, str],
) -> tuple[VariantResult, ...]:
    """Reduce rewards over seeds to one result per variant; differences are to the first.

    Args:
        curves: By variant, one row per seed of mean rewards by epoch; seeds in the same order.
        controls: Maps a variant to its control.
    """
    first = next(iter(curves))

    def beyond(name: str, other: str | None) -> Interval | None:
        if other is None:
            return None
        pairs = zip(curves[name], curves[other], strict=True)
        return interval([curve[-1] - reference[-1] for curve, reference in pairs])

    return tuple(
        VariantResult(
            name,
            by_seed=tuple(tuple(row) for row in rows),
            curve=tuple(interval(column) for column in zip(*rows, strict=True)),
            gain=interval([row[-1] - row[0] for row in rows]),
            difference=beyond(name, None if name == first else first),
            beyond_control=beyond(name, controls.get(name)),
        )
        for name, rows in curves.items()
    )


def _means(store: Store, member: Member, epochs: Sequence[int]) -> list[float]:
    means = {point.epoch: point.mean for point in reward_curve(open_run(store, member.run_id))}
    for epoch in epochs:
        if epoch not in means:
            raise MissingObject(EPOCH.key(Partition(member.run_id, epoch)), store.root)
    return [means[epoch] for epoch in epochs]


def _ratios(store: Store, variant: str, members: Sequence[Member], epoch: int) -> list[Ratios]:
    updates = [_update_metrics(open_run(store, member.run_id), epoch) for member in members]
    if not all("ratio_mean" in metrics for metrics in updates):
        return []  # regression has no ratio
    count = len(updates)
    return [
        Ratios(
            variant,
            epoch,
            mean=sum(metrics["ratio_mean"] for metrics in updates) / count,
            smallest=min(metrics["ratio_min"] for metrics in updates),
            largest=max(metrics["ratio_max"] for metrics in updates),
            clip_fraction=sum(metrics["clip_fraction"] for metrics in updates) / count,
        )
    ]


def _update_metrics(run: Run, epoch: int) -> dict[str, float]:
    return CHECKPOINT.require(run.store, Partition(run.run_id, epoch + 1)).metrics
