"""Frozen, validated configuration: no JAX, no defaults hidden elsewhere."""

from rdlm.config.errors import InputError, did_you_mean, one_line, require
from rdlm.config.json import differences, from_json, to_json
from rdlm.config.model import CachePolicy, ExitName, ModelConfig, Sampling, Speculative, check_threshold
from rdlm.config.paths import is_url, local_path
from rdlm.config.presets import PRESETS, preset
from rdlm.config.run import (
    IGNORED,
    AlarmConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    FaultsConfig,
    Gather,
    LossConfig,
    MeshConfig,
    OptimizerConfig,
    Packing,
    RecurrenceConfig,
    Remat,
    RunConfig,
    Scheme,
)

__all__ = [
    "IGNORED",
    "PRESETS",
    "AlarmConfig",
    "CachePolicy",
    "CheckpointConfig",
    "DataConfig",
    "EvaluationConfig",
    "ExitName",
    "FaultsConfig",
    "Gather",
    "InputError",
    "LossConfig",
    "MeshConfig",
    "ModelConfig",
    "OptimizerConfig",
    "Packing",
    "RecurrenceConfig",
    "Remat",
    "RunConfig",
    "Sampling",
    "Scheme",
    "Speculative",
    "check_threshold",
    "did_you_mean",
    "differences",
    "from_json",
    "is_url",
    "local_path",
    "one_line",
    "preset",
    "require",
    "to_json",
]
