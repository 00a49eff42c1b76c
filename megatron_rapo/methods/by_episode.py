"""Sums over the tokens of each response, of which every rank has some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_rapo.episode.group import Group
from megatron_rapo.methods.annotated import Annotated

if TYPE_CHECKING:
    from torch import Tensor

# As marks are fp32, whole numbers up to 2^24 are exact: so many responses a step can have.
_MARK = "response"


class Responses:
    """The responses of a step as `[groups, episodes]`, whose tokens carry the response's number as a mark."""

    def __init__(self, groups: Sequence[Group]) -> None:
        """Of all groups of the step."""
        self._shape = (len(groups), max(len(group.episodes) for group in groups))

    def marks(self) -> Mapping[str, Any]:
        """What `mark_responses` returns with its own."""
        return {_MARK: np.arange(np.prod(self._shape), dtype=np.float64).reshape(self._shape)}

    def sums(self, values: Tensor, tokens: Annotated) -> Any:
        """`[groups, episodes]` fp64, masked: a value's sum over each response's tokens, of all ranks.

        Responses that the minibatch has not, or that have no token, are masked.
        """
        count = self._shape[0] * self._shape[1]
        totals = values.new_zeros(2, count)
        places = tokens.marks[_MARK].long()
        totals[0].index_add_(0, places, values)
        totals[1].index_add_(0, places, values.new_ones(values.shape))
        gathered = tokens.of_all_ranks(totals.flatten()).reshape(-1, 2, count).sum(0)
        found, of_tokens = gathered.double().cpu().numpy()
        return np.ma.masked_where(of_tokens == 0, found).reshape(self._shape)

    def spread(self, values: Any, tokens: Annotated) -> Tensor:
        """`[tokens]`: the value of each token's response, of `[groups, episodes]`; 0 where it is masked."""
        import torch  # late: options are read without it

        flat = torch.from_numpy(np.ma.filled(values, 0.0).reshape(-1)).to(tokens.log_probs)
        return flat[tokens.marks[_MARK].long()]
