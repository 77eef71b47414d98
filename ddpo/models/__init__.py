"""Model families, one file each: a text-to-image pipeline as a policy.

`base.py` says what a family has to provide. Nothing outside this room touches a diffusers pipeline
or scheduler. PyTorch and diffusers are imported once a model is loaded, not before: a stored run is
listed and a wrong config refused without them.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ddpo.config import FullConfig, LoraConfig, ModelConfig
from ddpo.errors import ModelError
from ddpo.models.numerics import Numerics, resolve_device

if TYPE_CHECKING:
    from ddpo.models.base import Policy, policy_digest
    from ddpo.models.conditioning import Conditioning
    from ddpo.models.facts import ModelFacts
    from ddpo.models.weights import WeightSet

FAMILIES: Mapping[str, str] = {
    "StableDiffusionPipeline": "ddpo.models.stable_diffusion:StableDiffusion",
    "StableDiffusionXLPipeline": "ddpo.models.stable_diffusion_xl:StableDiffusionXL",
    "StableDiffusion3Pipeline": "ddpo.models.stable_diffusion_3:StableDiffusion3",
    "FluxPipeline": "ddpo.models.flux:Flux",
    "Flux2KleinPipeline": "ddpo.models.flux_2:Flux2",
}
"""The registry: the family of a pipeline's class, as ``model_index.json`` names it."""

_HEAVY = {
    "Conditioning": "ddpo.models.conditioning",
    "ModelFacts": "ddpo.models.facts",
    "Policy": "ddpo.models.base",
    "WeightSet": "ddpo.models.weights",
    "policy_digest": "ddpo.models.base",
}


def __getattr__(name: str) -> Any:
    """Import what needs PyTorch when it is asked for."""
    if name not in _HEAVY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HEAVY[name]), name)


def check_family(config: ModelConfig) -> str:
    """Check that a model is there and of a supported family, which one small file says.

    Args:
        config: Path or Hub id.

    Returns:
        Where the family is, `module:class`.

    Raises:
        ModelError: The model is neither on disk nor reachable, or its family is not supported.
    """
    from ddpo.models import hub  # imports the Hub's client

    name = hub.find_model(config).pipeline_class
    if name not in FAMILIES:
        raise ModelError(
            f"model.path {config.path!r} is a {name}, which is not supported; expected a pipeline "
            f"of class {' or '.join(FAMILIES)}"
        )
    return FAMILIES[name]


def check_model(
    config: ModelConfig, trainable: LoraConfig | FullConfig | None = None
) -> ModelFacts:
    """Check that a model can be trained, without loading it.

    Its small JSON files and the headers of its weights decide; of a Hub model that is not
    downloaded, the names of its files do in place of the headers.

    Args:
        config: Path or Hub id.
        trainable: Weights to train; by default a LoRA on the layers that every model has.

    Returns:
        What the files say of the model.

    Raises:
        ConfigError: Size or trainable weights do not fit the model.
        ModelError: The model is neither on disk nor reachable, its family is not supported, it is
            of a kind that cannot be trained, or its files are incomplete or damaged.
    """
    from ddpo.models import hub

    family = family_of(config)
    files = hub.find_model(config, family.parts_of(config))
    return family.inspect(files, config, trainable or LoraConfig())


def load_policy(
    model: ModelConfig, trainable: LoraConfig | FullConfig, numerics: Numerics, *, seed: int
) -> Policy:
    """Load a model with trainable weights.

    Args:
        model: Path or Hub id, and the size of its images.
        trainable: Weights to train.
        numerics: Device, dtype, batch sizes; applied to the whole process.
        seed: The run's seed; initial weights of an adapter, or of a network from scratch, are
            derived from it.

    Returns:
        The policy: the base model as far as its output goes, since a fresh adapter adds nothing;
        from scratch, one with random weights.

    Raises:
        ConfigError: This machine lacks the device; or size or trainable weights do not fit the
            model.
        ModelError: The model cannot be downloaded or loaded, or its family is not supported.
    """
    resolve_device(numerics.device)  # before minutes of loading
    return family_of(model)(model, trainable, numerics, seed=seed)


def family_of(config: ModelConfig) -> type[Policy]:
    """Return the family of a model.

    Raises:
        ModelError: As `check_family`.
    """
    module, _, family = check_family(config).partition(":")
    return getattr(importlib.import_module(module), family)


__all__ = [
    "FAMILIES",
    "Conditioning",
    "ModelFacts",
    "Policy",
    "WeightSet",
    "check_family",
    "check_model",
    "family_of",
    "load_policy",
    "policy_digest",
]
