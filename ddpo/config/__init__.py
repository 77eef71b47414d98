"""What a run is: one YAML file, read into frozen models.

A config has two halves. Its *identity* (model, prompts, sampler, reward, algorithm, optimizer,
seed, numerics) makes a run what it is and may not change under a ``run_id``; its *operation*
(number of epochs, storage, tracking) may.
"""

from ddpo.config.algorithm import (
    Advantages,
    Algorithm,
    BatchAdvantages,
    DdpoIsConfig,
    DdpoSfConfig,
    LeaveOneOutAdvantages,
    PerPromptAdvantages,
    ValueAdvantages,
)
from ddpo.config.compare import CompareConfig
from ddpo.config.fork import ForkConfig
from ddpo.config.operation import (
    Keep,
    PicturesConfig,
    RetentionConfig,
    StorageConfig,
    TrackingConfig,
)
from ddpo.config.regression import Regression, RwrConfig, RwrSparseConfig
from ddpo.config.run import (
    OPERATION_FIELDS,
    FullConfig,
    LoraConfig,
    ModelConfig,
    NamedConfig,
    NumericsConfig,
    OptimizerConfig,
    RewardConfig,
    RolloutsConfig,
    RunConfig,
    SamplerConfig,
    Trainable,
    WindowConfig,
)

__all__ = [
    "OPERATION_FIELDS",
    "Advantages",
    "Algorithm",
    "BatchAdvantages",
    "CompareConfig",
    "DdpoIsConfig",
    "DdpoSfConfig",
    "ForkConfig",
    "FullConfig",
    "Keep",
    "LeaveOneOutAdvantages",
    "LoraConfig",
    "ModelConfig",
    "NamedConfig",
    "NumericsConfig",
    "OptimizerConfig",
    "PerPromptAdvantages",
    "PicturesConfig",
    "Regression",
    "RetentionConfig",
    "RewardConfig",
    "RolloutsConfig",
    "RunConfig",
    "RwrConfig",
    "RwrSparseConfig",
    "SamplerConfig",
    "StorageConfig",
    "TrackingConfig",
    "Trainable",
    "ValueAdvantages",
    "WindowConfig",
]
