"""The log-likelihood of tokens, as a term: supervised learning where a response was given, not sampled."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from megatron_rapo.methods.terms.term import AtToken, Term

if TYPE_CHECKING:
    from torch import Tensor


class Likelihood(Term):
    """−m · log π at each token, m a mark of the method: 1 where the token is to be learnt, 0 elsewhere.

    The mark may be any weight. No ratio and no clip: where responses were sampled this is REINFORCE.

    Attributes:
        mark: its name, by which the term also reports itself.
    """

    def __init__(self, mark: str) -> None:
        self.mark = mark
        self.reads = frozenset({mark})

    def __call__(self, token: AtToken) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Reports itself by the mark's name."""
        loss = -token.marks[self.mark].to(token.log_prob.dtype) * token.log_prob
        return loss, {self.mark: loss}
