"""Published figures of clusters, of other trainers, beside what the shipped profile of H100 predicts.

All are in bfloat16; no number of the profile was fitted to them. `check_plan.py --published` prints them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

from megatron_rapo.config import Parallel
from megatron_rapo.model.architecture import Architecture, Experts
from megatron_rapo.model.rope import Rope
from megatron_rapo.planning.engine_cost import EngineModel, EngineSplit
from megatron_rapo.planning.profile import Profile, read_profile
from megatron_rapo.planning.trainer_cost import TrainerModel
from megatron_rapo.planning.workload import Workload

# What the published figures are of.
_COMMON: dict[str, Any] = {
    "norm_epsilon": 1e-5,
    "rope": Rope(5e5),
    "max_positions": 131072,
    "attention_bias": False,
    "query_key_norm": None,
    "tied": False,
}
LLAMA_8B = Architecture("llama", 32, 4096, 32, 8, 128, 14336, 128256, **_COMMON)
LLAMA_405B = Architecture("llama", 126, 16384, 128, 8, 128, 53248, 128256, **_COMMON)
QWEN3_32B = Architecture("qwen3", 64, 5120, 64, 8, 128, 25600, 151936, **_COMMON)


_OF_MIXTURES: dict[str, Any] = _COMMON | {
    "norm_epsilon": 1e-6,
    "rope": Rope(1e6),
    "max_positions": 40960,
    "query_key_norm": "head",
    "experts": Experts(count=128, chosen=8, renormalised=True),
}
QWEN3_30B = Architecture("qwen3_moe", 48, 2048, 32, 4, 128, 768, 151936, **_OF_MIXTURES)
# 94 layers; embedding and head count as the others in its pipeline.
QWEN3_235B = Architecture("qwen3_moe", 96, 4096, 64, 4, 128, 1536, 151936, **_OF_MIXTURES)


class GRPO(NamedTuple):
    """A step of NeMo-RL 0.4 (docs/about/performance-summary.md: OpenMathInstruct-2, DGX H100, bf16).

    Responses are trained on in updates of 512. Assumed, as the page does not tell: groups of 32, prompts of
    160 tokens, and that half of the GPUs sample where the policy is one step off (`samplers`; 0: all do
    both).
    """

    name: str
    model: Architecture
    trainers: int
    samplers: int
    mean: int
    longest: int
    tensor: int
    pipeline: int
    engine: int
    seconds: float
    responses: int = 2048
    context: int = 1
    experts: int = 1


class Pretraining(NamedTuple):
    """Of The Llama 3 Herd of Models (arXiv 2407.21783), table 4, 405B, H100, bf16: TFLOP/s a GPU.

    Its pipeline is interleaved, by how many chunks it does not tell: between 1 and all layers of a stage.
    """

    name: str
    tensor: int
    context: int
    pipeline: int
    data: int
    sequence: int
    sequences: int
    tflops: float


PROMPT = 160
STEPS = (
    GRPO("Llama 3.1 8B, 16 GPUs, on policy", LLAMA_8B, 16, 0, 1060, 4096, 1, 2, 1, 97.7),
    GRPO("Llama 3.1 8B, 16 GPUs, one step off", LLAMA_8B, 8, 8, 1129, 4096, 1, 2, 1, 74.6),
    GRPO("Qwen3 32B, 32 GPUs, on policy", QWEN3_32B, 32, 0, 3206, 4096, 4, 4, 4, 393.0),
    GRPO("Qwen3 32B, 64 GPUs, one step off", QWEN3_32B, 32, 32, 3207, 4096, 4, 4, 4, 215.0),
    GRPO("Qwen3 30B-A3B, 32 GPUs, on policy", QWEN3_30B, 32, 0, 3154, 4096, 2, 1, 4, 225.0, experts=8),
    GRPO("Qwen3 30B-A3B, 32 GPUs, one step off", QWEN3_30B, 16, 16, 3158, 4096, 1, 2, 2, 244.0, experts=8),
    GRPO(
        *("Qwen3 235B-A22B, 128 GPUs, on policy", QWEN3_235B, 128, 0, 5671, 8192, 2, 8, 16, 506.0),
        responses=512,
        context=2,
        experts=16,
    ),
    GRPO(
        *("Qwen3 235B-A22B, 256 GPUs, one step off", QWEN3_235B, 128, 128, 5691, 8192, 4, 8, 8, 241.0),
        responses=512,
        experts=16,
    ),
)
RATES = (
    Pretraining("8,192 GPUs, 8,192 tokens", 8, 1, 16, 64, 8192, 32, 430.0),
    Pretraining("16,384 GPUs, 8,192 tokens", 8, 1, 16, 128, 8192, 16, 400.0),
    Pretraining("16,384 GPUs, 131,072 tokens", 8, 16, 16, 8, 131072, 16, 380.0),
)


def published() -> list[str]:
    """Each figure beside what the shipped profile of H100 predicts."""
    profile = read_profile("h100")
    lines = ["| published | figure | predicted | error |", "|---|---|---|---|"]
    for step in STEPS:
        found = step_s(profile, step)
        error = found / step.seconds - 1
        lines.append(f"| NeMo-RL: {step.name} | {step.seconds:g} s | {found:.1f} s | {error:+.0%} |")
    for one in RATES:
        for chunks in (None, 8):
            rate = tflops(profile, one, chunks)
            error = rate / one.tflops - 1
            name = f"Llama 3 405B: {one.name}, if VPP {chunks or 1}"
            lines.append(f"| {name} | {one.tflops:g} TFLOP/s | {rate:.0f} TFLOP/s | {error:+.0%} |")
    return lines


def step_s(profile: Profile, step: GRPO) -> float:
    """Seconds, with the policy's and a reference's log-probs."""
    load = Workload(
        prompts=step.responses // 32,
        responses=step.responses,
        prompt_tokens=PROMPT,
        response_tokens=step.mean - PROMPT,
        longest=step.longest - PROMPT,
        updates=step.responses // 512,
        old_log_probs=True,
        reference=True,
        frozen_logits=False,
    )
    layout = parallel(
        tensor_parallel=step.tensor,
        pipeline_parallel=step.pipeline,
        context_parallel=step.context,
        data_parallel=step.trainers // step.tensor // step.pipeline // step.context,
        expert_parallel=step.experts,
    )
    trainer = TrainerModel(step.model, load, profile, 2)
    trained = trainer.cost(layout, step.longest, recompute=False, distributed=True, overlap=True).total
    engines = EngineModel(step.model, load, profile, 2, None)
    sampled = engines.rollout_s(EngineSplit((step.samplers or step.trainers) // step.engine, step.engine))
    assert sampled is not None, "engines have no room"
    both = max(sampled, trained) if step.samplers else sampled + trained
    return both + engines.publish_s(step.trainers + step.samplers, over_disk=False) + profile.step_s


def tflops(profile: Profile, one: Pretraining, chunks: int | None) -> float:
    """Of an update in microbatches of one sequence: 6 operations a parameter and token, and attention's by
    its causal mask."""
    model = replace(LLAMA_405B, layers=128)  # of 126; embedding and head count as the others in its pipeline
    load = Workload(1, one.sequences * one.data, 0, one.sequence, one.sequence, 1, *(False, False, False))
    layout = parallel(
        tensor_parallel=one.tensor,
        pipeline_parallel=one.pipeline,
        context_parallel=one.context,
        data_parallel=one.data,
        virtual_pipeline_parallel=chunks,
    )
    trainer = TrainerModel(model, load, profile, 2)
    cost = trainer.cost(layout, one.sequence, recompute=False, distributed=True, overlap=True)
    tokens = one.sequence * one.sequences * one.data
    attention = 6 * LLAMA_405B.layers * LLAMA_405B.hidden * one.sequence  # half of 12, by the mask
    return tokens * (6 * 405e9 + attention) / layout.world_size / cost.update / 1e12


def parallel(**options: Any) -> Parallel:
    """With sequence parallelism wherever there is TP."""
    sharded = {"sequence_parallel": True} if options["tensor_parallel"] > 1 else {}
    return Parallel(**options, **sharded)
