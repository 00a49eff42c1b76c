"""The slices that several ranks hold, gathered into whole HF tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_model import GPTModel
from torch import Tensor

from megatron_rapo.config import Adapter
from megatron_rapo.model.adapters import merged
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.parallel.placement import Placement
from megatron_rapo.weights.parameter_map import MappedParameter, mapped_parameters
from megatron_rapo.weights.plan import Transfer
from megatron_rapo.weights.tensor_table import HFTensor


class StageWeights:
    """This rank's parameters by the HF tensors that they hold slices of."""

    def __init__(
        self,
        chunks: Sequence[GPTModel],
        architecture: Architecture,
        placement: Placement,
        value: Callable[[torch.nn.Parameter], Tensor] = merged,
        adapter: Adapter | None = None,
    ) -> None:
        """
        Args:
            chunks: this rank's.
            architecture: of the model.
            placement: this rank's.
            value: what of a parameter is meant: itself, an adapter merged into it, or a tensor of its shape
                (its gradient, say).
            adapter: its parameters are meant, and not the model's.
        """
        self._architecture = architecture
        self._value = value
        self._placement = placement
        self._held = {
            name: (mapped, index)
            for mapped in mapped_parameters(chunks, architecture, adapter)
            if not mapped.rule.copy
            for index, name in enumerate(mapped.rule.hf)
        }
        # A fused parameter is split once for its tensors, which the table has one after the other.
        self._split: tuple[MappedParameter | None, Sequence[Tensor]] = (None, [])

    @property
    def names(self) -> set[str]:
        """The HF tensors that this rank has slices of, or copies."""
        return set(self._held)

    def local(self, name: str) -> Tensor:
        """This rank's slice of a tensor, vocabulary padding included."""
        mapped, index = self._held[name]
        if self._split[0] is not mapped:
            value = self._value(mapped.parameter)
            self._split = (mapped, mapped.rule.fusion.split(value, self._architecture))
        return self._split[1][index]

    def local_part(self, transfer: Transfer) -> Tensor:
        """The slice that a transfer is of; this rank must be its source."""
        tensor, part = transfer.tensor, transfer.part
        local = self.local(tensor.name)
        if tensor.cut is None:
            return local
        size = local.size(tensor.cut) // tensor.sections
        section, within = divmod(part.start, tensor.shape[tensor.cut] // tensor.sections)
        start = section * size + within - size * tensor.holders.slice_of(self._placement.rank)
        return local.narrow(tensor.cut, start, len(part))

    def forget(self) -> None:
        """Lets go of the last split parameter."""
        self._split = (None, [])

    def gather(self, tensor: HFTensor, out: Tensor | None) -> None:
        """Puts the whole tensor into `out`, which only its collector has. All its senders call it.

        Slices of rows arrive in place; others pass through one tensor's memory.
        """
        part, ranks = self.local(tensor.name), tensor.holders.senders
        if tensor.cut is None or len(ranks) == 1:
            if out is not None:
                out.copy_(part if tensor.cut is None else part[: len(out)])
            return
        group = self._placement.group_of(ranks)
        if out is None:
            _exchange([dist.P2POp(dist.isend, part.contiguous(), group=group, group_peer=0)])
        elif tensor.sections > 1:
            parted, whole = (rows.unflatten(0, (tensor.sections, -1)) for rows in (part, out))
            _receive(parted, tensor.cut + 1, whole, group)
        else:
            _receive(part, tensor.cut, out, group)


def _receive(part: Tensor, cut: int, out: Tensor, group: dist.ProcessGroup) -> None:
    """Lays slices side by side; rows beyond the tensor (vocabulary padding) are left out."""
    places = _places(out, cut, part.size(cut), group.size())
    arriving = [
        place if place.is_contiguous() and place.shape == part.shape else torch.empty_like(part)
        for place in places[1:]
    ]
    receiving = [
        dist.P2POp(dist.irecv, values, group=group, group_peer=rank)
        for rank, values in enumerate(arriving, 1)
    ]
    _exchange(receiving)
    for place, values in zip(places, [part, *arriving], strict=True):
        if place is not values:
            place.copy_(values.narrow(cut, 0, place.size(cut)))


def _places(out: Tensor, cut: int, size: int, ranks: int) -> list[Tensor]:
    """Where each rank's slice of `size` along dimension `cut` belongs; the last may be shorter, or empty."""
    starts = [min(rank * size, out.size(cut)) for rank in range(ranks + 1)]
    return [out.narrow(cut, start, end - start) for start, end in pairwise(starts)]


def _exchange(operations: list[dist.P2POp]) -> None:
    for work in dist.batch_isend_irecv(operations):
        work.wait()
