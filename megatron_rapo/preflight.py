"""What can be checked of a run before anything is started, and the plan that `--dry-run` prints."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

from megatron_rapo.config import FileData, RunConfig
from megatron_rapo.config.write import to_toml
from megatron_rapo.errors import RapoError
from megatron_rapo.launch.slurm import describe
from megatron_rapo.model.architecture import Architecture, read_architecture
from megatron_rapo.model.build import DTYPES
from megatron_rapo.scaling.memory import estimate_memory
from megatron_rapo.weights.hf_check import check_tensors
from megatron_rapo.weights.hf_files import HFTensors
from megatron_rapo.weights.megatron_files import MegatronTensors
from megatron_rapo.weights.plan import make_plan
from megatron_rapo.weights.tensor_table import tensor_table


def check(config: RunConfig) -> Architecture:
    """Checks what needs no process: model, layout, data files, run directory.

    Raises:
        RapoError: the run could not work.
    """
    architecture = planned_architecture(config)
    for path in _model_paths(config):
        if not path.is_dir():
            raise RapoError(f"model directory {path} does not exist; download the model there")
        if read_architecture(path) != architecture:
            raise RapoError(
                f"model {path} is not of the architecture of {config.model.config or config.model.path}"
            )
        with HFTensors(path) as tensors:
            check_tensors(tensors, architecture)
    if config.model.checkpoint is not None:
        MegatronTensors(config.model.checkpoint, architecture)
    for data_path in _data_paths(config):
        if not data_path.is_file():
            raise RapoError(f"data file {data_path} does not exist; correct data.path or evaluate.data.path")
    _check_directory(config.run.directory)
    return architecture


def planned_architecture(config: RunConfig) -> Architecture:
    """The model's architecture (from `model.config` where that is given), checked against the layout."""
    architecture = read_architecture(config.model.config or config.model.path)
    architecture.check_layout(config.parallel)
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    if longest > architecture.max_positions:
        raise RapoError(
            f"rollout.max_prompt_tokens + rollout.max_response_tokens = {longest} exceeds the model's "
            f"max_position_embeddings = {architecture.max_positions}; lower one of them"
        )
    return architecture


def describe_plan(config: RunConfig) -> str:
    """The resolved configuration, the layout, the memory of a rank, and what is not on this machine yet."""
    architecture = planned_architecture(config)
    layout = config.parallel
    updates = config.run.steps * config.updates_per_step
    responses = config.rollout.prompts_per_step * config.rollout.responses_per_prompt
    missing = [path for path in [*_model_paths(config), *_data_paths(config)] if not path.exists()]
    lines = [
        to_toml(config),
        "# Layout",
        f"{layout.world_size} trainer ranks: TP {layout.tensor_parallel} × PP {layout.pipeline_parallel}"
        f" × CP {layout.context_parallel} × DP {layout.data_parallel}"
        + (f", VPP {layout.virtual_pipeline_parallel}" if layout.virtual_pipeline_parallel else "")
        + (", sequence parallel" if layout.sequence_parallel else ""),
        f"{architecture.family} of {architecture.parameters:,} parameters in {architecture.layers} layers",
        f"{responses} responses a step in {config.updates_per_step} updates; {updates} updates in all",
        "",
        "# Weights to the engines",
        *_weight_routes(config, architecture),
        "",
        "# Memory of a trainer rank (estimate, without the allocator's and NCCL's own)",
        *estimate_memory(config, architecture).lines(),
        "",
        *(["# SLURM job", *describe(config.slurm), ""] if config.slurm else []),
        *(f"not on this machine, so not checked: {path}" for path in missing),
    ]
    return "\n".join(lines)


def _weight_routes(config: RunConfig, architecture: Architecture) -> list[str]:
    """What each trainer rank sends; slices to the engine ranks under `shard`, else whole tensors."""
    dtype = DTYPES[config.model.dtype]
    if config.weights.transport == "shard":
        sizes = [config.rollout.engine_tensor_parallel] * config.rollout.engines
        plan = make_plan(architecture, config.parallel, sizes, config.model.vocabulary_multiple)
        return plan.describe(dtype.itemsize).splitlines()
    held: Counter[int] = Counter()
    for tensor in tensor_table(architecture, config.parallel):
        held[tensor.stage] += tensor.elements * dtype.itemsize
    return [
        f"stage {stage}: {nbytes / 2**20:,.1f} MiB, by {config.weights.transport}"
        for stage, nbytes in sorted(held.items())
    ]


def _model_paths(config: RunConfig) -> list[Path]:
    paths = [config.model.path]
    if config.model.reference_path is not None:
        paths.append(config.model.reference_path)
    return paths


def _data_paths(config: RunConfig) -> list[Path]:
    sources = [config.data, *config.evaluation_data]
    return list(dict.fromkeys(source.path for source in sources if isinstance(source, FileData)))


def _check_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RapoError(
            f"run.directory = {directory} cannot be made: {error.strerror}; choose another place"
        ) from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise RapoError(f"run.directory = {directory} is not writable; choose another place")
