"""Who holds a tensor, against the groups that Megatron makes of a layout."""

from __future__ import annotations

import pytest
from megatron.core.parallel_state import RankGenerator

from megatron_rapo.config import Parallel
from megatron_rapo.weights.holders import Holders, expert_holders, holders, stage_of_layer

LAYOUTS = [(1, 1, 1, 1), (2, 1, 1, 1), (1, 2, 1, 3), (2, 2, 2, 3), (4, 3, 2, 1)]


@pytest.mark.parametrize(("tensor", "pipeline", "context", "data"), LAYOUTS)
def test_holders_are_the_tensor_parallel_groups_of_a_stage(
    tensor: int, pipeline: int, context: int, data: int
) -> None:
    layout = Parallel(
        tensor_parallel=tensor, pipeline_parallel=pipeline, context_parallel=context, data_parallel=data
    )
    made = RankGenerator(tp=tensor, ep=1, dp=data, pp=pipeline, cp=context, order="tp-cp-ep-dp-pp")
    stage = {rank: number for group in made.get_ranks("pp") for number, rank in enumerate(group)}
    for number in range(pipeline):
        expected = [tuple(group) for group in made.get_ranks("tp") if stage[group[0]] == number]
        found = holders(layout, number)
        assert list(found.copies) == sorted(expected)
        assert found.senders == found.copies[0] and found.collector == min(min(copy) for copy in expected)


@pytest.mark.parametrize(
    ("layout", "expert_tensor", "expert"),
    [((2, 1, 1, 2), 1, 2), ((2, 2, 2, 2), 2, 4), ((1, 2, 2, 2), 1, 4), ((2, 1, 1, 1), 2, 1)],
)
def test_holders_of_experts_are_what_megatron_spreads_them_over(
    layout: tuple[int, int, int, int], expert_tensor: int, expert: int
) -> None:
    tensor, pipeline, context, data = layout
    parallel = Parallel(
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        context_parallel=context,
        data_parallel=data,
        expert_parallel=expert,
        expert_tensor_parallel=expert_tensor,
    )
    copies = tensor * context * data // (expert * expert_tensor)
    made = RankGenerator(tp=expert_tensor, ep=expert, dp=copies, pp=pipeline, cp=1, order="tp-cp-ep-dp-pp")
    stage = {rank: number for group in made.get_ranks("pp") for number, rank in enumerate(group)}
    place = {rank: number for group in made.get_ranks("ep") for number, rank in enumerate(group)}
    experts = 3 * expert
    for number in range(pipeline):
        for one in range(experts):
            groups = [tuple(group) for group in made.get_ranks("tp")]
            mine = [g for g in groups if (stage[g[0]], place[g[0]]) == (number, one // 3)]
            assert list(expert_holders(parallel, number, experts, one).copies) == sorted(mine)


def test_a_rank_has_the_slice_of_its_place_in_its_copy() -> None:
    assert [Holders(((4, 5), (2, 3))).slice_of(rank) for rank in (2, 3, 4, 5)] == [0, 1, 0, 1]


def test_chunks_of_layers_go_to_the_stages_in_turn() -> None:
    plain, interleaved = (
        Parallel(pipeline_parallel=2, virtual_pipeline_parallel=turns) for turns in (None, 2)
    )
    assert [stage_of_layer(plain, 8, layer) for layer in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert [stage_of_layer(interleaved, 8, layer) for layer in range(8)] == [0, 0, 1, 1, 0, 0, 1, 1]
