"""Messages of slices, as a trainer rank sends them: values one behind the other, and their checksum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_rapo.checksum import tensor_checksum
from megatron_rapo.errors import RapoError

CHECKSUM_BYTES = 8  # at a message's end
Slice = tuple[str, int | None, int, int]
"""Name of a tensor, the dimension that is cut, and which part of it; without a dimension the whole tensor."""


@dataclass(frozen=True)
class SliceMessage:
    """What one rank of a trainer sends at once.

    Attributes:
        source: its rank in the group.
        engine_rank: that it is for, of the engine's own.
        slices: in their order.
    """

    source: int
    engine_rank: int
    slices: tuple[Slice, ...]


def message_bytes(places: Sequence[Tensor], dtype: torch.dtype) -> int:
    """Bytes of a message for these places in the model, in the type that it is sent in."""
    return sum(place.numel() for place in places) * dtype.itemsize + CHECKSUM_BYTES


def seal(flat: Tensor, dtype: torch.dtype) -> int:
    """Writes the checksum of a message's values, `flat` `[message_bytes]` uint8, at its end; returns it."""
    checksum = tensor_checksum(flat[:-CHECKSUM_BYTES].view(dtype))
    told = bytearray(checksum.to_bytes(CHECKSUM_BYTES, "little"))
    flat[-CHECKSUM_BYTES:] = torch.frombuffer(told, dtype=torch.uint8)
    return checksum


def unpack(flat: Tensor, places: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The values of a message, `flat` `[message_bytes]` uint8, in the shapes of their places.

    Raises:
        RapoError: it is not what was sent.
    """
    values = flat[:-CHECKSUM_BYTES].view(dtype)
    sent = int.from_bytes(flat[-CHECKSUM_BYTES:].cpu().numpy().tobytes(), "little")
    if (found := tensor_checksum(values)) != sent:
        raise RapoError(f"a message of weights has checksum {found} in place of {sent}; send them again")
    parts = values.split([place.numel() for place in places])
    return [part.view(place.shape) for part, place in zip(parts, places, strict=True)]
