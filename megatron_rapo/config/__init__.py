"""Typed configuration: TOML in, validated and resolved options out."""

from megatron_rapo.config.load import load_config, validate
from megatron_rapo.config.schema import (
    Algorithm,
    ArithmeticData,
    Checkpoint,
    CountdownData,
    Data,
    Evaluate,
    FileData,
    Model,
    Observe,
    Optimizer,
    Parallel,
    Reward,
    Rollout,
    Run,
    RunConfig,
)

__all__ = [
    "Algorithm",
    "ArithmeticData",
    "Checkpoint",
    "CountdownData",
    "Data",
    "Evaluate",
    "FileData",
    "Model",
    "Observe",
    "Optimizer",
    "Parallel",
    "Reward",
    "Rollout",
    "Run",
    "RunConfig",
    "load_config",
    "validate",
]
