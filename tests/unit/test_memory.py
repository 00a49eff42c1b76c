"""The memory estimate: bytes that follow from the layout alone, and which way each option moves it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_rapo.config.load import validate
from megatron_rapo.model.architecture import Architecture, Experts
from megatron_rapo.model.features import Norms
from megatron_rapo.model.parameters import count_parameters
from megatron_rapo.model.rope import Rope
from megatron_rapo.scaling.memory import GIB, MemoryEstimate, estimate_memory

QWEN2_7B = Architecture(
    family="qwen2",
    layers=28,
    hidden=3584,
    heads=28,
    kv_heads=4,
    head_dim=128,
    feed_forward=18944,
    vocabulary=152064,
    norm_epsilon=1e-6,
    rope=Rope(1e6),
    max_positions=32768,
    attention_bias=True,
    query_key_norm=None,
    tied=False,
)


def estimate(
    architecture: Architecture = QWEN2_7B,
    dtype: str = "bfloat16",
    recompute: str = "none",
    of_teacher: Architecture | None = None,
    **sections: Any,
) -> MemoryEstimate:
    options: dict[str, Any] = {
        "run": {"directory": "run", "steps": 1},
        "model": {"path": "model", "dtype": dtype, "recompute": recompute},
        "data": {"source": "arithmetic"},
        "rollout": {"prompts_per_step": 64, "max_prompt_tokens": 1024, "max_response_tokens": 3072},
        **sections,
    }
    return estimate_memory(validate(options, source="test"), architecture, of_teacher)


def test_the_7b_model_has_its_published_size() -> None:
    assert count_parameters(QWEN2_7B) == 7_615_616_512


@pytest.mark.parametrize(("dtype", "weights", "optimizer"), [("bfloat16", 2, 12), ("float32", 4, 8)])
def test_one_rank_holds_every_parameter_and_its_states(dtype: str, weights: int, optimizer: int) -> None:
    """bf16 weights with fp32 main copies and moments, or fp32 weights with moments alone; fp32 gradients."""
    found = estimate(dtype=dtype)
    parameters = count_parameters(QWEN2_7B) - QWEN2_7B.hidden  # less the last norm
    assert found.weights == found.reference == weights * parameters
    assert found.gradients == 4 * parameters
    assert found.optimizer == optimizer * parameters


def test_norms_after_sublayers_and_over_all_heads_keep_what_they_are_given() -> None:
    """Bytes a token and layer: two bf16 copies of its channels; two fp32 ones of its queries and keys."""
    a, tokens = QWEN2_7B, 8192
    options: dict[str, Any] = {"algorithm": {"max_tokens_per_microbatch": tokens}}
    plain = estimate(**options).activations
    sandwich = replace(a, norms=Norms(after_attention="a", after_mlp="b"))
    assert estimate(sandwich, **options).activations - plain == a.layers * tokens * 2 * 2 * a.hidden
    both = replace(a, query_key_norm="heads", norms=replace(sandwich.norms, before_attention=None))
    kept = 2 * 4 * (a.heads + a.kv_heads) * a.head_dim
    assert estimate(both, **options).activations - plain == a.layers * tokens * kept


def test_no_reference_takes_no_memory() -> None:
    found = estimate(algorithm={"divergence_coefficient": 0.0})
    assert found.reference == found.reference_hidden == 0


def test_the_distributed_optimizer_shards_states_over_replicas_alone() -> None:
    whole, shared = estimate(), estimate(parallel={"data_parallel": 4})
    kept = estimate(parallel={"data_parallel": 4}, optimizer={"distributed": False})
    assert shared.optimizer == pytest.approx(whole.optimizer / 4)
    assert kept.optimizer == whole.optimizer
    assert (shared.weights, shared.gradients) == (whole.weights, whole.gradients)


@pytest.mark.parametrize(
    ("more", "less"),
    [
        ({}, {"parallel": {"tensor_parallel": 2}}),
        ({"parallel": {"tensor_parallel": 2}}, {"parallel": {"tensor_parallel": 4}}),
        ({}, {"parallel": {"pipeline_parallel": 2}}),
        ({"parallel": {"pipeline_parallel": 2}}, {"parallel": {"pipeline_parallel": 4}}),
        ({}, {"parallel": {"context_parallel": 2}}),
        (
            {"parallel": {"tensor_parallel": 2}},
            {"parallel": {"tensor_parallel": 2, "sequence_parallel": True}},
        ),
        ({}, {"recompute": "full"}),
        ({}, {"algorithm": {"max_tokens_per_microbatch": 4096}}),
        ({}, {"algorithm": {"divergence_coefficient": 0.0}}),
    ],
)
def test_sharing_and_thrift_lower_the_total(more: dict[str, Any], less: dict[str, Any]) -> None:
    assert estimate(**less).total < estimate(**more).total


def test_tensor_parallelism_halves_what_it_cuts() -> None:
    one, two = estimate(), estimate(parallel={"tensor_parallel": 2})
    assert two.weights == pytest.approx(one.weights / 2, rel=1e-3)
    assert two.loss == pytest.approx(one.loss / 2, rel=1e-3)


MIXTURE = replace(
    QWEN2_7B,
    family="qwen2_moe",
    feed_forward=2368,
    experts=Experts(count=8, chosen=2, renormalised=True),
)


@pytest.mark.parametrize("option", ["expert_parallel", "expert_tensor_parallel"])
def test_experts_are_held_by_the_ranks_that_share_them(option: str) -> None:
    """Eight experts have what the MLP has, and the optimizer's states of them are shared all the same."""
    mlp = 28 * 3 * 3584 * 18944
    router = 28 * 8 * 3584
    alone = estimate(MIXTURE, parallel={"data_parallel": 4})
    spread = estimate(MIXTURE, parallel={"data_parallel": 4, option: 4})
    assert alone.weights == estimate().weights + 2 * router
    assert alone.weights - spread.weights == 2 * mlp * 3 / 4
    assert spread.optimizer == alone.optimizer, "with the experts' data parallelism"
    whole = {"optimizer": {"distributed": False}}
    kept = estimate(MIXTURE, parallel={"data_parallel": 4, option: 4}, **whole)
    assert kept.optimizer == 12 * spread.gradients / 4


def test_a_tied_embedding_is_held_once() -> None:
    table = QWEN2_7B.vocabulary * QWEN2_7B.hidden
    tied = estimate(replace(QWEN2_7B, tied=True))
    assert estimate().gradients - tied.gradients == 4 * table


def test_a_reference_in_host_memory_leaves_its_head_alone() -> None:
    found = estimate(model={"path": "model", "reference_in_host_memory": True})
    assert found.reference == 2 * QWEN2_7B.vocabulary * QWEN2_7B.hidden
    assert found.reference_hidden == 0


def test_a_teacher_is_counted_with_the_policys_rows() -> None:
    """Parameters and hidden states; in host memory its head alone is left."""
    small = replace(QWEN2_7B, layers=14, hidden=1792, vocabulary=QWEN2_7B.vocabulary + 128)
    distill, teacher = {"method": "distill"}, {"path": "teacher"}
    alone = estimate(algorithm={"method": "dapo"})
    found = estimate(of_teacher=small, algorithm=distill, teacher=teacher)
    rows = replace(small, vocabulary=QWEN2_7B.vocabulary)
    assert found.teacher == 2 * (count_parameters(rows) - small.hidden)  # less the last norm
    assert found.teacher_hidden == 64 * 8 * 4096 * 1792 * 2
    assert (found.weights, found.reference, found.reference_hidden) == (alone.weights, 0, 0)
    assert found.loss > alone.loss
    away = estimate(of_teacher=small, algorithm=distill, teacher={**teacher, "in_host_memory": True})
    assert (away.teacher, away.teacher_hidden) == (2 * QWEN2_7B.vocabulary * 1792, 0)


def test_padded_rows_are_counted() -> None:
    padded = replace(QWEN2_7B, vocabulary=QWEN2_7B.vocabulary // 1024 * 1024 + 1024)
    found = estimate(model={"path": "model", "vocabulary_multiple": 1024})
    assert found.weights == estimate(padded).weights > estimate().weights


def test_the_lines_are_in_gib_and_sum_up() -> None:
    found = estimate()
    *parts, total = found.lines()
    assert float(total.split()[-2]) == pytest.approx(found.total / GIB, abs=0.01)
    assert sum(float(line.split()[-2]) for line in parts) == pytest.approx(found.total / GIB, abs=0.1)


def test_the_examples_fit_their_gpus() -> None:
    from megatron_rapo.config import load_config
    from megatron_rapo.preflight import planned_architecture

    configs = Path(__file__).parents[2] / "examples/configs"
    for name in ("qwen2.5-3b.toml", "qwen2.5-7b.toml"):
        config = load_config([configs / name])
        found = estimate_memory(config, planned_architecture(config))
        assert 1 < found.total / GIB < 80, name
