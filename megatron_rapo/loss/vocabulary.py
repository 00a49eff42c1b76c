"""Which rows of the vocabulary a tensor-parallel rank holds."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class VocabularyShard(NamedTuple):
    """This rank's rows of the head.

    Attributes:
        start: vocabulary index of the first local row.
        real: local rows that are real tokens; those behind them are padding, and have no probability.
        group: the tensor-parallel group.
    """

    start: int
    real: int
    group: dist.ProcessGroup

    @classmethod
    def of(cls, rows: int, vocabulary: int, group: dist.ProcessGroup) -> VocabularyShard:
        """The shard of a head of `rows` rows a rank of `group`, where `vocabulary` tokens are real."""
        start = rows * group.rank()
        return cls(start, min(max(vocabulary - start, 0), rows), group)

    def local_column(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each target is one of the real local rows, and which (0 where it is not)."""
        column = targets - self.start
        local = (column >= 0) & (column < self.real)
        return local, torch.where(local, column, 0)
