"""Layout invariance: loss and whole gradient of an update equal plain PyTorch's on one process.

The reference below shares no code with the product: HF models, `log_softmax` over full logits, autograd,
one sequence at a time.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_rapo.config import Model, Optimizer, Parallel
from megatron_rapo.data.batching import Sample, pack, padded_length, plan_microbatches
from megatron_rapo.embedded_server.published import published
from megatron_rapo.loss.objective import Objective
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.model.norms import HeadsNorm
from megatron_rapo.parallel.placement import arrange, process_groups
from megatron_rapo.policy.gradients import accumulate_gradients
from megatron_rapo.policy.policy import Policy
from megatron_rapo.policy.reference import Reference
from megatron_rapo.weights.export import hf_tensors
from tests.distributed import replayed_routing
from tests.distributed.jobs import layout, run_job
from tests.episodes import prompt_tokens, random_sequence
from tests.methods import a_method
from tests.models import load_reference, make_hf_model

# Fewer real tokens than head rows, so that padded rows must be masked out.
VOCABULARY, TEMPERATURE, ALPHA, BETA, FLOOR = 59, 0.8, 0.3, 0.2, 0.5
# model, divergence, token budget of a microbatch, recompute, layout
CASES = [
    ("qwen2", "forward_exact", 200, "none", "tp2-pp2"),
    ("qwen2", "forward_exact", 40, "none", "tp2-pp2-vpp2-sp"),
    ("qwen2", "forward_exact", 60, "none", "cp2-pp2"),
    ("qwen2", "forward_exact", 36, "none", "tp2-cp2"),
    ("qwen2", "forward_exact", 41, "full", "dp4"),
    ("qwen2", "forward_exact", 41, "none", "cp2"),
    ("qwen2", "k3", 60, "none", "tp2-cp2-sp"),
    ("qwen2", "k3", 40, "none", "tp2-sp"),
    ("qwen2", "none", 28, "none", "pp4"),
    ("qwen3-tied", "forward_exact", 200, "full", "tp2-pp2"),
    ("qwen3-tied", "forward_exact", 40, "none", "tp2-pp2-vpp2-sp"),
    ("qwen3-tied", "forward_exact", 64, "none", "cp4"),
    ("qwen3-tied", "k3", 100, "none", "pp2-vpp2"),
    ("qwen3-tied", "none", 28, "none", "tp2-sp"),
    ("gemma3_text-tied", "k3", 40, "full", "tp2-pp2-vpp2-sp"),
    ("gemma3_text-tied", "none", 60, "none", "cp2-pp2"),
    ("olmo3", "forward_exact", 60, "full", "tp2-cp2"),
    ("olmo3", "forward_exact", 60, "none", "tp2-pp2-sp"),
    ("glm4", "forward_exact", 60, "none", "tp2-sp"),
    ("qwen3_moe", "forward_exact", 60, "none", "tp2-sp"),
    ("qwen3_moe", "forward_exact", 60, "none", "tp2-sp-ep2"),
    ("qwen3_moe", "none", 41, "full", "cp2-ep4"),
    ("qwen2_moe", "k3", 60, "none", "tp2-pp2-sp-ep2"),
    ("qwen2_moe", "none", 60, "none", "tp2-sp-ep2-etp2"),
]
FAULTS = {
    "a norm over heads, summed over them": ("olmo3", "forward_exact", 60, "full", "tp2-cp2"),
    "squares of a rank's own heads": ("olmo3", "forward_exact", 60, "none", "tp2-pp2-sp"),
    "an expert's gradient twice": ("qwen3_moe", "none", 41, "full", "cp2-ep4"),
    "the router's norm on each rank": ("qwen3_moe", "forward_exact", 60, "none", "tp2-sp-ep2"),
}
IDS = ["/".join(map(str, case)) for case in CASES]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    base = tmp_path_factory.mktemp("gradients")
    for name in {name for name, *_ in CASES}:
        family = name.split("-")[0]
        make_hf_model(base / name, family=family, tied="tied" in name, seed=0)
        make_hf_model(base / f"{name}-reference", family=family, tied="tied" in name, seed=7)
    replayed_routing.make_models(base)
    return run_job(measure, base, directory=base)


@pytest.mark.parametrize("case", IDS)
def test_loss_equals_plain_pytorch(measured: dict[str, Any], case: str) -> None:
    loss, expected = measured[case]["loss"], measured[case]["expected_loss"]
    assert loss == pytest.approx(expected, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("case", IDS)
def test_whole_gradient_equals_plain_pytorch(measured: dict[str, Any], case: str) -> None:
    assert measured[case]["gradient_error"] <= 1e-5


@pytest.mark.parametrize("case", IDS)
def test_gradient_norm_equals_plain_pytorch(measured: dict[str, Any], case: str) -> None:
    """As clipping takes it, over ranks that share some parameters and others not."""
    assert measured[case]["norm"] == pytest.approx(measured[case]["expected_norm"], rel=1e-5)


@pytest.mark.parametrize("fault", FAULTS)
def test_what_counts_twice_shows(measured: dict[str, Any], fault: str) -> None:
    found = measured[fault]
    assert abs(found["norm"] / found["expected_norm"] - 1) > 1e-4
    assert (found["gradient_error"] > 1e-3) == (fault != "the router's norm on each rank")


@pytest.mark.parametrize("case", IDS)
def test_mismatch_equals_numpy(measured: dict[str, Any], case: str) -> None:
    """Its mean, maximum and KL, over all tokens and by position."""
    expected = measured[case]["expected_mismatch"]
    assert {name.rpartition("/")[2] for name in expected} > {"0_15", "16_63"}
    assert measured[case]["mismatch"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("case", replayed_routing.CASES)
def test_replayed_routing_equals_plain_pytorch_with_fixed_choices(
    measured: dict[str, Any], case: str
) -> None:
    found = measured["replayed"][case]
    assert found["loss"] == pytest.approx(found["expected_loss"], rel=1e-5)
    assert found["gradient_error"] <= 1e-5


@pytest.mark.parametrize("case", replayed_routing.CASES)
def test_recorded_choices_are_those_of_transformers(measured: dict[str, Any], case: str) -> None:
    found = measured["replayed"][case]
    assert found["compared"] > 100
    assert found["others"] == 0


@pytest.mark.parametrize("case", replayed_routing.CASES)
def test_changed_choices_are_those_that_differ_in_transformers(measured: dict[str, Any], case: str) -> None:
    """Of padding no more is known than that it counts."""
    found = measured["replayed"][case]
    least = found["expected_differing"] * (1 - found["padding"])
    assert found["expected_differing"] > 0.05
    assert least - 1e-9 <= found["changed"] <= least + found["padding"] + 1e-9


@pytest.mark.parametrize("fault", replayed_routing.FAULTS)
def test_other_choices_show(measured: dict[str, Any], fault: str) -> None:
    assert measured["replayed"][fault]["gradient_error"] > 1e-2


def samples() -> list[Sample]:
    """A minibatch of mixed lengths; the weights are arbitrary, so that any aggregation is covered."""
    random = np.random.default_rng(0)
    return [
        Sample(
            sequence=random_sequence(random, prompt, response),
            phi=(FLOOR, 1.0)[random.integers(0, 2)],
            advantage=float(random.normal()),
            token_weight=float(random.uniform(0.005, 0.02)),
        )
        for prompt, response in ((5, 9), (3, 1), (8, 20), (4, 13), (2, 6), (6, 17))
    ]


def plain_pytorch(path: Path, divergence: str) -> tuple[float, dict[str, torch.Tensor], dict[str, float]]:
    """Loss, gradient by HF name, and mismatch."""
    model, reference = load_reference(path), load_reference(Path(f"{path}-reference"))
    loss, log_probs = torch.zeros(()), []
    for sample in samples():
        ids = torch.from_numpy(sample.sequence.token_ids).long()
        predicts = slice(prompt_tokens(sample.sequence) - 1, -1)
        log_policy = (model(ids[None]).logits[0, predicts, :VOCABULARY] / TEMPERATURE).log_softmax(-1)
        with torch.no_grad():
            logits = reference(ids[None]).logits[0, predicts, :VOCABULARY]
            log_reference = (logits / TEMPERATURE).log_softmax(-1)
        chosen = ids[prompt_tokens(sample.sequence) :, None]
        log_prob = log_policy.gather(1, chosen).squeeze(1)
        log_probs.append(log_prob.detach().numpy())
        entropy = -(log_policy.exp() * log_policy).sum(-1)
        pull = torch.zeros_like(entropy)
        if divergence == "forward_exact":
            flattened = (sample.phi * log_reference).log_softmax(-1)
            pull = (flattened.exp() * (flattened - log_policy)).sum(-1)
        if divergence == "k3":
            log_ratio = (log_reference.gather(1, chosen).squeeze(1) - log_prob).clamp(-10, np.log(10))
            pull = log_ratio.exp() - log_ratio - 1
        ratio = (log_prob - log_prob.detach()).exp()
        per_token = -ratio * sample.advantage + ALPHA * pull - BETA * entropy
        loss = loss + sample.token_weight * per_token.sum()
    loss.backward()
    gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return float(loss), dict(published(gradient, model.config.model_type)), plain_mismatch(log_probs)


def plain_mismatch(log_probs: list[np.ndarray]) -> dict[str, float]:
    """Of the samples, each with the trainer's log-probs of its response, by numpy."""
    lengths = [len(of_sample) for of_sample in log_probs]
    position = np.concatenate([np.arange(length) for length in lengths])
    engine = np.concatenate([sample.sequence.log_probs[sample.sequence.sampled] for sample in samples()])
    delta = np.concatenate(log_probs) - engine
    found = {
        "mismatch/engine_log_prob": float(engine.astype(np.float64).mean()),
        "mismatch/engine_log_prob_spread": float(np.ptp(engine)),
    }
    for where, at in {"": position >= 0, "/0_15": position < 16, "/16_63": position >= 16}.items():
        d = delta[at].astype(np.float64)
        found[f"mismatch/log_prob_mean{where}"] = float(np.abs(d).mean())
        found[f"mismatch/log_prob_max{where}"] = float(np.abs(d).max())
        found[f"mismatch/kl{where}"] = float((np.exp(d) - 1 - d).mean())
    return found


def measure(base: Path, report: Path) -> None:
    """In each rank: every case's loss and gradient, against plain PyTorch on rank 0."""
    results, expected = {}, {}
    with process_groups(Parallel(data_parallel=4), seed=1) as everyone:
        for name, case in [*zip(IDS, CASES, strict=True), *FAULTS.items()]:
            loss, gradient, norm, mismatch = _loss_and_gradient(base, *case, name if name in FAULTS else None)
            if not everyone.is_main:
                continue
            if case[:2] not in expected:
                expected[case[:2]] = plain_pytorch(base / case[0], case[1])
            expected_loss, expected_gradient, expected_mismatch = expected[case[:2]]
            assert set(gradient) == set(expected_gradient)
            difference = sum(float((gradient[k] - g).norm() ** 2) for k, g in expected_gradient.items())
            scale = sum(float(g.norm() ** 2) for g in expected_gradient.values())
            results[name] = {
                "loss": loss,
                "expected_loss": expected_loss,
                "gradient_error": (difference / scale) ** 0.5,
                "norm": norm,
                "expected_norm": scale**0.5,
                "mismatch": mismatch,
                "expected_mismatch": expected_mismatch,
            }
        results["replayed"] = replayed_routing.measure_all(base)
        if everyone.is_main:
            report.write_text(json.dumps(results))


def _loss_and_gradient(
    base: Path,
    name: str,
    divergence: Any,
    budget: int,
    recompute: Any,
    layout_name: str,
    fault: str | None = None,
) -> tuple[float, dict[str, torch.Tensor], float, dict[str, float]]:
    parallel = layout(layout_name)
    placement = arrange(parallel, seed=1)
    path = base / name
    architecture = read_architecture(path)
    model = Model(path=path, reference_path=Path(f"{path}-reference"), dtype="float32", recompute=recompute)
    policy = Policy(model, Optimizer(distributed=False), architecture, placement, total_updates=1)
    if fault is not None:
        _plant(fault, policy)
    of_divergence: dict[str, tuple[str, dict[str, Any]]] = {
        "none": ("rapo", {"divergence_coefficient": 0.0}),
        "k3": ("grpo", {"divergence": "k3", "divergence_coefficient": ALPHA}),
        "forward_exact": ("rapo", {"divergence": "forward_exact", "divergence_coefficient": ALPHA}),
    }
    name_of_method, options = of_divergence[divergence]
    method = a_method(name_of_method, entropy_coefficient=BETA, **options)
    objective = Objective(
        method, temperature=TEMPERATURE, vocabulary=VOCABULARY, group=placement.tensor_group
    )
    multiple = 2 * parallel.context_parallel * parallel.tensor_parallel
    lengths = [padded_length(len(sample.sequence), multiple) for sample in samples()]
    plan = plan_microbatches(
        lengths,
        replicas=parallel.data_parallel,
        token_budget=max(budget, *lengths),
        count_multiple=parallel.pipeline_parallel if parallel.virtual_pipeline_parallel else 1,
    )[placement.data_rank]
    minibatch = [
        pack(
            [samples()[index] for index in chosen],
            sequence_multiple=multiple,
            total_tokens=max(sum(lengths[i] for i in b) for b in plan),
            context_rank=placement.context_rank,
            context_ranks=parallel.context_parallel,
        )
        for chosen in plan
    ]
    reference = Reference(model, architecture, placement) if divergence != "none" else None
    if reference is not None:
        reference.annotate([minibatch], objective)
    sums, mismatch = accumulate_gradients(policy.wrapped, minibatch, objective, reference, placement)
    value = objective.metrics(sums)["loss/total"]

    mine = dict(hf_tensors(policy.chunks, architecture, placement, value=lambda p: p.main_grad))
    shares: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(shares, mine)
    gradient = {name: tensor for share in shares for name, tensor in share.items()}
    policy.optimizer.prepare_grads()
    norm = float(policy.optimizer.get_grad_norm())
    policy.close()
    return value, gradient, norm, dict(mismatch.metrics())


def _plant(fault: str, policy: Policy) -> None:
    if fault == "a norm over heads, summed over them":
        for name, parameter in policy.chunks[0].named_parameters():
            if "query_norm" in name or "key_norm" in name:
                parameter.average_gradients_across_tp_domain = True  # type: ignore[attr-defined]
    if fault == "squares of a rank's own heads":
        for module in policy.chunks[0].modules():
            if isinstance(module, HeadsNorm):
                module.group = dist.new_subgroups(1)[0]
    if fault == "an expert's gradient twice":
        for buffer in policy.wrapped[0].expert_parallel_buffers:
            for bucket in buffer.buckets:
                bucket.gradient_scaling_factor = 2.0
    if fault == "the router's norm on each rank":
        for name, parameter in policy.chunks[0].named_parameters():
            if "router" in name:
                parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
