"""Check that what a fork inherits still exists and comes from its sampler and base model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ddpo.config import RunConfig
from ddpo.errors import ConfigError, PolicyMismatch, RetiredObject
from ddpo.runs.run import Fork, Run
from ddpo.store import keys
from ddpo.store.artefacts import RolloutShard
from ddpo.store.checkpoints import Checkpoint
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT, EPOCH, ROLLOUTS
from ddpo.store.manifests import Ref
from ddpo.store.upkeep.retention import is_retired

if TYPE_CHECKING:
    from ddpo.models import Policy

_OTHER_SAMPLER = (
    "the saved rollouts of run {run_id!r} come from another sampler than this fork's: "
    "{differences}. Keep those settings as they are, or start a new run"
)
_NO_CHECKPOINT = (
    "run {run_id!r} has no checkpoint {epoch}, which a fork at that epoch would start from; a run "
    "without training, such as the shared run of a comparison, can only be forked at epoch 0"
)


def check_fork(fork: Fork) -> None:
    """Check everything that a new fork needs of its parent, except what only its model can tell.

    Args:
        fork: The fork.

    Raises:
        RunNotFound: The store has no such parent.
        ConfigError: Its config does not fit the saved samples; or as `check_kept`.
        RetiredObject: As `check_kept`.
        PolicyMismatch: The samples come from another sampler, or from another policy.
    """
    _check_unchanged(fork)
    check_sampler(fork)
    check_kept(fork)
    check_on_policy(fork)


def saved_rollouts(run: Run, epoch: int) -> list[Ref[RolloutShard]]:
    """Return the rollouts of a committed epoch, one reference per shard, in order.

    Args:
        run: The run.
        epoch: The epoch.

    Raises:
        ConfigError: The epoch is not committed.
        RetiredObject: Retention deleted its samples.
    """
    rollouts = committed_rollouts(run, epoch)
    _check_kept(run, epoch, "samples")
    return rollouts


def committed_rollouts(run: Run, epoch: int) -> list[Ref[RolloutShard]]:
    """Return the rollouts of a committed epoch, whether or not they are retired.

    Args:
        run: The run.
        epoch: The epoch.

    Raises:
        ConfigError: The epoch is not committed.
    """
    commit = EPOCH.get(run.store, Partition(run.run_id, epoch))
    if commit is None:
        raise ConfigError(
            f"run {run.run_id!r} has not committed epoch {epoch}, so there are no saved rollouts "
            "of it"
        )
    return list(commit.rollouts)


def check_kept(fork: Fork) -> None:
    """Refuse a fork if retention has deleted anything that it would inherit.

    Args:
        fork: The fork.

    Raises:
        ConfigError: The parent has no such checkpoint, or has not committed an inherited epoch; or
            samples are deleted that the prompt statistics would be rebuilt from.
        RetiredObject: The checkpoint or an inherited epoch is deleted.
    """
    store, parent_id, epoch = fork.store, fork.parent_id, fork.epoch
    where = Partition(parent_id, epoch)
    for inherited in fork.inherited_epochs:
        committed_rollouts(fork.parent, inherited)
    if not CHECKPOINT.exists(store, where):
        raise ConfigError(_NO_CHECKPOINT.format(run_id=parent_id, epoch=epoch))
    if is_retired(store, parent_id, epoch):
        record = keys.retired_key("checkpoints", parent_id, epoch)
        raise RetiredObject(CHECKPOINT.key(where), store.root, record)
    for inherited in fork.inherited_epochs:
        saved_rollouts(fork.parent, inherited)
        _check_kept(fork.parent, inherited, "trajectories")
    if not fork.rebuilds_statistics:
        return
    for run, before in fork.epochs_before():
        try:
            saved_rollouts(run, before)
        except RetiredObject as error:
            raise ConfigError(
                f"a fork of {parent_id!r} at epoch {epoch} rebuilds its prompt statistics from the "
                f"samples of all epochs before, but retention deleted those of epoch {before} of "
                f"{run.run_id!r}: start without statistics (--reset-statistics, or "
                "fork.statistics: reset)"
            ) from error


def check_sampler(fork: Fork) -> None:
    """Refuse to inherit rollouts of another sampler, as far as the configs show.

    What the model contributes is covered by the sampler's digest. The digest does not cover where
    the window of each epoch lies: that depends on the seed.

    Args:
        fork: The fork.

    Raises:
        PolicyMismatch: Steps, eta, guidance, or the position of the noise differ.
    """
    if not fork.inherited_epochs:
        return
    parent = fork.parent
    expected = _sampling(parent.config)
    differences = [
        f"{name} is {value}, expected {expected.get(name)}"
        for name, value in _sampling(fork.config).items()
        if value != expected.get(name)
    ]
    if differences:
        raise PolicyMismatch(
            _OTHER_SAMPLER.format(run_id=parent.run_id, differences=", ".join(differences))
        )
    window, seed = fork.config.sampler.window, fork.config.seed
    if window is None or not window.noise_only_there or window.position != "random":
        return
    if parent.config.seed != seed:
        raise PolicyMismatch(
            f"the saved rollouts of run {parent.run_id!r} have noise in windows placed by seed "
            f"{parent.config.seed}, but a fork with seed {seed} would train other steps, which "
            "were taken without noise. Keep the seed, or start a new run"
        )


def _sampling(config: RunConfig) -> dict[str, object]:
    """Return the settings that determine a sampler's digest, apart from the model."""
    sampler, window = config.sampler, config.sampler.window
    noisy = window is not None and window.noise_only_there
    return {
        **{f"sampler.{name}": value for name, value in sampler if name != "window"},
        "the window with noise": window.model_dump() if window and noisy else "all",
    }


def check_policy(fork: Fork, policy: Policy) -> None:
    """Refuse to inherit from another base model, or rollouts of another sampler, by their digests.

    Args:
        fork: The fork.
        policy: The fork's model, as loaded.

    Raises:
        ConfigError: The parent has no such checkpoint.
        PolicyMismatch: A digest differs, and the fork's config does not allow it.
    """
    from ddpo.diffusion.sampling import sampler_digest  # imports torch

    expected = CHECKPOINT.load(fork.store, parent_checkpoint(fork)).digests
    found = sampler_digest(policy, fork.config.sampler)
    if fork.inherited_epochs and found != expected["sampler_digest"]:
        differences = (
            f"{_visible_differences(fork, policy)}: sampler_digest {found}, expected "
            f"{expected['sampler_digest']}"
        )
        raise PolicyMismatch(_OTHER_SAMPLER.format(run_id=fork.parent_id, differences=differences))
    if policy.base_digest != expected["base_digest"] and not fork.settings.off_policy:
        raise PolicyMismatch(
            f"the checkpoint and saved rollouts of run {fork.parent_id!r} come from another base "
            f"model than this fork's: base_digest {policy.base_digest}, expected "
            f"{expected['base_digest']}. Keep the model, or start a new run; fork.off_policy: true "
            "trains on rollouts of another base model"
        )


def parent_checkpoint(fork: Fork) -> Ref[Checkpoint]:
    """Return the parent's checkpoint that a fork starts from.

    Raises:
        ConfigError: The parent has no such checkpoint.
    """
    found = CHECKPOINT.find(fork.store, Partition(fork.parent_id, fork.epoch))
    if found is None:
        raise ConfigError(_NO_CHECKPOINT.format(run_id=fork.parent_id, epoch=fork.epoch))
    return found


def _visible_differences(fork: Fork, policy: Policy) -> str:
    """Say what makes a sampler another one, as far as the configs of both runs show it."""
    parent, dtype = fork.parent, policy.numerics.dtype
    if dtype != parent.numerics.dtype:
        return f"numerics.dtype is {dtype}, expected {parent.numerics.dtype}"
    if fork.config.model.resolution != parent.config.model.resolution:
        own = parent.config.model.resolution or "the model's own"
        return f"model.resolution is {'x'.join(map(str, policy.size))}, expected {own}"
    return "its model's scheduler or size differs"


def check_on_policy(fork: Fork) -> None:
    """Refuse an epoch whose samples are not those of the weights that the fork would sample with.

    Either the parent itself inherited it off-policy, so that they are not from the checkpoint that
    the fork would start from; or only one of both runs samples ahead; or only one of both
    algorithms samples with old weights.

    Args:
        fork: The fork.

    Raises:
        PolicyMismatch: The samples come from another policy, and the config does not allow it.
    """
    parent, epoch = fork.parent, fork.epoch
    if fork.settings.off_policy or epoch not in fork.inherited_epochs:
        return
    if parent.pairs_digest(epoch):
        return
    own = fork.config.algorithm.needs.samples_from
    theirs = parent.config.algorithm.needs.samples_from
    inherited = parent.fork if parent.fork and parent.fork.is_off_policy(epoch) else None
    drawn_by = fork.drawn_by(epoch)
    if inherited is None and own == theirs and drawn_by == parent.drawn_by(epoch):
        return
    expected = CHECKPOINT.require(parent.store, drawn_by).policy_digest(own)
    shard = ROLLOUTS.load(parent.store, saved_rollouts(parent, epoch)[0])
    sampled = shard.samples()[0].policy_digest
    if sampled == expected:
        return
    if inherited is None and own == theirs:
        raise PolicyMismatch(
            f"epoch {epoch} of run {parent.run_id!r} was sampled by checkpoint "
            f"{parent.drawn_by(epoch).epoch}, and this fork trains on samples of checkpoint "
            f"{drawn_by.epoch}, because rollouts.sample_ahead differs: their policy_digest is "
            f"{sampled}, expected {expected}. Train on them anyway with fork.off_policy: true, or "
            "sample anew with fork.rollouts: 0"
        )
    if inherited is None:
        raise PolicyMismatch(
            f"epoch {epoch} of run {parent.run_id!r} was sampled with its {theirs} weights, as "
            f"{parent.config.algorithm.type} does, but {fork.config.algorithm.type} samples with "
            f"the {own} ones: their policy_digest is {sampled}, expected {expected}. Train on them "
            "anyway with fork.off_policy: true, or sample anew with fork.rollouts: 0"
        )
    raise PolicyMismatch(
        f"epoch {epoch} of run {parent.run_id!r} was trained off-policy on rollouts inherited from "
        f"{inherited.parent_id!r}: their policy_digest is {sampled}, expected {expected}. Fork at "
        "an epoch that the run sampled itself, or train on them anyway with fork.off_policy: true"
    )


def _check_unchanged(fork: Fork) -> None:
    """Refuse settings that the checkpoint or the saved samples cannot be trained with."""
    own, theirs = fork.config, fork.parent.config
    problems: list[str] = []
    if own.trainable != theirs.trainable:
        problems.append(f"trainable is {own.trainable}, but the checkpoint has {theirs.trainable}")
    if own.optimizer.eight_bit != theirs.optimizer.eight_bit and fork.epoch > 0:
        there = f"{8 if theirs.optimizer.eight_bit else 32} bits"
        problems.append(
            f"optimizer.eight_bit is {str(own.optimizer.eight_bit).lower()}, but the checkpoint's "
            f"moments have {there}"
        )
    if fork.inherited_epochs:
        problems += _changes_of_samples(own, theirs)
    if problems:
        raise ConfigError(f"a fork of {fork.parent_id} cannot start: {'; '.join(problems)}")


def _changes_of_samples(own: RunConfig, theirs: RunConfig) -> list[str]:
    """List what the saved samples of another config cannot be trained with."""
    names = ("samples_per_epoch", "samples_per_prompt", "shard_size")
    compared = [(n, getattr(own.rollouts, n), getattr(theirs.rollouts, n)) for n in names]
    changes = [
        f"rollouts.{name} is {value}, but the saved samples have {expected}"
        for name, value, expected in compared
        if value != expected
    ]
    if (theirs.stored_trajectories, own.stored_trajectories) == ("final", "full"):
        changes.append(
            f"{own.algorithm.type} trains on all steps, but {theirs.algorithm.type} saved only the "
            "final latents. Start a new run"
        )
    return changes


def _check_kept(run: Run, epoch: int, part: keys.RetiredPart) -> None:
    record = keys.retired_key(part, run.run_id, epoch)
    if run.store.exists(record):
        raise RetiredObject(
            f"the {part} of epoch {epoch} of run {run.run_id!r}", run.store.root, record
        )
