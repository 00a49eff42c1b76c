"""What takes processes of a job: a layer of the trainer's model, and collectives between two of them."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from megatron_rapo.calibration.timing import fastest
from megatron_rapo.config import Model, Parallel
from megatron_rapo.data.batching import Microbatch
from megatron_rapo.launch.local import run_local
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.build import Body, build_chunks
from megatron_rapo.model.rope import Rope
from megatron_rapo.parallel.device import device
from megatron_rapo.parallel.placement import process_groups
from megatron_rapo.planning.profile import Link
from megatron_rapo.policy.pipeline import run_forward

# So narrow that arithmetic is nothing beside launches and Python.
_NARROW = Architecture(
    family="qwen2",
    layers=2,
    hidden=32,
    heads=2,
    kv_heads=2,
    head_dim=16,
    feed_forward=64,
    vocabulary=64,
    norm_epsilon=1e-6,
    rope=Rope(1e4),
    max_positions=64,
    attention_bias=True,
    query_key_norm=None,
    tied=True,
)
Dtype = Literal["bfloat16", "float32"]
_MORE_LAYERS = 8
_TOKENS = 16
_ELEMENTS = 4 << 20  # of four bytes
_TIMES = 20  # that a collective is repeated, by all ranks alike
_TIMEOUT_S = 120.0


def layer_and_link(dtype: Dtype, folder: Path) -> tuple[float, Link]:
    """Seconds of a layer's forward beside its arithmetic, and the link between two processes of this machine.

    Raises:
        RapoError: a process failed.
    """
    report = folder / "ranks.json"
    run_local(_measure, (dtype, report), 2, imports=["megatron_rapo.calibration.ranks"])
    layer_s, latency_s, bytes_per_s = json.loads(report.read_text())
    return layer_s, Link(latency_s=latency_s, bytes_per_s=bytes_per_s)


def _measure(dtype: Dtype, report: Path) -> None:
    layout = Parallel(data_parallel=2, timeout_s=_TIMEOUT_S)
    with process_groups(layout, seed=0) as placement:
        # One process has the machine for itself; the other waits.
        layer = _layer_s(dtype, layout) if dist.get_rank() == 0 else 0.0
        dist.barrier(placement.host_group)
        small = _all_reduce_s(1)
        large = _all_reduce_s(_ELEMENTS)
    if os.environ["RANK"] == "0":
        # Of two ranks an all-reduce is two messages, each of half of the bytes over a rank's link.
        report.write_text(json.dumps([layer, small / 2, 4 * _ELEMENTS / max(large - small, 1e-9)]))


def _layer_s(dtype: Dtype, layout: Parallel) -> float:
    few, many = (_forward_s(layers, dtype, layout) for layers in (_NARROW.layers, _MORE_LAYERS))
    return max(0.0, many - few) / (_MORE_LAYERS - _NARROW.layers)


def _forward_s(layers: int, dtype: Dtype, layout: Parallel) -> float:
    model = Model(path=Path("none"), dtype=dtype)
    chunks = build_chunks(replace(_NARROW, layers=layers), model, layout)
    _fill(chunks)
    microbatch = _microbatch()
    return fastest(lambda: run_forward(chunks, [microbatch], lambda _, hidden: hidden))


def _fill(chunks: list[Body]) -> None:
    with torch.no_grad():
        for parameter in (one for chunk in chunks for one in chunk.parameters()):
            parameter.fill_(0.01)


def _microbatch() -> Microbatch:
    """One sequence, of which the model sees tokens and positions alone."""
    numbers = torch.arange(_TOKENS, device=device())
    zeros = torch.zeros(_TOKENS, device=device())
    return Microbatch(
        token_ids=numbers,
        position_ids=numbers,
        targets=numbers,
        weights=zeros,
        phi=zeros,
        advantages=zeros,
        engine_log_probs=zeros,
        response_positions=numbers,
        sequences=torch.zeros_like(numbers),
        off_policy=zeros.bool(),
        marks={},
        lengths=[_TOKENS],
    )


def _all_reduce_s(elements: int) -> float:
    """The fastest of some, the same number on both ranks, which begin together."""
    values = torch.zeros(elements, device=device())
    times = []
    for _ in range(_TIMES):
        dist.barrier()
        start = time.perf_counter()
        dist.all_reduce(values)
        if values.is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)
