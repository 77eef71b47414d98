"""What a run may branch off: samples that are saved and kept, of its own sampler."""

from __future__ import annotations

from collections.abc import Iterator

from ddpo.config import ForkConfig, RunConfig
from ddpo.errors import ConfigError, PolicyMismatch, RetiredObject
from ddpo.runs.run import Run, open_run
from ddpo.store import keys
from ddpo.store.artefacts import RolloutShard
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT, EPOCH, ROLLOUTS
from ddpo.store.manifests import Ref
from ddpo.store.upkeep.retention import is_retired

_OTHER_SAMPLER = (
    "the saved rollouts of run {run_id!r} are of another sampler than this fork's: {differences}. "
    "Leave those settings as they are, or start a run of its own"
)


def saved_rollouts(run: Run, epoch: int) -> list[Ref[RolloutShard]]:
    """Return the manifests of a committed epoch's rollouts.

    Args:
        run: The run.
        epoch: The epoch.

    Returns:
        One a shard, in order.

    Raises:
        ConfigError: The epoch is not committed.
        RetiredObject: Retention deleted its samples.
    """
    rollouts = committed_rollouts(run, epoch)
    _check_kept(run, epoch, "samples")
    return rollouts


def committed_rollouts(run: Run, epoch: int) -> list[Ref[RolloutShard]]:
    """Return the manifests of a committed epoch's rollouts, whether or not they are retired.

    Args:
        run: The run.
        epoch: The epoch.

    Returns:
        One a shard, in order.

    Raises:
        ConfigError: The epoch is not committed.
    """
    commit = EPOCH.get(run.store, Partition(run.run_id, epoch))
    if commit is None:
        raise ConfigError(
            f"run {run.run_id!r} has not committed epoch {epoch}: there are no saved rollouts of it"
        )
    return list(commit.rollouts)


def epochs_before(run: Run, fork: ForkConfig) -> Iterator[tuple[Run, int]]:
    """Yield the epochs whose rewards a fork's prompt statistics are rebuilt from, the first first.

    Those whose updates are behind its checkpoint, back to where a run among them reset its own.

    Args:
        run: The fork, or any run of its store.
        fork: Where it branches off.

    Yields:
        The run that an epoch belongs to, and the epoch.
    """
    parent = open_run(run.store, fork.run_id)
    if parent.config.fork and parent.config.fork.statistics == "rebuild":
        yield from epochs_before(run, parent.config.fork)
    for epoch in range(parent.first_epoch, fork.epoch):
        yield parent, epoch


def rebuilds_statistics(config: RunConfig) -> bool:
    """Return whether a run begins with prompt statistics of the epochs that it branches off."""
    if config.fork is None or config.fork.statistics == "reset":
        return False
    return config.algorithm.has_prompt_statistics


def check_sampler(config: RunConfig, parent: Run) -> None:
    """Refuse rollouts that another sampler drew, as far as configs tell.

    What a model adds to it is in its digest. That leaves out where a window lies that is drawn for
    each epoch: the seed says it.

    Args:
        config: The fork's.
        parent: The run that it branches off.

    Raises:
        PolicyMismatch: Steps, eta, guidance, or the place of the noise are others.
    """
    mine, theirs = _sampling(config), _sampling(parent.config)
    said = [
        f"{name} is {value}, expected {theirs.get(name)}"
        for name, value in mine.items()
        if value != theirs.get(name)
    ]
    if said:
        raise PolicyMismatch(
            _OTHER_SAMPLER.format(run_id=parent.run_id, differences=", ".join(said))
        )
    window = config.sampler.window
    if window is None or not window.noise_only_there or window.position != "random":
        return
    if parent.config.seed != config.seed:
        raise PolicyMismatch(
            f"the saved rollouts of run {parent.run_id!r} have noise in windows that seed "
            f"{parent.config.seed} placed, and a fork with seed {config.seed} would train other "
            "steps, which were taken without noise. Leave the seed as it is, or start a run of "
            "its own"
        )


def _sampling(config: RunConfig) -> dict[str, object]:
    """Return the settings that are part of a sampler's digest whatever the model is."""
    sampler, window = config.sampler, config.sampler.window
    noisy = window is not None and window.noise_only_there
    return {
        **{f"sampler.{name}": value for name, value in sampler if name != "window"},
        "the window that noise is drawn in": window.model_dump() if window and noisy else "all",
    }


def check_policy(fork: ForkConfig, of_rollouts: dict[str, str], own: dict[str, str]) -> None:
    """Refuse rollouts of another base model or sampler than a fork's, by their digests.

    Args:
        fork: Where it branches off.
        of_rollouts: `sampler_digest` and `base_digest` of the checkpoint that drew the rollouts.
        own: The same of the fork's model, as loaded.

    Raises:
        PolicyMismatch: One is another, and the fork's config does not allow that.
    """
    name = "sampler_digest"
    if of_rollouts[name] != own[name]:
        said = (
            "something of its resolution, dtype, scheduler or noise window: "
            f"{name} {own[name]}, expected {of_rollouts[name]}"
        )
        raise PolicyMismatch(_OTHER_SAMPLER.format(run_id=fork.run_id, differences=said))
    name = "base_digest"
    if of_rollouts[name] != own[name] and not fork.off_policy:
        raise PolicyMismatch(
            f"the saved rollouts of run {fork.run_id!r} are of another base model than this "
            f"fork's: {name} {own[name]}, expected {of_rollouts[name]}. Leave the model as it is, "
            "or start a run of its own; another base model's rollouts are trained on with "
            "fork.off_policy: true"
        )


def check_kept(config: RunConfig, parent: Run) -> None:
    """Refuse a fork where retention deleted what it would begin with.

    Args:
        config: The fork's.
        parent: The run that it branches off.

    Raises:
        ConfigError: There is no such checkpoint; an epoch that it would adopt is not committed; or
            the samples are gone that its prompt statistics are to be rebuilt from.
        RetiredObject: The checkpoint, or an epoch that it would adopt, is gone.
    """
    fork = config.fork
    assert fork is not None
    where = Partition(parent.run_id, fork.epoch)
    if not CHECKPOINT.exists(parent.store, where):
        raise ConfigError(
            f"run {parent.run_id!r} has no checkpoint {fork.epoch}, which a fork at that epoch "
            "starts from; of a run that learns nothing, as a comparison's shared one, fork at "
            "epoch 0"
        )
    if is_retired(parent.store, parent.run_id, fork.epoch):
        record = keys.retired_key("checkpoints", parent.run_id, fork.epoch)
        raise RetiredObject(CHECKPOINT.key(where), parent.store.root, record)
    for epoch in range(fork.epoch, fork.epoch + fork.rollouts):
        saved_rollouts(parent, epoch)
        _check_kept(parent, epoch, "trajectories")
    if not rebuilds_statistics(config):
        return
    for run, epoch in epochs_before(parent, fork):
        try:
            saved_rollouts(run, epoch)
        except RetiredObject as error:
            raise ConfigError(
                f"a fork of {parent.run_id!r} at epoch {fork.epoch} rebuilds its prompt statistics "
                f"from the samples of the epochs before, and retention deleted those of epoch "
                f"{epoch} of {run.run_id!r}: start with none (--reset-statistics, or "
                "fork.statistics: reset)"
            ) from error


def check_on_policy(config: RunConfig, parent: Run) -> None:
    """Refuse an epoch that the other run itself adopted, off-policy, from a third one.

    Its samples are not of the checkpoint before it, which the fork would start from.

    Args:
        config: The fork's.
        parent: The run that it branches off.

    Raises:
        PolicyMismatch: Another policy drew them, and the fork's config does not allow that.
    """
    fork, theirs = config.fork, parent.config.fork
    assert fork is not None
    if fork.off_policy or theirs is None or not theirs.off_policy or not theirs.adopts(fork.epoch):
        return
    checkpoint = CHECKPOINT.require(parent.store, Partition(parent.run_id, fork.epoch))
    own = checkpoint.digests["policy_digest"]
    shard = ROLLOUTS.load(parent.store, saved_rollouts(parent, fork.epoch)[0])
    drawn = shard.samples()[0].policy_digest
    if drawn != own:
        raise PolicyMismatch(
            f"epoch {fork.epoch} of run {parent.run_id!r} was trained on rollouts that it took "
            f"over from {theirs.run_id!r}, off-policy: their policy_digest is {drawn}, expected "
            f"{own}. Fork at an epoch that it drew itself, or train on them all the same with "
            "fork.off_policy: true"
        )


def _check_kept(run: Run, epoch: int, part: keys.RetiredPart) -> None:
    record = keys.retired_key(part, run.run_id, epoch)
    if run.store.exists(record):
        raise RetiredObject(
            f"the {part} of epoch {epoch} of run {run.run_id!r}", run.store.root, record
        )
