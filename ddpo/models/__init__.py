"""Model families, one file each: a text-to-image pipeline as a policy.

`base.py` says what a family has to provide. Nothing outside this room touches a diffusers pipeline
or scheduler.
"""

from __future__ import annotations

from collections.abc import Mapping

from ddpo.config import FullConfig, LoraConfig, ModelConfig
from ddpo.errors import ModelError
from ddpo.models import hub
from ddpo.models.base import Conditioning, Policy, policy_digest
from ddpo.models.numerics import Numerics, resolve_device
from ddpo.models.stable_diffusion import StableDiffusion
from ddpo.models.weights import WeightSet

FAMILIES: Mapping[str, type[Policy]] = {"StableDiffusionPipeline": StableDiffusion}
"""The registry: the family of a pipeline's class, as ``model_index.json`` names it."""


def check_model(config: ModelConfig) -> None:
    """Check that a model is there and of a supported family, without loading it.

    Args:
        config: Path or Hub id.

    Raises:
        ModelError: The model is neither on disk nor reachable, or its family is not supported.
    """
    _family(config)


def load_policy(
    model: ModelConfig, trainable: LoraConfig | FullConfig, numerics: Numerics, *, seed: int
) -> Policy:
    """Load a model with trainable weights.

    Args:
        model: Path or Hub id, and the size of its images.
        trainable: Weights to train.
        numerics: Device, dtype, batch sizes; applied to the whole process.
        seed: The run's seed; an adapter's initial weights are derived from it.

    Returns:
        The policy: the base model as far as its output goes, since a fresh adapter adds nothing.

    Raises:
        ConfigError: This machine lacks the device; or size or trainable weights do not fit the
            model.
        ModelError: The model cannot be downloaded or loaded, or its family is not supported.
    """
    resolve_device(numerics.device)  # before minutes of loading
    return _family(model)(model, trainable, numerics, seed=seed)


def _family(config: ModelConfig) -> type[Policy]:
    name = hub.pipeline_class(config)
    if name not in FAMILIES:
        raise ModelError(
            f"model.path {config.path!r} is a {name}, which is not supported; expected a pipeline "
            f"of class {' or '.join(FAMILIES)}"
        )
    return FAMILIES[name]


__all__ = [
    "FAMILIES",
    "Conditioning",
    "Policy",
    "WeightSet",
    "check_model",
    "load_policy",
    "policy_digest",
]
