"""The objective in plain PyTorch: `log_softmax` over full logits and autograd, one sequence at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from megatron_rapo.certify.plain_model import Weights, logits
from megatron_rapo.config import Algorithm
from megatron_rapo.data.batching import Sample
from megatron_rapo.model.architecture import Architecture


def plain_loss(
    policy: Weights,
    reference: Weights,
    architecture: Architecture,
    samples: Sequence[Sample],
    algorithm: Algorithm,
    *,
    temperature: float,
    vocabulary: int,
    max_response_tokens: int,
) -> Tensor:
    """The loss of a minibatch whose policy moved since the samples were drawn.

    The policy that they were drawn from is taken to have had the engine's log-probs. Token weights and
    advantages are inputs in fp32, whatever the model's type.
    """
    lengths = [int(sample.sequence.sampled.sum()) for sample in samples]
    weights = {
        "token_mean": [1.0 / sum(lengths) for _ in lengths],
        "sequence_mean": [1.0 / (len(lengths) * length) for length in lengths],
        "constant": [1.0 / (len(lengths) * max_response_tokens) for _ in lengths],
    }[algorithm.loss_aggregation]
    terms = []
    for sample, weight in zip(samples, weights, strict=True):
        token_ids = torch.from_numpy(sample.sequence.token_ids).long()
        predicting = torch.from_numpy(sample.sequence.sampled).roll(-1)

        def distribution(
            weights: Weights, token_ids: Tensor = token_ids, predicting: Tensor = predicting
        ) -> Tensor:
            own = logits(weights, architecture, token_ids)[predicting, :vocabulary]
            return (own / temperature).log_softmax(-1)

        with torch.no_grad():
            log_reference = distribution(reference)
        chosen = token_ids[predicting.roll(1)]
        per_token = _token_loss(distribution(policy), log_reference, chosen, sample, algorithm)
        terms.append(float(np.float32(weight)) * per_token.sum())
    return torch.stack(terms).sum()


def _token_loss(
    log_policy: Tensor, log_reference: Tensor, chosen: Tensor, sample: Sample, algorithm: Algorithm
) -> Tensor:
    log_prob = log_policy.gather(1, chosen[:, None]).squeeze(1)
    engine = sample.sequence.log_probs[sample.sequence.sampled]
    old = torch.from_numpy(engine).to(log_prob.dtype)
    entropy = -(log_policy.exp() * log_policy).sum(-1)

    log_ratio = log_prob - old
    if algorithm.ratio == "sequence":
        log_ratio = log_ratio.mean().expand_as(log_prob)
    ratio, advantage = log_ratio.exp(), float(np.float32(sample.advantage))
    clipped = ratio.clamp(1 - algorithm.clip_low, 1 + algorithm.clip_high)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    if algorithm.clip_dual is not None and advantage < 0:
        surrogate = surrogate.clamp(min=algorithm.clip_dual * advantage)

    divergence = _divergence(log_policy, log_reference, log_prob, old, chosen, sample, algorithm)
    return (
        -surrogate + algorithm.divergence_coefficient * divergence - algorithm.entropy_coefficient * entropy
    )


def _divergence(
    log_policy: Tensor,
    log_reference: Tensor,
    log_prob: Tensor,
    old: Tensor,
    chosen: Tensor,
    sample: Sample,
    algorithm: Algorithm,
) -> Tensor:
    # φ in fp32, as the product has it: its rounding is no matter of layouts.
    phi = algorithm.phi_floor + (1.0 - algorithm.phi_floor) * torch.tensor(sample.reward).clamp(0.0, 1.0)
    log_flattened = (phi.to(log_policy.dtype) * log_reference).log_softmax(-1)
    kind = algorithm.divergence
    if kind == "none":
        return torch.zeros_like(log_prob)
    if kind == "forward_exact":
        return (log_flattened.exp() * (log_flattened - log_policy)).sum(-1)
    if kind == "reverse_exact":
        return (log_policy.exp() * (log_policy - log_reference)).sum(-1)
    target = log_flattened if kind.startswith("forward") else log_reference
    log_rho = (target.gather(1, chosen[:, None]).squeeze(1) - log_prob).clamp(-10.0, math.log(10.0))
    rho = log_rho.exp()
    estimates = {
        "k1": -log_rho,
        "k2": log_rho.square() / 2,
        "k3": rho - log_rho - 1,
        "forward_printed": rho * log_rho - rho + 1,
        "forward_sampled": (log_prob - old).exp() * (rho * log_rho - rho + 1),
    }
    return estimates[kind]
