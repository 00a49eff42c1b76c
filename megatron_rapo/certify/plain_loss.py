"""A method's loss in plain PyTorch: `log_softmax` over full logits and autograd, one sequence at a time.

The terms are the method's own; what they read of a token is computed anew here. That their formulas are right
is asked by tests of each.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_rapo.data.batching import Sample
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
) -> Tensor:
    """The loss of a minibatch whose policy moved since the samples were drawn.

    The policy that they were drawn from is taken to have had the engine's log-probs, so importance weights
    are 1. Token weights and advantages are inputs in fp32, whatever the model's type.
    """
    losses = []
    for sample in samples:
        token_ids = torch.from_numpy(sample.sequence.token_ids).long()
        predicting = torch.from_numpy(sample.sequence.trained).roll(-1)

        def distribution(
            model: PlainModel, token_ids: Tensor = token_ids, predicting: Tensor = predicting
        ) -> Tensor:
            own = model.logits(token_ids)[predicting, :vocabulary]
            return (own / temperature).log_softmax(-1)

        with torch.no_grad():
            log_reference = distribution(reference)
            log_teacher = None if teacher is None else distribution(teacher)
        chosen = token_ids[predicting.roll(1)]
        per_token = _token_loss(distribution(policy), log_reference, log_teacher, chosen, sample, method)
        losses.append((_of_tokens(sample.token_weight, per_token) * per_token).sum())
    return torch.stack(losses).sum()


def _token_loss(
    log_policy: Tensor,
    log_reference: Tensor,
    log_teacher: Tensor | None,
    chosen: Tensor,
    sample: Sample,
    method: Method,
) -> Tensor:
    def of_chosen(log_probs: Tensor) -> Tensor:
        return log_probs.gather(1, chosen[:, None]).squeeze(1)

    log_prob = of_chosen(log_policy)
    engine = np.nan_to_num(sample.sequence.log_probs[sample.sequence.trained])
    old = torch.from_numpy(engine).to(log_prob.dtype)
    phi = _of_tokens(sample.phi, old)  # in fp32, as the product has it: its rounding is no matter of layouts
    log_flattened = (phi[:, None] * log_reference).log_softmax(-1)
    everything = {
        Need.FORWARD_KL: (log_flattened.exp() * (log_flattened - log_policy)).sum(-1),
        Need.REVERSE_KL: (log_policy.exp() * (log_policy - log_reference)).sum(-1),
        Need.FLATTENED_LOG_PROB: of_chosen(log_flattened),
        Need.REFERENCE_LOG_PROB: of_chosen(log_reference),
        Need.SEQUENCE_LOG_RATIO: (log_prob - old).mean().detach().expand_as(log_prob),
        Need.IMPORTANCE: torch.ones_like(log_prob),
        Need.SEQUENCE_IMPORTANCE: torch.ones_like(log_prob),
        **({} if log_teacher is None else _of_teacher(log_policy, log_teacher, method.mixture)),
    }
    at_token = AtToken(
        log_prob=log_prob,
        entropy=-(log_policy.exp() * log_policy).sum(-1),
        old_log_prob=old,
        engine_log_prob=old,
        advantage=_of_tokens(sample.advantage, old),
        phi=phi,
        position=torch.arange(len(old)),
        marks={name: _of_tokens(value, old) for name, value in sample.marks.items()},
        **{need.value: everything[need] for need in method.needs},
    )
    return torch.stack([coefficient * term(at_token)[0] for coefficient, term in method.terms()]).sum(0)


def _of_teacher(log_policy: Tensor, log_teacher: Tensor, share: float) -> dict[Need, Tensor]:
    policy, teacher = log_policy.exp(), log_teacher.exp()
    log_mixture = ((1.0 - share) * policy + share * teacher).log()
    apart = (policy * (log_policy - log_mixture)).sum(-1), (teacher * (log_teacher - log_mixture)).sum(-1)
    return {
        Need.TEACHER_FORWARD_KL: (teacher * (log_teacher - log_policy)).sum(-1),
        Need.TEACHER_REVERSE_KL: (policy * (log_policy - log_teacher)).sum(-1),
        Need.TEACHER_JENSEN_SHANNON: (1.0 - share) * apart[0] + share * apart[1],
    }


def _of_tokens(value: float | np.ndarray, like: Tensor) -> Tensor:
    """A value of all tokens, or one of each, `[tokens]`, rounded to fp32."""
    rounded = np.broadcast_to(np.asarray(value, np.float32), like.shape)
    return torch.from_numpy(rounded.copy()).to(like.dtype)
