"""Updates of a mixture whose tokens go where they went before, against transformers with fixed choices.

The truth shares no code with the product: the model that the step begins with chooses, one sequence at a
time, and the moved one computes loss and gradient with its routers' choices exchanged for these.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from megatron_rapo.config import Model, Optimizer
from megatron_rapo.data.batching import Microbatch, Sample, pack, padded_length, plan_microbatches
from megatron_rapo.embedded_server.published import published
from megatron_rapo.loss.objective import Objective
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.parallel.placement import Placement, arrange
from megatron_rapo.policy.gradients import accumulate_gradients, main_gradient
from megatron_rapo.policy.policy import Policy
from megatron_rapo.weights.export import hf_tensors
from megatron_rapo.weights.load import load_weights
from tests.distributed.jobs import layout
from tests.episodes import prompt_tokens, random_sequence
from tests.methods import a_method
from tests.models import load_reference, make_hf_model

VOCABULARY, TEMPERATURE, BETA, LOW, HIGH = 59, 0.8, 0.2, 0.1, 0.2
# model, token budget of a microbatch, recompute, layout
CASES = {
    "tp2-sp": ("qwen3_moe", 60, "none"),
    "ep2": ("qwen3_moe", 41, "full"),
    "pp2-ep2": ("qwen2_moe", 41, "none"),
    "cp2-ep4": ("mixtral", 200, "none"),
    "tp2-pp2-vpp2-sp-ep2": ("qwen3_moe", 41, "full"),
}
FAULTS = {"no replay": "tp2-sp", "another token's": "ep2", "another layer's": "pp2-ep2"}
FAMILIES = sorted({family for family, *_ in CASES.values()})


def make_models(base: Path) -> None:
    """Of each family the model that a step begins with, the one that it has become, and the truth of both."""
    for family in FAMILIES:
        moved = load_reference(make_hf_model(base / f"{family}-old", family=family, seed=0))
        random = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in moved.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=random)
        moved.save_pretrained(base / f"{family}-moved")
        torch.save(truth(load_reference(base / f"{family}-old"), moved), base / f"{family}.pt")


def samples(seed: int) -> list[Sample]:
    """A minibatch."""
    random = np.random.default_rng(seed)
    return [
        Sample(
            sequence=random_sequence(random, prompt, response),
            phi=1.0,
            advantage=float(random.normal()),
            token_weight=float(random.uniform(0.005, 0.02)),
        )
        for prompt, response in ((5, 9), (3, 1), (8, 20), (4, 13), (2, 6), (6, 17))
    ]


def choices(model: torch.nn.Module, sample: Sample) -> Tensor:
    """`[layers, tokens, chosen]`, by the routers' logits, the likeliest first."""
    ids = torch.from_numpy(sample.sequence.token_ids).long()
    with torch.no_grad():
        logits = torch.stack(model(ids[None], output_router_logits=True).router_logits)
    return logits.topk(model.config.num_experts_per_tok).indices


def fix(model: torch.nn.Module, chosen: Tensor) -> None:
    """Lets the routers of a model send tokens to these experts, `[layers, tokens, chosen]`."""
    for layer, of_layer in zip(model.model.layers, chosen, strict=True):

        def forward(hidden: Tensor, gate: Any = layer.mlp.gate, of_layer: Tensor = of_layer) -> Any:
            logits = F.linear(hidden.flatten(0, -2), gate.weight)
            shares = logits.softmax(-1).gather(1, of_layer)
            if getattr(gate, "norm_topk_prob", True):
                shares = shares / shares.sum(1, keepdim=True)
            return logits, shares, of_layer

        layer.mlp.gate.forward = forward


def truth(old: torch.nn.Module, moved: torch.nn.Module) -> dict[str, Any]:
    """Of the second minibatch: its choices, loss, gradient by HF name, and share of choices that differ."""
    chosen = [choices(old, sample) for sample in samples(1)]
    loss, differing, tokens = torch.zeros(()), 0, 0
    for sample, taken in zip(samples(1), chosen, strict=True):
        fix(moved, taken)
        ids = torch.from_numpy(sample.sequence.token_ids).long()
        predicts, target = (
            slice(prompt_tokens(sample.sequence) - 1, -1),
            ids[prompt_tokens(sample.sequence) :, None],
        )

        def log_softmax(model: Any, ids: Tensor = ids, predicts: slice = predicts) -> Tensor:
            return (model(ids[None]).logits[0, predicts, :VOCABULARY] / TEMPERATURE).log_softmax(-1)

        log_policy = log_softmax(moved)
        with torch.no_grad():
            old_log_prob = log_softmax(old).gather(1, target)
        ratio = (log_policy.gather(1, target) - old_log_prob).exp().squeeze(1)
        gain = torch.minimum(ratio * sample.advantage, ratio.clamp(1 - LOW, 1 + HIGH) * sample.advantage)
        entropy = -(log_policy.exp() * log_policy).sum(-1)
        loss = loss - sample.token_weight * (gain + BETA * entropy).sum()
        # As this pass has it, whose layers are given what the replayed ones before them made.
        differing += differs(moved, sample, taken)
        tokens += taken.size(0) * taken.size(1)
    loss.backward()
    gradient = {name: p.grad for name, p in moved.named_parameters() if p.grad is not None}
    return {
        "choices": chosen,
        "loss": float(loss.detach()),
        "gradient": dict(published(gradient, moved.config.model_type)),
        "differing": differing / tokens,
    }


def differs(model: torch.nn.Module, sample: Sample, taken: Tensor) -> int:
    """How many of a fixed model's choices `[layers, tokens]` would be others if routers chose."""
    own = choices(model, sample)
    return int((own.sort(-1).values != taken.sort(-1).values).any(-1).sum())


def measure_all(base: Path) -> dict[str, dict[str, float]]:
    """In each rank: every case, and every fault; on rank 0 what they come to."""
    found = {}
    for name, where, fault in [*((one, one, None) for one in CASES), *((f, w, f) for f, w in FAULTS.items())]:
        family, budget, recompute = CASES[where]
        placement = arrange(layout(where), seed=1)
        wanted = torch.load(base / f"{family}.pt")
        loss, gradient, told = _measure(base, family, budget, recompute, placement, fault, wanted["choices"])
        assert set(gradient) == set(wanted["gradient"])
        squares = sum(float((gradient[k] - g).norm() ** 2) for k, g in wanted["gradient"].items())
        scale = sum(float(g.norm() ** 2) for g in wanted["gradient"].values())
        found[name] = {
            "loss": loss,
            "expected_loss": wanted["loss"],
            "gradient_error": (squares / scale) ** 0.5,
            "expected_differing": wanted["differing"],
            **told,
        }
    return found


def _measure(
    base: Path,
    family: str,
    budget: int,
    recompute: Any,
    placement: Placement,
    fault: str | None,
    truths: list[Tensor],
) -> tuple[float, dict[str, Tensor], dict[str, float]]:
    architecture = read_architecture(base / f"{family}-old")
    model = Model(path=base / f"{family}-old", dtype="float32", recompute=recompute)
    policy = Policy(model, Optimizer(distributed=False), architecture, placement, total_updates=1)
    method = a_method(
        "rapo",
        divergence_coefficient=0.0,
        entropy_coefficient=BETA,
        clip_low=LOW,
        clip_high=HIGH,
        routing_replay="old",
    )
    objective = Objective(
        method, temperature=TEMPERATURE, vocabulary=VOCABULARY, group=placement.tensor_group
    )
    minibatches = [_minibatch(samples(seed), budget, placement) for seed in (0, 1)]
    policy.annotate([microbatches for _, microbatches in minibatches], objective)
    plan, minibatch = minibatches[1]
    others, compared = _compared(truths, plan, minibatch, placement)
    moved = base / f"{family}-moved"
    load_weights(policy.chunks, architecture, moved, placement.tensor_rank, placement.expert_tensor_rank)
    for microbatch in minibatch:
        _plant(fault, microbatch)
    policy._routing.begin_step()
    policy._routing.begin_update(minibatch)
    sums, _ = accumulate_gradients(policy.wrapped, minibatch, objective, None, placement)
    told = {
        "compared": compared,
        "others": others,
        "changed": policy._routing.metrics(replays=True)["router/replay_changed"],
        "padding": _padding(plan, minibatch, placement),
    }
    mine = dict(hf_tensors(policy.chunks, architecture, placement, value=main_gradient))
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    policy.close()
    gradient = {name: tensor for share in shares for name, tensor in share.items()}
    return objective.metrics(sums)["loss/total"], gradient, told


def _minibatch(
    chosen: Sequence[Sample], budget: int, placement: Placement
) -> tuple[list[list[int]], list[Microbatch]]:
    """This rank's samples' numbers by microbatch, and the microbatches."""
    parallel = placement.layout
    multiple = 2 * parallel.context_parallel * parallel.tensor_parallel
    lengths = [padded_length(len(sample.sequence), multiple) for sample in chosen]
    plan = plan_microbatches(
        lengths,
        replicas=parallel.data_parallel,
        token_budget=max(budget, *lengths),
        count_multiple=parallel.pipeline_parallel if parallel.virtual_pipeline_parallel else 1,
    )[placement.data_rank]
    total = max(sum(lengths[number] for number in numbers) for numbers in plan)
    packed = [
        pack(
            [chosen[number] for number in numbers],
            sequence_multiple=multiple,
            total_tokens=total,
            context_rank=placement.context_rank,
            context_ranks=parallel.context_parallel,
        )
        for numbers in plan
    ]
    return plan, packed


def _rows(microbatch: Microbatch, placement: Placement) -> tuple[Tensor, Tensor]:
    """Of each row of this rank's routers: which sequence it belongs to, and its place there."""
    parts = placement.layout.tensor_parallel if placement.layout.sequence_parallel else 1
    mine = placement.tensor_rank if parts > 1 else 0
    return (each.chunk(parts)[mine] for each in (microbatch.sequences, microbatch.position_ids))  # type: ignore


def _compared(
    truths: list[Tensor], plan: list[list[int]], minibatch: list[Microbatch], placement: Placement
) -> tuple[int, int]:
    """How many recorded choices are other than transformers', and how many there are, over all ranks."""
    counts = torch.zeros(2, dtype=torch.int64)
    for chosen, microbatch in zip(plan, minibatch, strict=True):
        of_sequences = [truths[number] for number in chosen]
        assert microbatch.experts is not None
        for layer, found in microbatch.experts.items():
            assert found.dtype == torch.uint8
            for row, (sequence, place) in enumerate(zip(*_rows(microbatch, placement), strict=True)):
                if sequence < len(of_sequences) and place < of_sequences[sequence].size(1):
                    same = found[row].tolist() == of_sequences[sequence][layer - 1, place].tolist()
                    counts += torch.tensor([not same, 1])
    dist.all_reduce(counts)
    return int(counts[0]), int(counts[1])


def _padding(plan: list[list[int]], minibatch: list[Microbatch], placement: Placement) -> float:
    """The share of rows that are padding, over all ranks."""
    counts = torch.zeros(2, dtype=torch.int64)
    for chosen, microbatch in zip(plan, minibatch, strict=True):
        lengths = [len(samples(1)[number].sequence) for number in chosen]
        for sequence, place in zip(*_rows(microbatch, placement), strict=True):
            counts += torch.tensor([sequence >= len(lengths) or place >= lengths[sequence], 1])
    dist.all_reduce(counts)
    return float(counts[0] / counts[1])


def _plant(fault: str | None, microbatch: Microbatch) -> None:
    taken = microbatch.experts
    assert taken is not None
    if fault == "no replay":
        microbatch.experts = None
    if fault == "another token's":
        microbatch.experts = {layer: found.roll(1, 0) for layer, found in taken.items()}
    if fault == "another layer's":
        layers = list(taken)
        microbatch.experts = {
            layer: taken[other] for layer, other in zip(layers, layers[1:] + layers[:1], strict=True)
        }
