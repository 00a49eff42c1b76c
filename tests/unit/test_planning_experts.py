"""Plans of mixtures of experts: layouts beside an enumeration, memory and seconds beside sums by hand."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from megatron_rapo.config import Parallel, load_config
from megatron_rapo.errors import RapoError
from megatron_rapo.model.architecture import Architecture, Experts
from megatron_rapo.model.rope import Rope
from megatron_rapo.planning.engine_cost import EngineSplit
from megatron_rapo.planning.layouts import TrainerLayout, trainer_layouts
from megatron_rapo.planning.overlay import overlay
from megatron_rapo.planning.plan import Planner
from megatron_rapo.planning.profile import Link, Profile, all_reduce_s, all_to_all_s, read_profile
from megatron_rapo.planning.trainer_cost import TrainerCost, TrainerModel
from megatron_rapo.planning.workload import workload_of
from tests.unit.test_planning import EXAMPLE, LOAD, RATE, config, engines, profile

# Qwen3-30B-A3B.
MIXTURE = Architecture(
    family="qwen3_moe",
    layers=48,
    hidden=2048,
    heads=32,
    kv_heads=4,
    head_dim=128,
    feed_forward=768,
    vocabulary=151_936,
    norm_epsilon=1e-6,
    rope=Rope(1e6),
    max_positions=40_960,
    attention_bias=False,
    query_key_norm="head",
    tied=False,
    experts=Experts(count=128, chosen=8, renormalised=True),
)
ATTENTION = 2048 * (32 + 4 + 4) * 128 + 32 * 128 * 2048 + 2 * 128 + 2 * 2048  # and norms
EXPERTS = 128 * 3 * 2048 * 768
ROUTER = 128 * 2048
TABLES = 2 * 151_936 * 2048 + 2048
SGLANG = config(
    rollout={
        "prompts_per_step": 64,
        "max_prompt_tokens": 1024,
        "max_response_tokens": 3072,
        "engine": {"kind": "sglang"},
    }
)


def cost(device: Profile, *, model: Architecture = MIXTURE, budget: int = 4000, **layout: Any) -> TrainerCost:
    sharded = {"sequence_parallel": True} if layout.get("tensor_parallel", 1) > 1 else {}
    trainer = TrainerModel(model, LOAD, device, 2)
    chosen = Parallel(**layout, **sharded)
    return trainer.cost(chosen, budget, recompute=False, distributed=True, overlap=False)


def test_layouts_are_those_of_an_enumeration() -> None:
    """Of 16 ranks in nodes of 8, and a model of 4 layers, 4 key-value heads and 8 experts of 96 channels."""
    small = replace(
        MIXTURE, layers=4, heads=8, feed_forward=96, experts=Experts(count=8, chosen=2, renormalised=True)
    )
    expected = set()
    sizes = (1, 2, 4, 8, 16)
    for tp, pp, cp, dp, ep, etp in itertools.product(*[sizes] * 6):
        fits = tp * pp * cp * dp == 16 and tp <= 8
        model = 4 % tp == 0 and 4 % pp == 0 and 8 % ep == 0 and 96 % etp == 0
        experts = (tp * cp * dp) % (ep * etp) == 0 and etp in (1, tp)
        if fits and model and experts:
            chunks = [vpp for vpp in (2, 4) if pp > 1 and 4 % (pp * vpp) == 0]
            expected |= {(tp, pp, cp, dp, ep, etp, vpp) for vpp in [None, *chunks]}
    chosen = config(rollout={"prompts_per_step": 64, "max_prompt_tokens": 64, "max_response_tokens": 64})
    found = set()
    for one in trainer_layouts(chosen, small, 16, 8):
        if not isinstance(one, str):
            p = one.parallel
            found.add(
                (
                    *(p.tensor_parallel, p.pipeline_parallel, p.context_parallel, p.data_parallel),
                    *(p.expert_parallel, p.expert_tensor_parallel, p.virtual_pipeline_parallel),
                )
            )
            assert p.sequence_parallel == (p.tensor_parallel > 1)
    assert found == expected
    assert {one[4] for one in found} == {1, 2, 4, 8}


@pytest.mark.parametrize(("ep", "etp", "copies"), [(1, 1, 8), (8, 1, 1), (4, 2, 1), (2, 2, 2)])
def test_a_rank_holds_its_part_of_the_experts(ep: int, etp: int, copies: int) -> None:
    """Gradients, optimizer states and weights by the parameters of a rank of TP 2 × DP 4."""
    layout = Parallel(
        tensor_parallel=2,
        data_parallel=4,
        sequence_parallel=True,
        expert_parallel=ep,
        expert_tensor_parallel=etp,
    )
    mine = Planner(SGLANG, MIXTURE, workload_of(SGLANG), read_profile("h100"))
    memory = mine.trainer_memory.estimate(TrainerLayout(layout, 4096, "full"))
    of_experts = 48 * EXPERTS // (ep * etp)
    others = (48 * (ATTENTION + ROUTER) + TABLES) / 2
    assert memory.weights == pytest.approx(2 * (of_experts + others), rel=1e-3)
    assert memory.gradients == pytest.approx(4 * (of_experts + others), rel=1e-3)
    assert memory.optimizer == pytest.approx(12 * (of_experts / copies + others / 4), rel=1e-3)


def test_experts_that_share_matrices_keep_the_inputs_of_all_of_them() -> None:
    mine = Planner(SGLANG, MIXTURE, workload_of(SGLANG), read_profile("h100"))

    def kept(etp: int) -> int:
        layout = Parallel(
            tensor_parallel=4, data_parallel=2, sequence_parallel=True, expert_tensor_parallel=etp
        )
        return mine.trainer_memory.estimate(TrainerLayout(layout, 4096, "none")).activations

    assert kept(4) - kept(1) == pytest.approx(48 * 4096 / 4 * 8 * 3 * 2048 * 2, rel=1e-6)


def test_experts_compute_what_tokens_choose_however_they_are_divided() -> None:
    """16 microbatches of 4,000 tokens, forward and backward: 8 of 128 experts, attention and the router."""
    whole = cost(profile())
    products = 2 * 4000 * 48 * (8 * 3 * 2048 * 768 + ATTENTION - 2 * 128 - 2 * 2048 + ROUTER)
    # The router counts as its columns' worth of hidden rows (`scaling/flops.py`).
    attention = 48 * 2 * 2 * 32 * 128 * 4000 * 1000
    head = 2 * 4000 * 2048 * 151_936
    assert whole.update == pytest.approx(16 * 3 * (products + attention + head) / RATE, rel=1e-3)
    for options in ({"expert_parallel": 8}, {"expert_parallel": 4}):
        divided = cost(profile(), data_parallel=8, **options)
        assert divided.update == pytest.approx(whole.update / 8, rel=1e-6)


def test_tokens_cross_to_their_experts_and_back() -> None:
    link = Link(latency_s=1e-4, bytes_per_s=1e11)
    slow = profile(within_node={"latency_s": 1e-4, "bytes_per_s": 1e11})
    none = cost(slow, data_parallel=8).communication
    crossed = cost(slow, data_parallel=8, expert_parallel=8).communication
    nbytes = 4000 * 8 * 2048 * 2
    each = 1e-4 + 7 / 8 * nbytes / 1e11
    assert all_to_all_s(link, 8, nbytes) == pytest.approx(each)
    assert all_to_all_s(link, 1, nbytes) == 0
    # Two microbatches a replica, a forward and a backward; and experts' gradients are not reduced over 8.
    parameters = 48 * EXPERTS
    reduced = all_reduce_s(link, 8, 4 * parameters) / 2 + all_reduce_s(link, 8, 2 * parameters) / 2
    assert crossed - none == pytest.approx(2 * 2 * 48 * 2 * each - reduced, rel=1e-6)


def test_matrices_that_are_shared_gather_and_scatter_their_tokens() -> None:
    slow = profile(within_node={"latency_s": 0.0, "bytes_per_s": 1e11})
    whole = cost(slow, tensor_parallel=4).communication
    shared = cost(slow, tensor_parallel=4, expert_tensor_parallel=4).communication
    nbytes = 4000 / 4 * 8 * 2048 * 2 * 4
    link = Link(latency_s=0.0, bytes_per_s=1e11)
    parameters = 48 * EXPERTS  # of which TP 4 alone has copies of whole experts
    reduced = all_reduce_s(link, 4, 4 * parameters) / 2 + all_reduce_s(link, 4, 2 * parameters) / 2
    more = 16 * 2 * 48 * all_reduce_s(link, 4, nbytes)
    assert shared - whole == pytest.approx(more - reduced, rel=1e-6)


def test_few_tokens_take_as_long_as_reading_the_experts() -> None:
    """A microbatch of one sequence of 1,000 tokens; the forward of a layer reads 128 experts."""
    device = profile(memory_bytes_per_s=1e10)
    fewer = cost(device, budget=1000, data_parallel=8, expert_parallel=8).update
    more = cost(device, budget=1000, data_parallel=8, expert_parallel=1).update
    read = 48 * EXPERTS * 2 / 1e10
    computed = 2 * 1000 * 48 * 8 * 3 * 2048 * 768 / RATE
    assert read > computed > read / 8
    assert more - fewer == pytest.approx(8 * 3 * (read - computed), rel=1e-6)


def test_engines_read_the_experts_that_any_response_chooses() -> None:
    device = profile(memory_bytes_per_s=1e12, matrix=[{"flops": 1.0, "flops_per_s": 1e30}])
    model = replace(engines(device), architecture=MIXTURE)
    one = model.decode_s(EngineSplit(1, 1), 1, 0)
    others = 48 * (ATTENTION + ROUTER) + TABLES
    assert one == pytest.approx(2 * (others + 48 * EXPERTS * 8 / 128) / 1e12, rel=1e-3)
    many = model.decode_s(EngineSplit(1, 1), 4096, 0)
    assert many == pytest.approx(2 * (others + 48 * EXPERTS) / 1e12, rel=1e-3)


def test_a_mixture_is_planned_with_expert_parallelism_and_written() -> None:
    loaded = load_config([EXAMPLE])
    planner = Planner(loaded, MIXTURE, workload_of(loaded, 200, 1500), read_profile("h100"))
    plan = planner.plan(64)
    best = plan.found[0]
    assert best.layout.parallel.expert_parallel > 1
    assert f"EP {best.layout.parallel.expert_parallel}" in str(best.layout)
    text = overlay(loaded, best, planner.transport(best.division), node=8)
    assert f"expert_parallel = {best.layout.parallel.expert_parallel}" in text


def test_engines_that_take_no_experts_are_refused() -> None:
    vllm = config()
    with pytest.raises(RapoError, match=r'kind = "vllm" takes no new weights of experts'):
        Planner(vllm, MIXTURE, workload_of(vllm), read_profile("h100"))
