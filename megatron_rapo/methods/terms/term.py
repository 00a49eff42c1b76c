"""A term of a loss: what it reads of a token, and what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor


class Need(Enum):
    """What a term reads beyond what every token has; the value is the field of `AtToken` that then is set."""

    FORWARD_KL = "forward_kl"
    REVERSE_KL = "reverse_kl"
    JENSEN_SHANNON = "jensen_shannon"
    FLATTENED_LOG_PROB = "flattened_log_prob"
    REFERENCE_LOG_PROB = "reference_log_prob"
    SEQUENCE_LOG_RATIO = "sequence_log_ratio"
    IMPORTANCE = "importance"
    SEQUENCE_IMPORTANCE = "sequence_importance"
    TEACHER_FORWARD_KL = "teacher_forward_kl"
    TEACHER_REVERSE_KL = "teacher_reverse_kl"
    TEACHER_JENSEN_SHANNON = "teacher_jensen_shannon"


OF_ITS_DISTRIBUTION = frozenset({Need.FORWARD_KL, Need.REVERSE_KL, Need.JENSEN_SHANNON})
"""Of the reference: its log-prob of the sampled token is not enough, so its final hidden states are kept."""

OF_THE_REFERENCE = OF_ITS_DISTRIBUTION | {Need.FLATTENED_LOG_PROB, Need.REFERENCE_LOG_PROB}
"""For which there must be a reference model."""

OF_THE_TEACHER = frozenset({Need.TEACHER_FORWARD_KL, Need.TEACHER_REVERSE_KL, Need.TEACHER_JENSEN_SHANNON})
"""For which there must be a teacher (`[teacher]`)."""

OF_IMPORTANCE = frozenset({Need.IMPORTANCE, Need.SEQUENCE_IMPORTANCE})
"""On which `algorithm.importance_correction` has an effect."""

OF_SEQUENCES = frozenset({Need.SEQUENCE_LOG_RATIO, Need.SEQUENCE_IMPORTANCE})
"""Means over a response's tokens."""


class AtToken(NamedTuple):
    """What a term is made of, `[tokens]` each, of response tokens; log-probs and entropies in nats.

    With π the policy, π_old that with which the step began, μ the engine's, q the reference, p the reference
    flattened by φ, and τ the teacher. What a term does not need may be None.

    Attributes:
        log_prob: log π of the sampled token; differentiable.
        entropy: of π, exact over the vocabulary; differentiable.
        old_log_prob: log π_old of the sampled token.
        engine_log_prob: log μ of it, as sampled.
        advantage: of the method, in fp32.
        phi: the power that flattens the reference.
        position: int64, in the response, from 0.
        forward_kl: KL(p ‖ π), exact over the vocabulary; differentiable.
        reverse_kl: KL(π ‖ q), exact over the vocabulary; differentiable.
        jensen_shannon: (1 − β) KL(π ‖ M) + β KL(q ‖ M), M = (1 − β) π + β q, β `Method.mixture`; likewise.
        flattened_log_prob: log p of the sampled token.
        reference_log_prob: log q of the sampled token.
        sequence_log_ratio: the mean of log π − log π_old over the token's response; a constant.
        importance: the weight of the token for having been sampled by μ, not π_old
            (`algorithm.importance_correction`).
        sequence_importance: the mean of these weights over the token's response.
        marks: the method's own numbers by name (`Method.mark_responses`, `Method.mark_tokens`); constants.
        teacher_forward_kl: KL(τ ‖ π), exact over the vocabulary; differentiable.
        teacher_reverse_kl: KL(π ‖ τ), likewise.
        teacher_jensen_shannon: (1 − β) KL(π ‖ M) + β KL(τ ‖ M), M = (1 − β) π + β τ, β `Method.mixture`;
            likewise.
    """

    log_prob: Tensor
    entropy: Tensor
    old_log_prob: Tensor
    engine_log_prob: Tensor
    advantage: Tensor
    phi: Tensor
    position: Tensor
    forward_kl: Tensor | None = None
    reverse_kl: Tensor | None = None
    jensen_shannon: Tensor | None = None
    flattened_log_prob: Tensor | None = None
    reference_log_prob: Tensor | None = None
    sequence_log_ratio: Tensor | None = None
    importance: Tensor | None = None
    sequence_importance: Tensor | None = None
    marks: Mapping[str, Tensor] = MappingProxyType({})
    teacher_forward_kl: Tensor | None = None
    teacher_reverse_kl: Tensor | None = None
    teacher_jensen_shannon: Tensor | None = None


class Term:
    """One term of a loss, to be minimised. Autograd takes its gradient.

    Attributes:
        needs: what it reads beyond what every token has.
        reads: the marks of its method that it reads.
    """

    needs: frozenset[Need] = frozenset()
    reads: frozenset[str] = frozenset()

    def __call__(self, token: AtToken) -> tuple[Tensor, Mapping[str, Tensor]]:
        """The term's value at each token, and what is reported of it.

        It must be made token by token: a value may depend on what is given of the same token only. Any
        number of tokens may be asked for at once, and none.

        Returns:
            `[tokens]`, and named `[tokens]`, of which the metrics are means over all response tokens.
        """
        raise NotImplementedError

    def metrics(self, means: Mapping[str, float]) -> Mapping[str, float]:
        """Metrics of what was reported, from its means: `loss/<name>`, or the name itself with a slash."""
        return {name if "/" in name else f"loss/{name}": value for name, value in means.items()}


def present(value: Tensor | None) -> Tensor:
    """What a term needs, which is then there."""
    assert value is not None, "the term reads what its `needs` do not name"
    return value
