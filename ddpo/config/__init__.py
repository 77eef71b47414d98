"""What a run is: one YAML file, read into frozen models.

A config has two halves. Its *identity* (model, prompts, sampler, reward, algorithm, optimizer,
seed, numerics) makes a run what it is and may not change under a ``run_id``; its *operation*
(number of epochs, storage, tracking) may.
"""

from ddpo.config.compare import CompareConfig
from ddpo.config.engine import AnyEngine, LocalEngine, ProcessesEngine, RayEngine
from ddpo.config.evaluation import EvaluationConfig
from ddpo.config.fork import ForkConfig
from ddpo.config.gate import GateConfig
from ddpo.config.model import FullConfig, LoraConfig, ModelConfig, Trainable
from ddpo.config.numerics import NumericsConfig
from ddpo.config.operation import (
    Keep,
    PicturesConfig,
    RetentionConfig,
    StorageConfig,
    TrackingConfig,
)
from ddpo.config.plugins import NamedConfig, RewardConfig
from ddpo.config.preferences import PreferencesConfig
from ddpo.config.run import (
    OPERATION_FIELDS,
    OptimizerConfig,
    RolloutsConfig,
    RunConfig,
)
from ddpo.config.sampler import (
    SAMPLERS,
    AnySampler,
    DdimSampler,
    FlowSampler,
    OdeSampler,
    SamplerConfig,
    SolverSampler,
    WindowConfig,
)

__all__ = [
    "OPERATION_FIELDS",
    "SAMPLERS",
    "AnyEngine",
    "AnySampler",
    "CompareConfig",
    "DdimSampler",
    "EvaluationConfig",
    "FlowSampler",
    "ForkConfig",
    "FullConfig",
    "GateConfig",
    "Keep",
    "LocalEngine",
    "LoraConfig",
    "ModelConfig",
    "NamedConfig",
    "NumericsConfig",
    "OdeSampler",
    "OptimizerConfig",
    "PicturesConfig",
    "PreferencesConfig",
    "ProcessesEngine",
    "RayEngine",
    "RetentionConfig",
    "RewardConfig",
    "RolloutsConfig",
    "RunConfig",
    "SamplerConfig",
    "SolverSampler",
    "StorageConfig",
    "TrackingConfig",
    "Trainable",
    "WindowConfig",
]
