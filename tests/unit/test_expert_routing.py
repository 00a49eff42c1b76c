"""What routers measure, and their losses' share of the gradient, against transformers' router logits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_rapo.config import Model, Optimizer
from megatron_rapo.data.batching import Microbatch, Sample, pack
from megatron_rapo.embedded_server.published import published
from megatron_rapo.episode.sequence import Sequence
from megatron_rapo.loss.objective import Objective
from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.policy.expert_routing import ExpertRouting
from megatron_rapo.policy.gradients import accumulate_gradients, main_gradient
from megatron_rapo.policy.policy import Policy
from megatron_rapo.weights.export import hf_tensors
from tests.methods import a_method
from tests.models import make_hf_model
from tests.unit.one_rank import one_placement

BALANCE, Z = 0.3, 0.2
EXPERTS, CHOSEN = 4, 2
TOKENS = [np.arange(2, 14, dtype=np.int32), np.arange(20, 50, 3, dtype=np.int32)]  # unpadded: even numbers


@pytest.fixture(scope="module")
def charged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, dict[str, Tensor], Any]]:
    """A model, its gradient where the loss itself has none, and the metrics."""
    path = make_hf_model(tmp_path_factory.mktemp("routing") / "model", family="qwen3_moe")
    model = Model(path=path, dtype="float32", balance_coefficient=BALANCE, router_z_coefficient=Z)
    architecture = read_architecture(path)
    with one_placement() as placement:
        policy = Policy(model, Optimizer(distributed=False), architecture, placement, total_updates=1)
        method = a_method("grpo", divergence_coefficient=0.0)
        objective = Objective(method, temperature=1.0, vocabulary=61, group=placement.tensor_group)
        minibatch = [microbatch(token_ids) for token_ids in TOKENS]
        routing = ExpertRouting(policy.chunks, architecture, model, placement)
        routing.begin_step()
        routing.begin_update(minibatch)
        accumulate_gradients(policy.wrapped, minibatch, objective, None, placement)
        gradient = dict(hf_tensors(policy.chunks, architecture, placement, value=main_gradient))
        yield path, gradient, routing.metrics(replays=False)


def microbatch(token_ids: np.ndarray) -> Microbatch:
    log_probs = np.zeros(len(token_ids) - 1, np.float32)
    sample = Sample(Sequence.of_response(token_ids[:1], token_ids[1:], log_probs, 0), 0.0, 0.0, 1.0)
    return pack([sample], sequence_multiple=2, total_tokens=None, context_rank=0, context_ranks=1)


def test_losses_have_their_share_of_the_gradient_and_all_is_measured(charged: Any) -> None:
    path, gradient, metrics = charged
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    given = [torch.from_numpy(token_ids).long()[None] for token_ids in TOKENS]
    # Of each sequence [layers, tokens, experts].
    layers = [torch.stack(model(each, output_router_logits=True).router_logits) for each in given]
    tokens = sum(map(len, TOKENS))
    balance, picks = torch.zeros(()), torch.zeros(len(layers[0]), EXPERTS)
    for of_sequence in layers:
        probs = of_sequence.softmax(-1)
        chosen = torch.zeros_like(probs).scatter(-1, probs.topk(CHOSEN).indices, 1.0).sum(1)
        share = chosen / chosen.sum(1, keepdim=True)
        balance = balance + EXPERTS * (share * probs.mean(1)).sum() * probs.size(1) / tokens
        picks += chosen
    every = torch.cat(layers, dim=1)
    z = every.logsumexp(-1).square().mean(1).sum()
    (BALANCE * balance + Z * z).backward()
    expected = dict(
        published(
            {name: p.grad for name, p in model.named_parameters() if p.grad is not None},
            model.config.model_type,
        )
    )
    for name, found in gradient.items():
        wanted = expected.get(name, torch.zeros_like(found))
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert gradient["model.layers.0.mlp.gate.weight"].norm() > 1e-3

    load = picks / picks.mean(1, keepdim=True)
    entropy = -(every.softmax(-1) * every.log_softmax(-1)).sum(-1).mean()
    assert metrics == {
        "router/load_max": pytest.approx(float(load.max())),
        "router/load_min": pytest.approx(float(load.min())),
        "router/idle_experts": float((picks == 0).double().mean()),
        "router/entropy": pytest.approx(float(entropy) / math.log(EXPERTS), rel=1e-5),
        "router/balance_loss": pytest.approx(float(balance) / len(layers[0]), rel=1e-5),
        "router/z_loss": pytest.approx(float(z) / len(layers[0]), rel=1e-5),
    }
