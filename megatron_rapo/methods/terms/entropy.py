"""The entropy of the policy, as a term: a bonus where its coefficient is negative."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from megatron_rapo.methods.terms.term import AtToken, Term

if TYPE_CHECKING:
    from torch import Tensor


class Entropy(Term):
    """H(π) = −Σ π log π, exact over the vocabulary. It is reported of every method, so not here."""

    def __call__(self, token: AtToken) -> tuple[Tensor, Mapping[str, Tensor]]:
        """`[tokens]`."""
        return token.entropy, {}
