"""One microbatch through the objective: what it reports, and what must not break it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rapo.config import Algorithm
from megatron_rapo.data.batching import Microbatch, Sample, pack
from megatron_rapo.loss.divergence import LOG_RATIO_BOUNDS
from megatron_rapo.loss.objective import HeadStates, Objective
from tests.unit.one_rank import one_rank

ROWS, VOCABULARY, HIDDEN, TEMPERATURE = 13, 11, 7, 0.9


@pytest.fixture(scope="module", autouse=True)
def group(tmp_path_factory: pytest.TempPathFactory):
    with one_rank(tmp_path_factory.mktemp("store")):
        yield


def microbatch(weights=(0.05, 0.1), dtype=np.float32, responses=(6, 9)) -> Microbatch:
    random = np.random.default_rng(0)
    return pack(
        [
            Sample(
                token_ids=random.integers(0, VOCABULARY, prompt + response).astype(np.int32),
                prompt_tokens=prompt,
                engine_log_probs=random.normal(-2.0, 0.5, response).astype(dtype),
                reward=float(number),
                advantage=float(random.normal()),
                token_weight=weight,
            )
            for number, (prompt, response, weight) in enumerate(
                [(2, responses[0], weights[0]), (3, responses[1], weights[1])]
            )
        ],
        sequence_multiple=4,
    )


def states(tokens: int, seed: int) -> HeadStates:
    random = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=random, dtype=torch.float64)
    weight = torch.randn(ROWS, HIDDEN, generator=random, dtype=torch.float64) * 0.3
    return HeadStates(hidden.requires_grad_(seed == 0), weight.requires_grad_(seed == 0))


def objective(**options: Any) -> Objective:
    return Objective(
        Algorithm(loss_chunk_tokens=4, **options),
        temperature=TEMPERATURE,
        vocabulary=VOCABULARY,
        group=torch.distributed.group.WORLD,
    )


def log_distribution(of: HeadStates) -> torch.Tensor:
    return ((of.hidden @ of.weight.T)[:, :VOCABULARY] / TEMPERATURE).log_softmax(-1).detach()


def weighted(weights: torch.Tensor, values: torch.Tensor) -> float:
    return float((weights * values).sum() / weights.sum())


def test_the_audit_reports_bias_and_variance_of_the_estimators():
    batch, subject = microbatch(), objective(audit_estimators=True)
    chosen = batch.is_response
    policy, reference = states(int(chosen.sum()), 0), states(int(chosen.sum()), 1)
    _, sums, _ = subject(batch, policy, reference)
    metrics = subject.metrics(sums)

    weights, phi = batch.weights[chosen].double(), 0.5 + 0.5 * batch.rewards[chosen].double()
    log_policy, log_reference = log_distribution(policy), log_distribution(reference)
    flattened = (phi[:, None] * log_reference).log_softmax(-1)
    exact_forward = (flattened.exp() * (flattened - log_policy)).sum(-1)
    exact_reverse = (log_policy.exp() * (log_policy - log_reference)).sum(-1)
    at = batch.targets[chosen][:, None]
    pick = {
        "reverse": (log_reference - log_policy).gather(1, at).squeeze(1).clamp(*LOG_RATIO_BOUNDS),
        "forward": (flattened - log_policy).gather(1, at).squeeze(1).clamp(*LOG_RATIO_BOUNDS),
    }
    rho = pick["forward"].exp()
    errors = {
        "k1": -pick["reverse"] - exact_reverse,
        "k2": pick["reverse"].square() / 2 - exact_reverse,
        "k3": pick["reverse"].exp() - pick["reverse"] - 1 - exact_reverse,
        "forward_printed": rho * pick["forward"] - rho + 1 - exact_forward,
    }
    assert metrics["audit/forward_kl"] == pytest.approx(weighted(weights, exact_forward))
    assert metrics["audit/reverse_kl"] == pytest.approx(weighted(weights, exact_reverse))
    for name, error in errors.items():
        bias = weighted(weights, error)
        assert metrics[f"audit/{name}_bias"] == pytest.approx(bias)
        variance = weighted(weights, (error - bias).square())
        assert metrics[f"audit/{name}_variance"] == pytest.approx(variance)


def test_importance_is_reported_whether_or_not_it_is_corrected():
    batch = microbatch()
    chosen = batch.is_response
    policy = states(int(chosen.sum()), 0)
    ratio = (
        log_distribution(policy).gather(1, batch.targets[chosen][:, None]).squeeze(1)
        - batch.engine_log_probs[chosen]
    )
    weights = batch.weights[chosen].double()
    for correction in ("off", "truncated", "masked"):
        options = {} if correction == "off" else {"importance_correction": correction, "importance_cap": 1.2}
        subject = objective(divergence="none", **options)
        metrics = subject.metrics(subject(batch, policy, None)[1])
        u = ratio.exp()
        assert metrics["importance/mean"] == pytest.approx(weighted(weights, u))
        effective = weighted(weights, u) ** 2 / weighted(weights, u.square())
        assert metrics["importance/effective_samples"] == pytest.approx(effective)
        touched = {"off": torch.zeros_like(u), "truncated": u > 1.2, "masked": (u > 1.2) | (u < 1 / 1.2)}
        assert metrics["importance/corrected"] == pytest.approx(
            weighted(weights, touched[correction].double())
        )


def test_mismatch_is_that_of_the_policy_that_sampled_by_position_in_the_response():
    """Also where the policy has moved since; every chunk of the loss counts."""
    lengths = (70, 1100)
    batch = microbatch(responses=lengths)
    chosen = batch.is_response
    policy = states(int(chosen.sum()), 0)
    sampled = log_distribution(policy).gather(1, batch.targets[chosen][:, None]).squeeze(1).numpy()
    position = np.concatenate([np.arange(length) for length in lengths])
    weight = np.repeat([0.05, 0.1], lengths)
    engine = batch.engine_log_probs[chosen].double().numpy()
    for old in (None, sampled - 0.3 * np.sin(position)):
        if old is not None:
            batch.old_log_probs = torch.zeros(len(chosen), dtype=torch.float64)
            batch.old_log_probs[chosen] = torch.from_numpy(old)
        delta = (sampled if old is None else old) - engine
        expected = {}
        stretches = {"0_15": (0, 16), "16_63": (16, 64), "64_255": (64, 256), "256_1023": (256, 1024)}
        for name, (first, end) in {"": (0, 5000), **stretches, "1024_4095": (1024, 4096)}.items():
            at = (position >= first) & (position < end)
            where = f"/{name}" if name else ""
            expected[f"mismatch/log_prob_mean{where}"] = np.average(np.abs(delta[at]), weights=weight[at])
            expected[f"mismatch/log_prob_max{where}"] = np.abs(delta[at]).max()
            k3 = np.exp(delta[at]) - 1 - delta[at]
            expected[f"mismatch/kl{where}"] = np.average(k3, weights=weight[at])
        *_, mismatch = objective(divergence="none")(batch, policy, None)
        assert mismatch.metrics() == pytest.approx(expected, rel=1e-5)


def test_clamped_log_ratios_are_counted():
    batch, subject = microbatch(), objective(divergence="k3", divergence_coefficient=1.0)
    tokens = int(batch.is_response.sum())
    policy = states(tokens, 0)
    log_prob = log_distribution(policy).gather(1, batch.targets[batch.is_response][:, None]).squeeze(1)
    batch.reference_log_probs = log_prob.clone()
    batch.reference_log_probs[0] += math.log(10.0) + 1.0
    metrics = subject.metrics(subject(batch, policy, None)[1])
    weights = batch.weights[batch.is_response]
    assert metrics["loss/log_ratio_clamped"] == pytest.approx(float(weights[0] / weights.sum()))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_counted(value):
    batch, subject = microbatch(), objective(divergence="none")
    policy = states(int(batch.is_response.sum()), 0)
    with torch.no_grad():
        policy.hidden[3] = value
    _, sums, _ = subject(batch, policy, None)
    assert subject.metrics(sums)["loss/not_finite"] > 0


def test_a_microbatch_without_response_tokens_has_no_loss_and_no_gradient():
    batch, subject = microbatch(weights=(0.0, 0.0)), objective()
    policy, reference = states(0, 0), states(0, 1)
    loss, sums, mismatch = subject(batch, policy, reference)
    loss.backward()
    assert loss.item() == 0.0
    assert not policy.weight.grad.any()
    assert all(math.isfinite(value) for value in subject.metrics(sums).values())
    assert dict(mismatch.metrics()) == {
        f"mismatch/{name}": 0.0 for name in ("log_prob_mean", "log_prob_max", "kl")
    }
