"""The layouts of a run on so many devices, with why others cannot be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from megatron_rapo.config import Parallel, RunConfig
from megatron_rapo.errors import RapoError
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.planning.engine_cost import EngineSplit

_MOST_CONTEXT = 16
_CHUNKS = (None, 2, 4)  # of a stage
_BUDGETS = (1, 2, 4)  # times the longest sequence
_SHARES = (8, 6, 5, 4, 3, 2, 1)  # eighths of the devices that trainers get


@dataclass(frozen=True)
class TrainerLayout:
    """How a trainer is laid out, with the options that trade memory for time."""

    parallel: Parallel
    budget: int
    recompute: Literal["none", "full"]

    def __str__(self) -> str:
        one = self.parallel
        names = {"TP": one.tensor_parallel, "PP": one.pipeline_parallel, "CP": one.context_parallel}
        experts = {"EP": one.expert_parallel, "expert TP": one.expert_tensor_parallel}
        shown = " × ".join(f"{name} {size}" for name, size in {**names, "DP": one.data_parallel}.items())
        shown += "".join(f", {name} {size}" for name, size in experts.items() if size > 1)
        chunks = f", VPP {one.virtual_pipeline_parallel}" if one.virtual_pipeline_parallel else ""
        return f"{shown}{chunks}, {self.budget} tokens a microbatch, recompute {self.recompute}"


@dataclass(frozen=True)
class Division:
    """Which devices train and which sample; colocated: all do both, in turn."""

    trainer: int
    engines: int
    colocated: bool

    def __str__(self) -> str:
        if self.colocated:
            return f"{self.trainer} colocated"
        return f"{self.trainer} train, {self.engines} sample"


def divisions(devices: int, node: int, *, colocated: bool) -> Iterator[Division]:
    """Of so many devices: all between them where they are few, else eighths in whole nodes."""
    if colocated:
        yield Division(devices, devices, True)
    if devices <= node:
        counts = list(range(devices - 1, 0, -1))
    else:
        nodes = devices // node
        counts = sorted({node * max(1, nodes * share // 8) for share in _SHARES}, reverse=True)
    yield from (Division(count, devices - count, False) for count in counts if count < devices)


def trainer_layouts(
    config: RunConfig, architecture: Architecture, ranks: int, node: int
) -> Iterator[TrainerLayout | str]:
    """All layouts of so many ranks that divide; a string is why one does not."""
    seen: set[str] = set()
    for parallel in _divided(config, architecture, ranks, node):
        if isinstance(parallel, str):
            if parallel not in seen:
                yield parallel
            seen.add(parallel)
            continue
        for budget in _budgets(config, parallel):
            yield TrainerLayout(parallel, budget, "none")
            yield TrainerLayout(parallel, budget, "full")


def engine_splits(architecture: Architecture, devices: int, node: int, most: int) -> list[EngineSplit]:
    """Engines of 1, 2, 4… devices of a node that divide the model's heads and the devices."""
    sizes = (size for size in _powers(min(node, devices, most)) if architecture.heads % size == 0)
    return [EngineSplit(devices // size, size) for size in sizes if devices % size == 0]


def _divided(
    config: RunConfig, architecture: Architecture, ranks: int, node: int
) -> Iterator[Parallel | str]:
    for tensor in _powers(min(node, ranks)):
        for pipeline in _divisors(architecture.layers):
            for context in (1,) if config.algorithm.share_prompts else _powers(_MOST_CONTEXT):
                data, rest = divmod(ranks, tensor * pipeline * context)
                if rest or not data:
                    yield f"TP × PP × CP does not divide {ranks} ranks"
                    continue
                if data > config.rollout.prompts_per_step:
                    yield f"DP is above rollout.prompts_per_step = {config.rollout.prompts_per_step}"
                    continue
                for experts in _expert_layouts(architecture, tensor, context, data):
                    yield from _chunked(architecture, tensor, pipeline, context, data, experts)


def _expert_layouts(
    architecture: Architecture, tensor: int, context: int, data: int
) -> Iterator[dict[str, int]]:
    """Options of how a stage's ranks share experts: EP by powers of two, each expert whole or over TP."""
    if architecture.experts is None:
        yield {}
        return
    stage = tensor * context * data
    for of_matrices in sorted({1, tensor}):
        for size in _powers(architecture.experts.count):
            if stage % (size * of_matrices) == 0:
                yield {"expert_parallel": size, "expert_tensor_parallel": of_matrices}


def _chunked(
    architecture: Architecture, tensor: int, pipeline: int, context: int, data: int, experts: dict[str, int]
) -> Iterator[Parallel | str]:
    for chunks in _CHUNKS if pipeline > 1 else (None,):
        options: dict[str, Any] = {"virtual_pipeline_parallel": chunks} if chunks else {}
        options |= {"sequence_parallel": True} if tensor > 1 else {}
        options |= experts
        parallel = Parallel(
            tensor_parallel=tensor,
            pipeline_parallel=pipeline,
            context_parallel=context,
            data_parallel=data,
            **options,
        )
        try:
            architecture.check_layout(parallel)
        except RapoError as error:
            yield str(error).partition(";")[0]
        else:
            yield parallel


def _budgets(config: RunConfig, parallel: Parallel) -> list[int]:
    """Multiples of the longest sequence as this layout pads it, and what is configured."""
    multiple = config.model_copy(update={"parallel": parallel}).sequence_multiple
    longest = -(-config.longest_sequence // multiple) * multiple
    given = config.algorithm.max_tokens_per_microbatch
    return sorted({*(times * longest for times in _BUDGETS), *([given] if given >= longest else [])})


def _powers(most: int) -> list[int]:
    return [1 << power for power in range(most.bit_length()) if 1 << power <= most]


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]
