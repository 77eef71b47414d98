"""Sample an image with one of a run's checkpoints."""

from __future__ import annotations

from PIL import Image

from ddpo.diffusion.sampling import sample
from ddpo.diffusion.window import sampler_of_epoch
from ddpo.errors import ConfigError
from ddpo.models import Policy
from ddpo.runs.run import Run
from ddpo.store.checkpoints import find_checkpoint, latest_checkpoint, load_checkpoint
from ddpo.store.manifests import Ref


def draw(run: Run, prompt: str, *, seed: int, checkpoint: int | None = None) -> Image.Image:
    """Sample one RGB image with a run's sampler, using the EMA weights if the run has them.

    Args:
        run: The run.
        prompt: The prompt.
        seed: Seed of the noise, which equals the noise that plain diffusers draws from a
            ``torch.Generator`` with this seed.
        checkpoint: Number of epochs trained; by default the latest checkpoint.

    Raises:
        ConfigError: There is no such checkpoint.
        RetiredObject: Retention has deleted its weights.
    """
    policy_weights = load_checkpoint(run.store, _checkpoint(run, checkpoint)).shown_weights
    policy = Policy(run.config.model, run.config.trainable, run.numerics, seed=run.config.seed)
    policy.weights.load(policy_weights)
    sampler = sampler_of_epoch(policy, run.config, 0)
    return sample(policy, [prompt], [seed], sampler).images[0]


def _checkpoint(run: Run, epoch: int | None) -> Ref:
    latest = latest_checkpoint(run.store, run.run_id, run.first_epoch)
    if latest is None:
        raise ConfigError(f"run {run.run_id!r} has no checkpoint yet; start it with `ddpo resume`")
    if epoch is None:
        return latest[1]
    found = find_checkpoint(run.store, run.run_id, epoch)
    if found is None:
        known = f"{run.first_epoch} to {latest[0]}"
        raise ConfigError(f"run {run.run_id!r} has no checkpoint {epoch}; it has {known}")
    return found.ref
