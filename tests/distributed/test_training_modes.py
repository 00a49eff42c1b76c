"""Several updates under every mode of training equal plain PyTorch's AdamW on one process.

The reference below shares no code with the product: HF models, `log_softmax` over full logits, autograd,
torch's AdamW and gradient clipping, and learning rates by their closed formulas.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from megatron_rapo.config import Model, Optimizer, Parallel, RunConfig
from megatron_rapo.config.load import validate
from megatron_rapo.guards.guards import Guards
from megatron_rapo.loss.objective import Objective
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.parallel.placement import Placement, arrange, process_groups
from megatron_rapo.policy.policy import Policy
from megatron_rapo.policy.reference import Reference
from megatron_rapo.weights.export import hf_tensors
from tests.distributed.jobs import layout, run_job
from tests.distributed.minibatches import VOCABULARY, make_minibatches, make_samples
from tests.episodes import prompt_tokens
from tests.methods import a_method
from tests.models import make_hf_model

TEMPERATURE = 0.8
OBJECTIVE: dict[str, Any] = {
    "clip_low": 0.1,
    "clip_high": 0.2,
    "divergence_coefficient": 0.3,
    "entropy_coefficient": 0.2,
}
# Rates and weights that move the loss by tens of percent in three steps, and the ratio beyond its clips.
RATE, LOWEST, DECAY = 4e-3, 1e-3, 0.1
STEPS = 3
MISMATCHES = ("log_prob_mean", "log_prob_max", "kl", "kl/16_63")
SMALL = {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8}


@dataclass(frozen=True)
class Mode:
    """One way of training on the same data; options as in the configuration."""

    layout: str
    minibatches: int = 1
    model: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)


LINEAR = {"warmup_updates": 2, "decay": "linear", "min_learning_rate": LOWEST}
COSINE = {"warmup_updates": 1, "decay": "cosine", "min_learning_rate": LOWEST}
OVERLAP = {"overlap_communication": True}
MODES = {
    "distributed optimizer": Mode("dp4"),
    "whole optimizer, clipped gradients": Mode("tp2", optimizer={"distributed": False, "clip_gradient": 0.5}),
    "overlap, linear decay": Mode("dp4", minibatches=2, optimizer={**OVERLAP, **LINEAR}),
    "overlap in a pipeline, cosine decay": Mode("pp2", minibatches=2, optimizer={**OVERLAP, **COSINE}),
    "overlap in an interleaved pipeline": Mode("pp2-vpp2", minibatches=2, optimizer=OVERLAP),
    "no recomputation": Mode("tp2-pp2", minibatches=2),
    "recomputation": Mode("tp2-pp2", minibatches=2, model={"recompute": "full"}),
    "bf16": Mode("tp2-cp2", minibatches=2, model={"dtype": "bfloat16"}),
}
GUARDED = ["dp4", "tp2-pp2"]
EXACT = [name for name, mode in MODES.items() if "dtype" not in mode.model]


def optimizer_options(mode: Mode) -> dict[str, Any]:
    # Adam divides by the gradient's size: ε above fp32's noise keeps that from being blown up to full steps.
    return {
        "learning_rate": RATE,
        "weight_decay": DECAY,
        "epsilon": 1e-5,
        "clip_gradient": 10.0,
        **mode.optimizer,
    }


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    base = tmp_path_factory.mktemp("modes")
    make_hf_model(base / "policy", seed=0, **SMALL)
    make_hf_model(base / "reference", seed=7, **SMALL)
    results = run_job(measure, base, directory=base)
    for name, mode in MODES.items():
        results[name]["expected"] = plain_pytorch(base, mode)
    return results


@pytest.mark.parametrize("name", EXACT)
def test_losses_equal_plain_pytorch(measured: dict[str, Any], name: str) -> None:
    found, expected = measured[name]["loss"], measured[name]["expected"]["loss"]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", EXACT)
def test_gradient_norms_equal_plain_pytorch(measured: dict[str, Any], name: str) -> None:
    found, expected = measured[name]["norm"], measured[name]["expected"]["norm"]
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", EXACT)
def test_exported_weights_equal_plain_pytorch(measured: dict[str, Any], name: str) -> None:
    """Also where parameters are gathered late: an export of stale ones would be off by the last update."""
    assert measured[name]["exported"] == pytest.approx(measured[name]["expected"]["exported"], rel=1e-4)


@pytest.mark.parametrize(
    "name", [name for name, mode in MODES.items() if mode.minibatches > 1 and name in EXACT]
)
def test_the_clip_takes_as_many_tokens_as_in_plain_pytorch(measured: dict[str, Any], name: str) -> None:
    found, expected = measured[name]["clipped"], measured[name]["expected"]["clipped"]
    assert max(expected) > 0.05, "the data never reach the clip"
    assert found == pytest.approx(expected, abs=0.02)  # a token may stand on the clip's edge


@pytest.mark.parametrize("name", EXACT)
def test_mismatch_is_that_of_the_policy_each_step_began_with(measured: dict[str, Any], name: str) -> None:
    """Over all of the step's minibatches: their largest, not their mean, and each token alike."""
    for step, expected in zip(
        measured[name]["mismatch"], measured[name]["expected"]["mismatch"], strict=True
    ):
        assert step == pytest.approx(expected, rel=5e-4)


@pytest.mark.parametrize("name", list(MODES))
def test_learning_rates_follow_their_formula(measured: dict[str, Any], name: str) -> None:
    assert measured[name]["rate"] == pytest.approx(measured[name]["expected"]["rate"], rel=1e-9)


@pytest.mark.parametrize("name", [name for name in MODES if name not in EXACT])
def test_bf16_stays_near_fp32(measured: dict[str, Any], name: str) -> None:
    found, expected = measured[name]["loss"], measured[name]["expected"]["loss"]
    assert found == pytest.approx(expected, rel=0.05, abs=0.01)


def test_recomputation_changes_no_bit(measured: dict[str, Any]) -> None:
    plain, recomputed = measured["no recomputation"], measured["recomputation"]
    assert [recomputed[key] for key in ("loss", "norm", "exported")] == [
        plain[key] for key in ("loss", "norm", "exported")
    ]


@pytest.mark.parametrize("name", GUARDED)
def test_a_fault_of_one_rank_keeps_the_update_out_on_all(measured: dict[str, Any], name: str) -> None:
    """Bit for bit: a rank that applied it would train another model from then on."""
    applied, kept_out = [True, True], [False, False]
    assert measured["guarded"][name] == [[applied, kept_out, kept_out, applied]] * 4


def measure(base: Path, report: Path) -> None:
    """In each rank: every mode's metrics, step by step; and what guards did."""
    results: dict[str, Any] = {"guarded": {}}
    with process_groups(Parallel(data_parallel=4), seed=1) as everyone:
        for name, mode in MODES.items():
            results[name] = _train(base, mode, arrange(layout(mode.layout), seed=1))
        for name in GUARDED:
            results["guarded"][name] = _guarded(base, arrange(layout(name), seed=1))
        if everyone.is_main:
            report.write_text(json.dumps(results))


def _train(base: Path, mode: Mode, placement: Placement) -> dict[str, Any]:
    options = {"dtype": "float32", **mode.model}
    model = Model(path=base / "policy", reference_path=base / "reference", **options)
    architecture = read_architecture(model.path)
    updates = STEPS * mode.minibatches
    policy = Policy(model, Optimizer(**optimizer_options(mode)), architecture, placement, updates)
    reference = Reference(model, architecture, placement)
    objective = Objective(
        a_method(**OBJECTIVE), temperature=TEMPERATURE, vocabulary=VOCABULARY, group=placement.tensor_group
    )
    steps = []
    for step in range(STEPS):
        minibatches = make_minibatches(placement, _seeds(step, mode))
        policy.annotate(minibatches, objective)
        reference.annotate(minibatches, objective)
        steps.append(policy.update(minibatches, objective, reference))
    exported = _exported(policy, architecture, placement)
    policy.close()
    return {
        "loss": [metrics["loss/total"] for metrics in steps],
        "clipped": [metrics["loss/clipped"] for metrics in steps],
        "norm": [metrics["optimizer/gradient_norm"] for metrics in steps],
        "rate": [metrics["optimizer/learning_rate"] for metrics in steps],
        "mismatch": [[metrics[f"mismatch/{name}"] for name in MISMATCHES] for metrics in steps],
        "exported": exported,
    }


def _guarded(base: Path, placement: Placement) -> list[list[tuple[bool, bool]]]:
    """Of each rank, of each update: whether its guards allow it, and whether weights or moments changed.

    The first replica's advantages are NaN in the second update, its engine's log-probs damaged in the third.
    """
    guards = Guards(_guarded_config(base), VOCABULARY, is_main=False)
    model = Model(path=base / "policy", dtype="float32")
    policy = Policy(model, Optimizer(learning_rate=RATE), read_architecture(model.path), placement, 4)
    objective = Objective(
        a_method(divergence_coefficient=0.0),
        temperature=TEMPERATURE,
        vocabulary=VOCABULARY,
        group=placement.tensor_group,
    )
    told = []
    for step in range(4):
        [minibatch] = make_minibatches(placement, [step])
        for microbatch in minibatch if placement.data_rank == 0 else ():
            microbatch.advantages.mul_(math.nan if step == 1 else 1.0)
            microbatch.engine_log_probs.sub_(1000.0 if step == 2 else 0.0)
        policy.annotate([minibatch], objective)
        guards.begin_step(step)
        allowed: list[bool] = []

        def allow(metrics: Any, damage: str | None, allowed: list[bool] = allowed) -> bool:
            allowed.append(guards.allow(metrics, damage))
            return allowed[-1]

        before = _bits(policy)
        policy.update([minibatch], objective, None, allow)
        told.append((*allowed, _bits(policy) != before))
    policy.close()
    return placement.share_from_all(told)


def _guarded_config(base: Path) -> RunConfig:
    options = {
        "run": {"directory": str(base / "run"), "steps": 4},
        "model": {"path": str(base / "policy")},
        "data": {"source": "arithmetic"},
        "rollout": {"prompts_per_step": 2, "max_response_tokens": 8},
        "guards": {"not_finite": "skip", "mismatch": "skip", "mismatch_limit": 100.0},
    }
    return validate(options, source="test")


def _bits(policy: Policy) -> list[bytes]:
    """This rank's weights and moments."""
    policy.synchronise_parameters()
    inner = [one.optimizer for one in getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])]
    moments = [value for one in inner for state in one.state.values() for value in state.values()]
    tensors = [*(p.detach() for chunk in policy.chunks for p in chunk.parameters()), *moments]
    return [
        t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        for t in tensors
        if isinstance(t, torch.Tensor)
    ]


def _seeds(step: int, mode: Mode) -> list[int]:
    return [step * mode.minibatches + index for index in range(mode.minibatches)]


def _exported(policy: Policy, architecture: Any, placement: Placement) -> float:
    """What the weights that engines would get come to: Σ of squares."""
    policy.synchronise_parameters()
    mine = sum(
        float(t.double().square().sum()) for _, t in hf_tensors(policy.chunks, architecture, placement)
    )
    total = torch.tensor(mine, dtype=torch.float64)
    dist.all_reduce(total)
    return float(total)


def plain_pytorch(base: Path, mode: Mode) -> dict[str, Any]:
    """The same metrics, from one process."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base / "policy", dtype=torch.float32)
    reference = AutoModelForCausalLM.from_pretrained(base / "reference", dtype=torch.float32)
    options = Optimizer(**optimizer_options(mode))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]  # biases and norms do not decay
    adam = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}],
        betas=(options.beta1, options.beta2),
        eps=options.epsilon,
    )
    total = STEPS * mode.minibatches
    steps = []
    for step in range(STEPS):
        old = copy.deepcopy(model)
        updates, sampled = [], []
        for seed in _seeds(step, mode):
            adam.zero_grad()
            loss, clipped, log_probs = _loss(model, old, reference, seed)
            sampled.append(log_probs)
            loss.backward()
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), options.clip_gradient)
            rate = learning_rate(options, seed + 1, total)
            for group in adam.param_groups:
                group["lr"] = rate
            adam.step()
            updates.append({"loss": loss.item(), "clipped": clipped, "norm": float(norm), "rate": rate})
        averaged: dict[str, Any] = {key: sum(u[key] for u in updates) / len(updates) for key in updates[0]}
        steps.append({**averaged, "mismatch": _mismatch(_seeds(step, mode), sampled)})
    exported = sum(float(p.detach().double().square().sum()) for p in model.parameters())
    return {**{key: [metrics[key] for metrics in steps] for key in steps[0]}, "exported": exported}


def _mismatch(seeds: list[int], sampled: list[np.ndarray]) -> list[float]:
    """`MISMATCHES` of the seeds' samples, by numpy; `sampled` are each seed's log-probs of all responses."""
    samples = [sample for seed in seeds for sample in make_samples(seed)]
    delta = np.concatenate(sampled) - np.concatenate(
        [sample.sequence.log_probs[sample.sequence.sampled] for sample in samples]
    )
    late = np.concatenate([np.arange(s.sequence.sampled_tokens) for s in samples]) >= 16
    divergence, size = np.exp(delta) - 1 - delta, np.abs(delta)
    return [
        float(size.mean()),
        float(size.max()),
        float(divergence.mean()),
        float(divergence[late].mean()),
    ]


def learning_rate(options: Optimizer, update: int, total: int) -> float:
    """Of update 1, 2, …, `total`: linear over the warm-up, then decaying from the full rate to the lowest."""
    if update <= options.warmup_updates:
        return options.learning_rate * update / options.warmup_updates
    if options.decay == "constant":
        return options.learning_rate
    progress = (update - 1 - options.warmup_updates) / (total - options.warmup_updates)
    share = {"linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[options.decay]
    return options.min_learning_rate + share * (options.learning_rate - options.min_learning_rate)


def _loss(model: Any, old: Any, reference: Any, seed: int) -> tuple[torch.Tensor, float, np.ndarray]:
    """The minibatch's loss, its clipped share, and the log-probs under `old` of all its responses."""
    loss, clipped, tokens, sampled = torch.zeros(()), 0.0, 0, []
    low, high = 1 - OBJECTIVE["clip_low"], 1 + OBJECTIVE["clip_high"]
    for sample in make_samples(seed):
        ids = torch.from_numpy(sample.sequence.token_ids).long()

        def log_softmax(
            network: Any, ids: torch.Tensor = ids, prompt: int = prompt_tokens(sample.sequence)
        ) -> torch.Tensor:
            return (network(ids[None]).logits[0, prompt - 1 : -1, :VOCABULARY] / TEMPERATURE).log_softmax(-1)

        chosen = ids[prompt_tokens(sample.sequence) :, None]
        log_policy = log_softmax(model)
        with torch.no_grad():
            log_reference = log_softmax(reference)
            old_log_prob = log_softmax(old).gather(1, chosen)
        sampled.append(old_log_prob.squeeze(1).numpy())
        ratio = (log_policy.gather(1, chosen) - old_log_prob).exp().squeeze(1)
        plain, bounded = ratio * sample.advantage, ratio.clamp(low, high) * sample.advantage
        entropy = -(log_policy.exp() * log_policy).sum(-1)
        flattened = (sample.phi * log_reference).log_softmax(-1)
        pull = (flattened.exp() * (flattened - log_policy)).sum(-1)
        per_token = (
            -torch.minimum(plain, bounded)
            + OBJECTIVE["divergence_coefficient"] * pull
            - OBJECTIVE["entropy_coefficient"] * entropy
        )
        loss = loss + sample.token_weight * per_token.sum()
        clipped += float((bounded < plain).sum())
        tokens += len(per_token)
    return loss, clipped / tokens, np.concatenate(sampled)
