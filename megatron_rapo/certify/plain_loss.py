"""A method's loss in plain PyTorch: `log_softmax` over full logits and autograd, one sequence at a time.

The terms are the method's own; what they read of a token is computed anew here. That their formulas are right
is asked by tests of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_rapo.data.batching import Sample
from megatron_rapo.methods.annotated import Annotated
from megatron_rapo.methods.method import Method
from megatron_rapo.methods.terms.term import AtToken, Need
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.families.named import family_of


@dataclass(frozen=True)
class PlainModel:
    """A model's weights by HF name, and what it is."""

    weights: Mapping[str, Tensor]
    architecture: Architecture

    def logits(self, token_ids: Tensor) -> Tensor:
        """`[tokens, rows]` of one sequence `[tokens]`."""
        return family_of(self.architecture).plain(self.weights, self.architecture, token_ids)


def plain_loss(
    policy: PlainModel,
    reference: PlainModel,
    teacher: PlainModel | None,
    samples: Sequence[Sample],
    method: Method,
    *,
    temperature: float,
    vocabulary: int,
) -> tuple[Tensor, float]:
    """The loss of a minibatch whose policy moved since the samples were drawn, and Σ |loss| of its tokens.

    The policy that they were drawn from is taken to have had the engine's log-probs, so importance weights
    are 1; what a method makes of all tokens is made of these (`old_entropies`). Token weights and
    advantages are inputs, rounded to fp32; what is made of them has the model's type.
    """
    everything = [
        _of_sample(sample, policy, reference, teacher, method, temperature=temperature, vocabulary=vocabulary)
        for sample in samples
    ]
    weights, marks = _annotations(samples, everything, method)
    losses: list[Tensor] = []
    size = 0.0
    for sample, found, weight, own in zip(samples, everything, weights, marks, strict=True):
        old = _engine(sample).to(found[Need.IMPORTANCE].dtype)
        at_token = AtToken(
            log_prob=found["log_prob"],
            entropy=found["entropy"],
            old_log_prob=old,
            engine_log_prob=old,
            advantage=_of_tokens(sample.advantage, old),
            phi=_of_tokens(sample.phi, old),
            position=torch.arange(len(old)),
            marks=own,
            **{need.value: found[need] for need in method.needs},
        )
        terms = [coefficient * term(at_token)[0] for coefficient, term in method.terms()]
        of_tokens = weight * torch.stack(terms).sum(0)
        losses.append(of_tokens.sum())
        size += float(of_tokens.detach().abs().sum())
    return torch.stack(losses).sum(), size


def old_entropies(engine_log_probs: Tensor) -> Tensor:
    """What stands for the entropies of the policy that samples were drawn from: a number of each token."""
    return -engine_log_probs


def tempered_log_probs(engine_log_probs: Tensor, tempered: float) -> Tensor:
    """What stands for its log-probs at another temperature."""
    return engine_log_probs / tempered


def _annotations(
    samples: Sequence[Sample], everything: Sequence[Mapping[Any, Tensor]], method: Method
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Weights and marks of each sample's tokens, as a method makes them of all tokens."""
    dtype = everything[0]["log_prob"].dtype
    engine = [_engine(sample).to(dtype) for sample in samples]
    counts = [len(own) for own in engine]

    def joined(values: Sequence[Any]) -> Tensor:
        return torch.cat([_of_tokens(value, own) for value, own in zip(values, engine, strict=True)])

    old = torch.cat(engine)
    tokens = Annotated(
        weights=joined([sample.token_weight for sample in samples]),
        advantages=joined([sample.advantage for sample in samples]),
        phi=joined([sample.phi for sample in samples]),
        positions=torch.cat([torch.arange(count) for count in counts]),
        engine_log_probs=old,
        old_log_probs=old,
        old_entropies=old_entropies(old),
        tempered_log_probs=None if method.tempered is None else tempered_log_probs(old, method.tempered),
        reference_log_probs=torch.cat([found[Need.REFERENCE_LOG_PROB] for found in everything]),
        marks={name: joined([sample.marks[name] for sample in samples]) for name in samples[0].marks},
        log_probs=old,
        entropies=old_entropies(old),
        of_all_ranks=lambda values: values,
    )
    weights = method.weigh(tokens)
    marks = {**tokens.marks, **method.mark_tokens(replace(tokens, weights=weights))}
    of_samples = [values.to(dtype).split(counts) for values in marks.values()]
    by_sample = [dict(zip(marks, own, strict=True)) for own in zip(*of_samples, strict=True)]
    return list(weights.to(dtype).split(counts)), by_sample or [{} for _ in samples]


def _of_sample(
    sample: Sample,
    policy: PlainModel,
    reference: PlainModel,
    teacher: PlainModel | None,
    method: Method,
    *,
    temperature: float,
    vocabulary: int,
) -> dict[Any, Tensor]:
    """All that a term may need of a sample's tokens, and `log_prob` and `entropy`."""
    token_ids = torch.from_numpy(sample.sequence.token_ids).long()
    predicting = torch.from_numpy(sample.sequence.trained).roll(-1)

    def distribution(model: PlainModel) -> Tensor:
        own = model.logits(token_ids)[predicting, :vocabulary]
        return (own / temperature).log_softmax(-1)

    def of_chosen(log_probs: Tensor) -> Tensor:
        return log_probs.gather(1, token_ids[predicting.roll(1)][:, None]).squeeze(1)

    with torch.no_grad():
        log_reference = distribution(reference)
        log_teacher = None if teacher is None else distribution(teacher)
    log_policy = distribution(policy)
    log_prob = of_chosen(log_policy)
    # In fp32, as the product has them: their rounding is no matter of layouts.
    old, phi = _engine(sample).to(log_prob.dtype), _of_tokens(sample.phi, log_prob)
    log_flattened = (phi[:, None] * log_reference).log_softmax(-1)
    return {
        "log_prob": log_prob,
        "entropy": -(log_policy.exp() * log_policy).sum(-1),
        Need.FORWARD_KL: (log_flattened.exp() * (log_flattened - log_policy)).sum(-1),
        Need.REVERSE_KL: (log_policy.exp() * (log_policy - log_reference)).sum(-1),
        Need.JENSEN_SHANNON: _jensen_shannon(log_policy, log_reference, method.mixture),
        Need.FLATTENED_LOG_PROB: of_chosen(log_flattened),
        Need.REFERENCE_LOG_PROB: of_chosen(log_reference),
        Need.SEQUENCE_LOG_RATIO: (log_prob - old).mean().detach().expand_as(log_prob),
        Need.IMPORTANCE: torch.ones_like(log_prob),
        Need.SEQUENCE_IMPORTANCE: torch.ones_like(log_prob),
        **({} if log_teacher is None else _of_teacher(log_policy, log_teacher, method.mixture)),
    }


def _engine(sample: Sample) -> Tensor:
    """`[tokens]` fp32: the engine's log-probs, 0 where a token was given."""
    return torch.from_numpy(np.nan_to_num(sample.sequence.log_probs[sample.sequence.trained]))


def _of_teacher(log_policy: Tensor, log_teacher: Tensor, share: float) -> dict[Need, Tensor]:
    policy, teacher = log_policy.exp(), log_teacher.exp()
    return {
        Need.TEACHER_FORWARD_KL: (teacher * (log_teacher - log_policy)).sum(-1),
        Need.TEACHER_REVERSE_KL: (policy * (log_policy - log_teacher)).sum(-1),
        Need.TEACHER_JENSEN_SHANNON: _jensen_shannon(log_policy, log_teacher, share),
    }


def _jensen_shannon(log_policy: Tensor, log_other: Tensor, share: float) -> Tensor:
    policy, other = log_policy.exp(), log_other.exp()
    log_mixture = ((1.0 - share) * policy + share * other).log()
    apart = (policy * (log_policy - log_mixture)).sum(-1), (other * (log_other - log_mixture)).sum(-1)
    return (1.0 - share) * apart[0] + share * apart[1]


def _of_tokens(value: float | np.ndarray, like: Tensor) -> Tensor:
    """A value of all tokens, or one of each, `[tokens]`, rounded to fp32."""
    rounded = np.broadcast_to(np.asarray(value, np.float32), like.shape)
    return torch.from_numpy(rounded.copy()).to(like.dtype)
