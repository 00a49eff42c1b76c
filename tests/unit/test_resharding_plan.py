"""The resharding plan: every number that an engine needs comes exactly once, from a rank that has it."""

from __future__ import annotations

from collections import Counter, defaultdict

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rapo.config import Parallel
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.parameters import count_parameters
from megatron_rapo.model.rope import Rope
from megatron_rapo.weights.plan import make_plan
from megatron_rapo.weights.tensor_table import HFTensor, tensor_table

KV_HEADS, GROUP, DIM = 4, 2, 2  # so that TP 1, 2, 4 fit a trainer, and 8 an engine


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    family = draw(st.sampled_from(["qwen2", "qwen3", "llama", "olmo2", "glm4"]))
    return Architecture(
        family=family,
        layers=8,
        hidden=6,
        heads=KV_HEADS * GROUP,
        kv_heads=KV_HEADS,
        head_dim=DIM,
        feed_forward=16,
        vocabulary=draw(st.integers(1, 200)),
        norm_epsilon=1e-6,
        rope=Rope(1e4),
        max_positions=64,
        attention_bias=family == "qwen2",
        query_key_norm={"qwen3": "head", "olmo2": "heads"}.get(family),
        tied=draw(st.booleans()),
    )


@st.composite
def layouts(draw: st.DrawFn) -> Parallel:
    pipeline = draw(st.sampled_from([1, 2, 4]))
    return Parallel(
        tensor_parallel=draw(st.sampled_from([1, 2, 4])),
        pipeline_parallel=pipeline,
        virtual_pipeline_parallel=draw(st.sampled_from([None, 2])) if pipeline > 1 else None,
        context_parallel=draw(st.sampled_from([1, 2])),
        data_parallel=draw(st.integers(1, 3)),
    )


def engine_needs(name: str, size: int, rank: int, ranks: int) -> np.ndarray:
    """Which rows or columns an engine's rank holds, told number by number, as SGLang's layers do."""
    places = np.arange(size)
    if "embed_tokens" in name or "lm_head" in name:
        per_rank = -(-(-(-size // 64) * 64) // ranks)
        return places // per_rank == rank
    if "q_norm" in name or "k_norm" in name:
        return np.ones(size, bool)
    if "gate_up_proj" in name:
        return np.arange(size) % (size // 2) // (size // 2 // ranks) == rank
    if "k_proj" in name or "v_proj" in name:
        head = places // DIM
        copies = max(1, ranks // KV_HEADS)
        return head // max(1, KV_HEADS // ranks) == rank // copies
    return places // (size // ranks) == rank


def trainer_has(tensor: HFTensor, size: int, rank: int, layout: Parallel, multiple: int) -> np.ndarray:
    """Which rows or columns a global rank holds, from its coordinates."""
    ranks = layout.tensor_parallel
    if "embed_tokens" in tensor.name or "lm_head" in tensor.name:
        per_rank = -(-size // (multiple * ranks)) * multiple
    elif "gate_up_proj" in tensor.name:
        return np.arange(size) % (size // 2) // (size // 2 // ranks) == rank % ranks
    else:
        per_rank = size // ranks
    return np.arange(size) // per_rank == rank % ranks


def stage_of(name: str, layout: Parallel) -> int:
    """The pipeline stage of a tensor, from its name: chunks of layers go to the stages in turn."""
    if not name.startswith("model.layers."):
        return 0 if "embed_tokens" in name else layout.pipeline_parallel - 1
    chunks = np.split(np.arange(8), layout.pipeline_parallel * (layout.virtual_pipeline_parallel or 1))
    [chunk] = [number for number, chunk in enumerate(chunks) if int(name.split(".")[2]) in chunk]
    return chunk % layout.pipeline_parallel


@settings(max_examples=60, deadline=None)
@given(
    architecture=architectures(),
    layout=layouts(),
    engines=st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=3),
    multiple=st.sampled_from([1, 8]),
)
def test_every_byte_is_written_once_from_a_rank_that_has_it(
    architecture: Architecture, layout: Parallel, engines: list[int], multiple: int
) -> None:
    tensors = tensor_table(architecture, layout)
    written: dict[tuple[int, int, str], np.ndarray] = defaultdict(lambda: np.zeros(1))
    ranks_of_stage = layout.world_size // layout.pipeline_parallel
    for transfer in make_plan(architecture, layout, engines, multiple).transfers:
        tensor = transfer.tensor
        size = 1 if tensor.cut is None else tensor.shape[tensor.cut]
        places = np.zeros(size, int)
        places[transfer.part.start : transfer.part.stop] = 1
        assert places.sum() == len(transfer.part) > 0
        assert transfer.elements == places.sum() * (np.prod(tensor.shape) // size)
        assert transfer.source // ranks_of_stage == stage_of(tensor.name, layout)
        if tensor.cut is not None:
            held = trainer_has(tensor, size, transfer.source, layout, multiple)
            assert (places <= held).all(), transfer
        key = (transfer.engine, transfer.engine_rank, tensor.name)
        written[key] = written[key] + places
    for engine, ranks in enumerate(engines):
        for rank in range(ranks):
            for tensor in tensors:
                expected = (
                    np.ones(1)
                    if tensor.cut is None
                    else engine_needs(tensor.name, tensor.shape[tensor.cut], rank, ranks)
                )
                assert (written[engine, rank, tensor.name] == expected).all(), (engine, rank, tensor)


@settings(max_examples=20, deadline=None)
@given(architecture=architectures(), layout=layouts())
def test_the_model_is_whole_whatever_the_layout(architecture: Architecture, layout: Parallel) -> None:
    tensors = tensor_table(architecture, layout)
    assert sum(tensor.elements for tensor in tensors) == count_parameters(architecture)
    assert {t.name for t in tensors} == {t.name for t in tensor_table(architecture, Parallel())}


def test_engines_are_spread_over_the_replicas() -> None:
    architecture = Architecture(
        "qwen2",
        2,
        8,
        4,
        4,
        2,
        16,
        64,
        1e-6,
        Rope(1e4),
        64,
        attention_bias=True,
        query_key_norm=None,
        tied=False,
    )
    layout = Parallel(tensor_parallel=2, context_parallel=2, data_parallel=2)
    plan = make_plan(architecture, layout, [2] * 4)
    assert set(Counter(plan.elements_by_source())) == set(range(8))
    assert len(set(plan.elements_by_source().values())) == 1, "each rank sends its shard once"
    assert plan.describe(2).count("\n") + 1 == 8
