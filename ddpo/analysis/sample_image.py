"""Sample an image with one of a run's checkpoints."""

from __future__ import annotations

from PIL import Image

from ddpo.diffusion.sampling import sample
from ddpo.diffusion.window import sampler_of_epoch
from ddpo.errors import ConfigError
from ddpo.models import load_policy
from ddpo.models.numerics import resolve_elsewhere
from ddpo.runs import Run
from ddpo.store.checkpoints import Checkpoint
from ddpo.store.keys import Partition
from ddpo.store.kinds import CHECKPOINT


def draw(
    run: Run,
    prompt: str,
    *,
    seed: int,
    checkpoint: int | None = None,
    device: str | None = None,
) -> Image.Image:
    """Sample one RGB image with a run's sampler, using the EMA weights if the run has them.

    Args:
        run: The run.
        prompt: The prompt.
        seed: Seed of the noise, which equals the noise that plain diffusers draws from a
            ``torch.Generator`` with this seed.
        checkpoint: Number of epochs trained; by default the latest checkpoint.
        device: Where to compute: `auto`, `cpu`, `cuda` or `mps`; by default where the run was
            trained. Another kind of device gives a slightly different image.

    Raises:
        ConfigError: There is no such checkpoint, or this machine has no such device.
        RetiredObject: Retention has deleted its weights.
    """
    numerics = resolve_elsewhere(run.numerics, device)
    state = _checkpoint(run, checkpoint).state()
    config = run.config
    policy = load_policy(config.model, config.trainable, numerics, seed=config.seed)
    policy.warn_of_cut([prompt])
    policy.weights.load(state.shown_weights)
    sampler = sampler_of_epoch(policy, run.config, 0)
    return sample(policy, [prompt], [seed], sampler, updates=state.updates).images[0]


def _checkpoint(run: Run, epoch: int | None) -> Checkpoint:
    committed = [where.epoch for where in CHECKPOINT.partitions_of(run.store, run.run_id)]
    if not committed:
        raise ConfigError(f"run {run.run_id!r} has no checkpoint yet; start it with `ddpo resume`")
    requested = committed[-1] if epoch is None else epoch
    checkpoint = CHECKPOINT.get(run.store, Partition(run.run_id, requested))
    if checkpoint is None:
        known = f"{committed[0]} to {committed[-1]}"
        raise ConfigError(f"run {run.run_id!r} has no checkpoint {epoch}; it has {known}")
    return checkpoint
