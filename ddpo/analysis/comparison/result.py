"""What a comparison found: rewards by queries, differences between variants, ratios."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from ddpo.analysis.comparison.plan import Comparison, Member
from ddpo.analysis.comparison.statistics import Interval, interval
from ddpo.analysis.report import reward_curve
from ddpo.errors import MissingObject
from ddpo.runs.run import Run, open_run
from ddpo.store import keys
from ddpo.store.checkpoints import find_checkpoint, load_document
from ddpo.store.objects import Store


@dataclass(frozen=True)
class VariantResult:
    """What one variant achieved; every interval is over seeds.

    Attributes:
        name: The variant.
        by_seed: A row a seed: the mean reward of the samples of each epoch that is shown.
        curve: Over seeds, an entry an epoch that is shown.
        gain: Last epoch minus first, seed by seed.
        difference: Last epoch minus the first variant's, seed by seed; None of that itself.
        beyond_control: Last epoch minus its control's, seed by seed; None where it has none.
    """

    name: str
    by_seed: tuple[tuple[float, ...], ...]
    curve: tuple[Interval, ...]
    gain: Interval
    difference: Interval | None
    beyond_control: Interval | None


@dataclass(frozen=True)
class Ratios:
    """How far an update was from the policy that drew its samples, over all seeds.

    Attributes:
        variant: The variant.
        epoch: The epoch.
        mean: Mean importance ratio.
        smallest: The smallest.
        largest: The largest.
        clip_fraction: Share of (sample, timestep) pairs outside the clip range; 0 where the
            algorithm has none.
    """

    variant: str
    epoch: int
    mean: float
    smallest: float
    largest: float
    clip_fraction: float


@dataclass(frozen=True)
class Result:
    """What a comparison found.

    Attributes:
        epochs: The epochs that are shown: those whose samples each policy drew itself, and the
            first, which the untrained one drew for all.
        queries: Reward queries that the policy of each of these epochs has learnt from.
        variants: In the comparison's order.
        ratios: On a shared history, of each epoch that was trained on it, where the algorithm has
            importance ratios; else empty.
    """

    epochs: tuple[int, ...]
    queries: tuple[int, ...]
    variants: tuple[VariantResult, ...]
    ratios: tuple[Ratios, ...]


def read_result(comparison: Comparison, store: Store) -> Result:
    """Read the result of a comparison whose runs are whole.

    Args:
        comparison: The comparison.
        store: Where its runs are.

    Returns:
        The result.

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
    variants = summarise(curves, comparison.config.controls)
    return Result(epochs, queries, variants, tuple(ratios))


def summarise(
    curves: Mapping[str, Sequence[Sequence[float]]],
    controls: Mapping[str, str],
) -> tuple[VariantResult, ...]:
    """Reduce rewards over seeds.

    Args:
        curves: By variant a row a seed, the same seeds in the same order, of mean rewards by epoch.
        controls: Variant to the variant that controls it.

    Returns:
        A result a variant; differences are to the first.
    """
    first = next(iter(curves))

    def beyond(name: str, other: str | None) -> Interval | None:
        if other is None:
            return None
        pairs = zip(curves[name], curves[other], strict=True)
        return interval([own[-1] - theirs[-1] for own, theirs in pairs])

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
            raise MissingObject(keys.epoch_manifest_key(member.run_id, epoch), store.root)
    return [means[epoch] for epoch in epochs]


def _ratios(store: Store, variant: str, members: Sequence[Member], epoch: int) -> list[Ratios]:
    found = [_update_metrics(open_run(store, member.run_id), epoch) for member in members]
    if not all("ratio_mean" in metrics for metrics in found):
        return []  # regression has no ratio
    count = len(found)
    return [
        Ratios(
            variant,
            epoch,
            mean=sum(metrics["ratio_mean"] for metrics in found) / count,
            smallest=min(metrics["ratio_min"] for metrics in found),
            largest=max(metrics["ratio_max"] for metrics in found),
            clip_fraction=sum(metrics["clip_fraction"] for metrics in found) / count,
        )
    ]


def _update_metrics(run: Run, epoch: int) -> dict[str, float]:
    after = find_checkpoint(run.store, run.run_id, epoch + 1)
    if after is None:
        raise MissingObject(keys.checkpoint_manifest_key(run.run_id, epoch + 1), run.store.root)
    return load_document(run.store, after.manifest, "metrics")
