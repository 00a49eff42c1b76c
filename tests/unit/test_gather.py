"""Slices of tensor-parallel ranks, laid side by side, against the tensor that they were cut from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_rapo.certify.certificate import DEFAULT
from megatron_rapo.weights import gather
from megatron_rapo.weights.gather import StageWeights
from megatron_rapo.weights.holders import Holders
from megatron_rapo.weights.tensor_table import HFTensor

RANKS = 3
HOLDERS = Holders(((4, 5, 6), (7, 8, 9)))


def slices_of(held: Tensor, rank: int) -> StageWeights:
    """A rank's weights that are this slice, without a model."""

    class Slices(StageWeights):
        def local(self, name: str) -> Tensor:
            return held

    group = SimpleNamespace(size=lambda: RANKS)
    placement = SimpleNamespace(group_of={HOLDERS.senders: group}.__getitem__, rank=HOLDERS.senders[rank])
    return Slices([], DEFAULT, cast(Any, placement))


@pytest.mark.parametrize(
    ("shape", "cut"),
    [((6, 4), 0), ((5, 4), 0), ((1, 4), 0), ((4, 6), 1), ((7,), None)],
    ids=["rows", "padding in the last slice", "slices of padding alone", "columns", "not cut"],
)
def test_slices_make_the_whole_tensor(shape: tuple[int, ...], cut: int | None, monkeypatch) -> None:
    """The ranks run one after the other, and messages lie in a box in between."""
    whole = torch.arange(1.0, 1 + torch.Size(shape).numel()).reshape(shape)
    padding = torch.full((-shape[0] % RANKS if cut == 0 else 0, *shape[1:]), -1.0)
    slices = [whole] * RANKS if cut is None else torch.cat([whole, padding]).chunk(RANKS, cut)
    box: dict[int, Tensor] = {}
    rank = 0

    def exchange(operations: list[Any]) -> list[Any]:
        for operation, values, peer in operations:
            assert values.is_contiguous()  # as backends demand
            if operation is dist.isend:
                assert peer == 0
                box[rank] = values.clone()
            else:
                values.copy_(box.pop(peer))
        return []

    monkeypatch.setattr(
        gather.dist, "P2POp", lambda operation, values, group, group_peer: (operation, values, group_peer)
    )
    monkeypatch.setattr(gather.dist, "batch_isend_irecv", exchange)
    out = torch.zeros(shape)
    for rank in reversed(range(RANKS)):
        slices_of(slices[rank], rank).gather(HFTensor("", shape, cut, HOLDERS), None if rank else out)
    torch.testing.assert_close(out, whole, rtol=0, atol=0)
    assert not box, "all that was sent has been received"


@pytest.mark.parametrize(
    ("cut", "part"), [(None, range(8)), (0, range(3, 6)), (0, range(4, 5)), (1, range(3, 4))]
)
def test_the_part_of_a_transfer_is_cut_from_this_ranks_slice(cut: int | None, part: range) -> None:
    """Parts count from the whole tensor's start; this is rank 1."""
    whole = torch.arange(54.0).reshape(9, 6)
    weights = slices_of(whole if cut is None else whole.chunk(RANKS, cut)[1], rank=1)
    transfer = cast(Any, SimpleNamespace(tensor=HFTensor("", (9, 6), cut, HOLDERS), part=part))
    expected = whole if cut is None else whole.index_select(cut, torch.tensor(part))
    torch.testing.assert_close(weights.local_part(transfer), expected)
