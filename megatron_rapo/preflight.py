"""What can be checked of a run before anything is started, and the plan that `--dry-run` prints."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from megatron_rapo import file_sums
from megatron_rapo.config import Adapter, Data, FileData, FunctionData, RunConfig
from megatron_rapo.config.write import to_toml
from megatron_rapo.data.load import Judge, load_training_prompts
from megatron_rapo.data.rows import Row
from megatron_rapo.data.sources import read_source
from megatron_rapo.data.tasks.problem import Split
from megatron_rapo.data.tokenizer import load_tokenizer, require_same_tokens, vocabulary_size
from megatron_rapo.environments.opening import needs_tokenizer, open_environment
from megatron_rapo.episode.problem import Problem
from megatron_rapo.errors import RapoError
from megatron_rapo.evaluation.held_out import load_held_out
from megatron_rapo.launch.environment import RankEnvironment
from megatron_rapo.launch.slurm import describe
from megatron_rapo.loss.trial import reported_names
from megatron_rapo.megatron_repairs.install import check_version
from megatron_rapo.methods.state import restore_state, saved_state
from megatron_rapo.model.adapter_rules import adapter_rules
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.dtypes import DTYPES
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.model.parameters import count_adapter_parameters, count_parameters
from megatron_rapo.observe.loggers import import_wandb
from megatron_rapo.record.replaying import check_recorded
from megatron_rapo.reward.golds import gold_judge
from megatron_rapo.reward.trial import Trial, try_rewards
from megatron_rapo.scaling.memory import GIB, MemoryEstimate, estimate_memory
from megatron_rapo.weights.adapter_files import open_checkpoint
from megatron_rapo.weights.hf_check import check_tensors
from megatron_rapo.weights.hf_files import HFTensors
from megatron_rapo.weights.megatron_files import find_checkpoint
from megatron_rapo.weights.plan import make_plan
from megatron_rapo.weights.tensor_table import tensor_table


def check(config: RunConfig) -> Architecture:
    """Checks what needs no process: model and weights, layout, data, software, run directory.

    Raises:
        RapoError: the run could not work.
    """
    check_version()
    architecture = planned_architecture(config)
    for path in _model_paths(config):
        if not path.is_dir():
            raise RapoError(f"model directory {path} does not exist; download the model there")
    _check_models(config, architecture)
    planned_teacher(config)
    check_method(config)
    open_environment(config)
    check_recorded(config)
    environment = RankEnvironment.read()
    if environment is None or environment.rank == 0:  # which starts the run's own servers, and logs
        for problem in _missing_here(config):
            raise RapoError(problem)
        for folder in _saved_weights(config):
            file_sums.check(folder, "model or checkpoint")
    for option, data in _data_tables(config):
        if isinstance(data, FileData) and not data.path.exists():
            raise RapoError(f"data file {data.path} does not exist; correct {option}.path")
    loaded = list(_load_data(config))
    if environment is None or environment.rank == 0:
        for trial in _try_rewards(config, loaded):
            if not trial.known:
                print(f"warning: {trial}", file=sys.stderr, flush=True)
    _check_directory(config.run.directory)
    return architecture


def planned_architecture(config: RunConfig) -> Architecture:
    """The model's architecture (of `model.config`, where given), checked against layout and lengths."""
    architecture = read_architecture(config.model.config or config.model.path)
    architecture.check_layout(config.parallel)
    architecture.check_experts(config.parallel, config.model, config.algorithm.routing_replay)
    architecture.check_lengths(config.rollout)
    if config.adapter is not None:
        list(adapter_rules(architecture, config.adapter))  # refuses targets that are not there
    _check_microbatch(config)
    _check_engines(config, architecture)
    return architecture


def planned_teacher(config: RunConfig) -> Architecture | None:
    """The teacher's architecture, checked against layout and lengths, its weights, and the policy's tokens.

    None where there is no teacher, or where it is not on this machine.
    """
    if config.teacher is None or not config.teacher.path.is_dir():
        return None
    path, checkpoint = config.teacher.path, config.teacher.checkpoint
    architecture = read_architecture(path)
    architecture.check_layout(config.parallel, "the teacher's")
    architecture.check_lengths(config.rollout, "the teacher's")
    if checkpoint is None:
        with HFTensors(path) as tensors:
            check_tensors(tensors, architecture)
    elif checkpoint.exists():
        open_checkpoint(checkpoint, architecture)
    if config.model.path.is_dir():
        policy, teacher = load_tokenizer(config.model.path), load_tokenizer(path)
        require_same_tokens(policy, teacher, architecture.vocabulary)
    return architecture


def describe_plan(config: RunConfig) -> str:
    """The resolved configuration, the layout, data, the memory of a rank, and what is not on this machine.

    Raises:
        RapoError: of what is on this machine, something could not work.
    """
    architecture = planned_architecture(config)
    _check_models(config, architecture)
    teacher = planned_teacher(config)
    check_method(config)
    if config.model.path.is_dir() or not needs_tokenizer(config):
        open_environment(config)
    layout = config.parallel
    updates = config.run.steps * config.updates_per_step
    what = "responses" if config.demonstrations is None else "given texts"
    data = list(_load_data(config, gold_judge(config)))
    rewards = list(map(str, _try_rewards(config, data)))
    memory = estimate_memory(config, architecture, teacher)
    missing = [path for path in [*_model_paths(config), *_data_paths(config)] if not path.exists()]
    lines = [
        to_toml(config),
        "# Layout",
        f"{layout.world_size} trainer ranks: TP {layout.tensor_parallel} × PP {layout.pipeline_parallel}"
        f" × CP {layout.context_parallel} × DP {layout.data_parallel}"
        + (f", EP {layout.expert_parallel}" if architecture.experts else "")
        + (f" × TP {layout.expert_tensor_parallel} of experts" if layout.expert_tensor_parallel > 1 else "")
        + (f", VPP {layout.virtual_pipeline_parallel}" if layout.virtual_pipeline_parallel else "")
        + (", sequence parallel" if layout.sequence_parallel else ""),
        f"{architecture.family} of {count_parameters(architecture):,} parameters in "
        f"{architecture.layers} layers",
        *([_described_adapter(config.adapter, architecture)] if config.adapter else []),
        *([_described_teacher(teacher)] if teacher else []),
        f"{config.responses_per_step} {what} a step in {config.updates_per_step} updates; "
        f"{updates} updates in all",
        "",
        *(["# Data", *(f"{one.table}: {one.report}" for one in data), ""] if data else []),
        *(["# Rewards", *rewards, ""] if rewards else []),
        "# Weights to the engines",
        *_weight_routes(config, architecture),
        "",
        "# Memory of a trainer rank (estimate, without the allocator's and NCCL's own)",
        *memory.lines(),
        *_too_much_memory(memory),
        "",
        *(["# SLURM job", *describe(config.slurm), ""] if config.slurm else []),
        *(f"not on this machine, so not checked: {path}" for path in missing),
        *(f"not on this machine: {problem}" for problem in _missing_here(config)),
    ]
    return "\n".join(lines)


def _described_adapter(adapter: Adapter, architecture: Architecture) -> str:
    trained = count_adapter_parameters(architecture, adapter)
    share = trained / count_parameters(architecture)
    return f"trained are adapters of rank {adapter.rank}: {trained:,} parameters, {share:.2%} of as many"


def _described_teacher(teacher: Architecture) -> str:
    return f"teacher: {teacher.family} of {count_parameters(teacher):,} parameters in {teacher.layers} layers"


def check_method(config: RunConfig) -> None:
    """That the method's terms work on a few tokens, and that its state comes back from a checkpoint.

    Raises:
        RapoError: one of them does not.
    """
    method = config.new_method()
    reported_names(method)
    restore_state(method, saved_state(method))


def _check_models(config: RunConfig, architecture: Architecture) -> None:
    """The weights of the architecture that are on this machine, by their headers."""
    for path in (config.model.path, config.model.reference_path):
        if path is None or not path.is_dir():
            continue
        if read_architecture(path) != architecture:
            raise RapoError(
                f"model {path} is not of the architecture of {config.model.config or config.model.path}"
            )
        with HFTensors(path) as tensors:
            check_tensors(tensors, architecture)
    if config.model.checkpoint is not None and config.model.checkpoint.exists():
        open_checkpoint(config.model.checkpoint, architecture)


def _check_microbatch(config: RunConfig) -> None:
    longest, multiple = config.longest_sequence, config.sequence_multiple
    padded = -(-longest // multiple) * multiple
    if padded > config.algorithm.max_tokens_per_microbatch:
        raise RapoError(
            f"algorithm.max_tokens_per_microbatch = {config.algorithm.max_tokens_per_microbatch} cannot "
            f"hold rollout.max_prompt_tokens + rollout.max_response_tokens = {longest} tokens "
            f"({padded} padded); raise it to {padded}"
        )


def _check_engines(config: RunConfig, architecture: Architecture) -> None:
    """That engines take the model's weights and compute what it does, and that a server's ranks can share its
    heads, as vLLM and SGLang want it.
    """
    engine = config.rollout.engine
    if architecture.experts is not None and config.opens_engines and not config.engine_kind.takes_experts:
        raise RapoError(
            f'rollout.engine.kind = "{engine.kind}" is not known to take new weights of experts, which a '
            f'{architecture.family} has; choose "sglang" or "embedded"'
        )
    hidden = config.engine_kind.hides_experts
    if config.algorithm.routing_replay == "engine" and hidden is not None:
        raise RapoError(
            'algorithm.routing_replay = "engine" needs the experts that engines choose, and '
            f'rollout.engine.kind = "{engine.kind}" {hidden}; choose "embedded", or routing_replay = "old"'
        )
    window, windows = architecture.window, config.engine_kind.windows
    if (
        window is not None
        and config.opens_engines
        and windows is not None
        and architecture.family not in windows
        and config.longest_sequence > window.size
    ):
        raise RapoError(
            f'rollout.engine.kind = "{engine.kind}" computes no windows of a {architecture.family}, whose '
            f"sliding_window = {window.size} is shorter than rollout.max_prompt_tokens + "
            f"rollout.max_response_tokens = {config.longest_sequence}; lower these, or choose another kind"
        )
    if not engine.urls and architecture.heads % engine.ranks:
        raise RapoError(
            f"rollout.engine.tensor_parallel = {engine.ranks} does not divide the model's "
            f"{architecture.heads} attention heads; choose a divisor"
        )


class _Loaded(NamedTuple):
    """A data set: the table that the user set, what became of its rows, and its first problem."""

    table: str
    report: str
    problem: Problem | None


def _load_data(config: RunConfig, judge: Judge | None = None) -> Iterator[_Loaded]:
    """Loads what the run trains on and is evaluated on, as far as it is on this machine.

    Without the model there is no tokenizer: of files and functions, columns alone are looked at then.
    """
    tables = _data_tables(config)
    number = len(config.training_sources)
    training, held_out = tables[:number], tables[number:]
    here = [(option, data) for option, data in tables if not isinstance(data, FileData) or data.path.exists()]
    if not config.model.path.is_dir():
        for option, data in here:
            if isinstance(data, FileData | FunctionData):
                split: Split = "test" if option.startswith("evaluate") else "train"
                given = config.demonstrations is not None and split == "train"
                answers, code = not given and config.needs_answers(data), config.run.code
                source, rows = read_source(data, option, split=split, needs_answers=answers, code=code)
                report = f"{source}: {len(rows)} rows, no tokenizer to count their tokens with"
                yield _Loaded(option, report, _problem(rows[0], data))
        return
    tokenizer = load_tokenizer(config.model.path)
    vocabulary_size(tokenizer, read_architecture(config.model.path).vocabulary)
    if all(table in here for table in training):
        prompts = load_training_prompts(config, tokenizer, judge)
        for (option, _), one in zip(training, prompts.sets, strict=True):
            yield _Loaded(option, str(one.report), one[0].problem)
    if all(table in here for table in held_out):
        sets = load_held_out(config, tokenizer, judge)
        for (option, _), loaded in zip(held_out, sets, strict=True):
            yield _Loaded(option, str(loaded.report), loaded.prompts[0].problem)


def _problem(row: Row, data: Data) -> Problem:
    return Problem(row.name or str(row.index), row.question, row.answer, data.name, columns=row.columns)


def _try_rewards(config: RunConfig, loaded: Sequence[_Loaded]) -> Iterator[Trial]:
    """Tries what rewards the data, on the problems that are here."""
    problems = {one.table: one.problem for one in loaded}
    tables = _data_tables(config)
    judged = tables if config.demonstrations is None else tables[len(config.training_sources) :]
    return try_rewards(config, [(table, data, problems.get(table)) for table, data in judged])


def _missing_here(config: RunConfig) -> Iterator[str]:
    """What the machine of rank 0 needs beside files, and this one lacks, each as an error tells it."""
    rollout = config.rollout
    if not rollout.engine.urls and config.opens_engines:
        yield from config.engine_kind.problems()
    yield from _without_host_memory(config)
    if config.observe.wandb != "off":
        try:
            import_wandb(config.observe.wandb)
        except RapoError as error:
            yield str(error)


def _without_host_memory(config: RunConfig) -> Iterator[str]:
    """Options that move tensors from GPU to host memory, where there is no GPU."""
    options = {
        "model.reference_in_host_memory": config.model.reference_in_host_memory,
        "teacher.in_host_memory": config.teacher is not None and config.teacher.in_host_memory,
        "optimizer.in_host_memory_during_rollouts": config.optimizer.in_host_memory_during_rollouts,
    }
    for option, chosen in options.items():
        if chosen and not torch.cuda.is_available():
            yield f"{option} = true needs a GPU, and torch sees none: all is in host memory; remove it"


def _too_much_memory(memory: MemoryEstimate) -> list[str]:
    """A line if a rank alone has no room on this machine."""
    if torch.cuda.is_available():
        room, what = torch.cuda.get_device_properties(0).total_memory, "GPU"
    else:
        room, what = psutil.virtual_memory().total, "memory (it has no GPU)"
    if memory.total <= room:
        return []
    return [f"too much for this machine: {room / GIB:,.2f} GiB of {what}"]


def _weight_routes(config: RunConfig, architecture: Architecture) -> list[str]:
    """What each trainer rank sends; slices to the engine ranks under `shard`, else whole tensors."""
    dtype = DTYPES[config.model.dtype]
    if config.rollout.replay is not None:
        return [f"none: {config.rollout.replay} has the samples"]
    if not config.opens_engines:
        return ["none: texts are given, and nothing is sampled"]
    if config.weights.transport == "shard":
        sizes = [config.rollout.engine.ranks] * config.rollout.engine.count
        plan = make_plan(architecture, config.parallel, sizes, config.model.vocabulary_multiple)
        return plan.describe(dtype.itemsize).splitlines()
    held: Counter[int] = Counter()
    for tensor in tensor_table(architecture, config.parallel):
        held[tensor.holders.collector] += tensor.elements * dtype.itemsize
    return [
        f"trainer rank {rank}: {nbytes / 2**20:,.1f} MiB, by {config.weights.transport}"
        for rank, nbytes in sorted(held.items())
    ]


def _model_paths(config: RunConfig) -> list[Path]:
    teacher = None if config.teacher is None else config.teacher.path
    return [path for path in (config.model.path, config.model.reference_path, teacher) if path is not None]


def _saved_weights(config: RunConfig) -> Iterator[Path]:
    """Folders on this machine of weights that the run begins with."""
    teacher = None if config.teacher is None else config.teacher.checkpoint
    yield from _model_paths(config)
    for checkpoint in (config.model.checkpoint, teacher):
        if checkpoint is not None and checkpoint.exists():
            yield find_checkpoint(checkpoint)


def _data_tables(config: RunConfig) -> list[tuple[str, Data]]:
    """The training data's table, as the user calls it, and those of the evaluation."""
    held_out = zip(config.evaluation_tables, config.evaluation_data, strict=True)
    return [*zip(config.training_tables, config.training_sources, strict=True), *held_out]


def _data_paths(config: RunConfig) -> list[Path]:
    return list(dict.fromkeys(data.path for _, data in _data_tables(config) if isinstance(data, FileData)))


def _check_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RapoError(
            f"run.directory = {directory} cannot be made: {error.strerror}; choose another place"
        ) from error
    if not os.access(directory, os.W_OK | os.X_OK):
        raise RapoError(f"run.directory = {directory} is not writable; choose another place")
