"""Sample an image with one of a run's checkpoints."""

from __future__ import annotations

from PIL import Image

from ddpo.analysis.saved_checkpoint import saved_checkpoint
from ddpo.diffusion.sampling import sample
from ddpo.diffusion.window import sampler_of_epoch
from ddpo.models import load_policy
from ddpo.models.numerics import resolve_elsewhere
from ddpo.runs import Run


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
    state = saved_checkpoint(run, checkpoint)[1].state()
    config = run.config
    policy = load_policy(config.model, config.trainable, numerics, seed=config.seed)
    policy.warn_of_cut([prompt])
    policy.weights.load(state.shown_weights)
    sampler = sampler_of_epoch(policy, run.config, 0)
    return sample(policy, [prompt], [seed], sampler, updates=state.updates).images[0]
