"""Typed configuration: TOML in, validated and resolved options out."""

from megatron_rapo.config.adapter import Adapter
from megatron_rapo.config.cluster import Slurm
from megatron_rapo.config.data import (
    ArithmeticData,
    CountdownData,
    Data,
    FileData,
    FunctionData,
    MixtureData,
    ReasoningGymData,
)
from megatron_rapo.config.evaluation import Evaluate, Setting
from megatron_rapo.config.load import load_config, validate
from megatron_rapo.config.reward import Reward, RewardFunction
from megatron_rapo.config.running import Checkpoint, Observe, Run
from megatron_rapo.config.sampling import Rollout
from megatron_rapo.config.schema import RunConfig
from megatron_rapo.config.training import Model, Optimizer, Parallel, Teacher
from megatron_rapo.config.weights import Weights
from megatron_rapo.config.write import to_toml

__all__ = [
    "Adapter",
    "ArithmeticData",
    "Checkpoint",
    "CountdownData",
    "Data",
    "Evaluate",
    "FileData",
    "FunctionData",
    "MixtureData",
    "Model",
    "Observe",
    "Optimizer",
    "Parallel",
    "ReasoningGymData",
    "Reward",
    "RewardFunction",
    "Rollout",
    "Run",
    "RunConfig",
    "Setting",
    "Slurm",
    "Teacher",
    "Weights",
    "load_config",
    "to_toml",
    "validate",
]
