"""The checkpoint to take: the one that gained most without an alarm."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ddpo.errors import ConfigError
from ddpo.runs import Run
from ddpo.store.artefacts import Champion
from ddpo.store.kinds import CHAMPION, CHECKPOINT, GATE_DECISION

RULE = "the highest mean reward of the evaluated checkpoints without an alarm, above the first's"


@dataclass(frozen=True)
class Candidate:
    """An evaluated checkpoint."""

    epoch: int
    """Its epoch."""
    mean: float | None
    """Mean of the run's own reward; None if no image could be scored."""
    alarms: tuple[str, ...] = ()
    """The limits that it has passed."""


def best_of(candidates: Iterable[Candidate]) -> Candidate | None:
    """Return the champion by `RULE`, of equals the earliest; None if there is none.

    Args:
        candidates: The evaluated checkpoints in order, the run's first one first.
    """
    first, *others = candidates
    clean = [each for each in others if each.mean is not None and not each.alarms]
    best = max(clean, key=lambda each: each.mean or 0.0, default=None)
    if best is None or best.mean is None or (first.mean is not None and best.mean <= first.mean):
        return None
    return best


def latest_champion(run: Run) -> Champion | None:
    """Return the champion of the latest evaluated checkpoints; None if there is none.

    Of several evaluations, the one that compares most checkpoints counts.

    Raises:
        ConfigError: Two that compare as many have chosen different checkpoints.
    """
    wheres = CHAMPION.partitions_of(run.store, run.run_id)
    latest = max((where.epoch for where in wheres), default=0)
    found = [CHAMPION.require(run.store, where) for where in wheres if where.epoch == latest]
    most = max((each.facts["candidates"] for each in found), default=0)
    found = [each for each in found if each.facts["candidates"] == most]
    if len(epochs := {each.epoch for each in found}) > 1:
        raise ConfigError(
            f"evaluations of run {run.run_id!r} with other settings have chosen checkpoints "
            f"{', '.join(map(str, sorted(epochs)))} as the champion; name one with --epoch"
        )
    return found[0] if found else None


def champion_epoch(run: Run) -> int:
    """Return the champion's epoch.

    Raises:
        ConfigError: There is none, or see `latest_champion`.
    """
    champion = latest_champion(run)
    if champion is None:
        raise ConfigError(
            f"run {run.run_id!r} has no champion: no evaluated checkpoint that passed no limit is "
            f"better than the first one. `ddpo evaluate {run.run_id}` evaluates all that are kept; "
            "or name a checkpoint with --epoch"
        )
    return champion.epoch


def champion_text(run: Run) -> str:
    """Say which checkpoint is the champion, for people."""
    try:
        champion = latest_champion(run)
    except ConfigError as error:
        return str(error)
    if champion is None:
        return "champion: none; no evaluated checkpoint is better than the first one"
    return f"champion: checkpoint {champion.epoch}, the best evaluated one without an alarm"


def gate_reason(run: Run) -> str:
    """Say why the gate has ended training; empty if it has not, or training was continued since.

    Args:
        run: The run.
    """
    decisions = GATE_DECISION.partitions_of(run.store, run.run_id)
    if not decisions:
        return ""
    where = max(decisions, key=lambda where: where.epoch)
    last = max(where.epoch for where in CHECKPOINT.partitions_of(run.store, run.run_id))
    if last > where.epoch + 1:  # a checkpoint is evaluated beside the epoch after it
        return ""
    reasons = "; ".join(GATE_DECISION.require(run.store, where).reasons)
    return f"the gate ended training at checkpoint {where.epoch}: {reasons}"
