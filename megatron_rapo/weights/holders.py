"""Who holds a tensor: asked of the layout here, and nowhere else.

Whoever exports, streams, plans or sums weights goes by the answer. All tensors of a pipeline stage have the
same holders, except those of experts: each is held by the ranks of one expert-parallel coordinate.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rapo.config import Parallel


@dataclass(frozen=True)
class Holders:
    """The ranks that hold a tensor.

    Attributes:
        copies: global ranks, copy by copy. The ranks of a copy have the tensor between them, in the order of
            its slices; where it is not cut, each of them has it whole.
    """

    copies: tuple[tuple[int, ...], ...]

    @property
    def senders(self) -> tuple[int, ...]:
        """Of the first copy, which is exported and sent as whole tensors."""
        return self.copies[0]

    @property
    def collector(self) -> int:
        """The sender that gathers the others' slices."""
        return self.senders[0]

    def slice_of(self, rank: int) -> int:
        """The number of the slice that a rank has."""
        return next(copy.index(rank) for copy in self.copies if rank in copy)


def holders(layout: Parallel, stage: int) -> Holders:
    """Who holds the tensors of a pipeline stage. Ranks count TP fastest, then CP, DP, PP (`Placement`)."""
    slices, ranks = layout.tensor_parallel, layout.stage
    firsts = range(stage * ranks, (stage + 1) * ranks, slices)
    return Holders(tuple(tuple(range(first, first + slices)) for first in firsts))


def expert_holders(layout: Parallel, stage: int, experts: int, expert: int) -> Holders:
    """Who holds an expert of a pipeline stage's layers, of so many experts in a layer.

    Of the same ranks as above it is expert TP that counts fastest, then EP, then expert DP, then PP.
    """
    slices = layout.expert_tensor_parallel
    place = expert // (experts // layout.expert_parallel)
    step = slices * layout.expert_parallel
    start = stage * layout.stage + place * slices
    firsts = range(start, start + step * layout.expert_copies, step)
    return Holders(tuple(tuple(range(first, first + slices)) for first in firsts))


def stage_of_layer(layout: Parallel, layers: int, layer: int) -> int:
    """The pipeline stage of a layer; both count from 0. Chunks of layers are dealt to the stages in turn."""
    chunks = layout.pipeline_parallel * (layout.virtual_pipeline_parallel or 1)
    return layer // (layers // chunks) % layout.pipeline_parallel
