"""Weights and gradients that are not finite are named, and end the run on every rank."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import get_total_norm

from megatron_rapo.errors import RapoError
from megatron_rapo.parallel.placement import Placement

DIVERGED = (
    "training has diverged; start again, or go on from an earlier checkpoint, with a lower "
    "optimizer.learning_rate or optimizer.clip_gradient"
)


def named_parameters(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters; of several chunks each with its chunk's number."""
    for index, chunk in enumerate(chunks):
        prefix = f"chunk {index}, " if len(chunks) > 1 else ""
        for name, parameter in chunk.named_parameters():
            yield f"{prefix}{name}", parameter


def trained_parameters(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Those that are not frozen."""
    return ((name, parameter) for name, parameter in named_parameters(chunks) if parameter.requires_grad)


def refuse_not_finite(metrics: Mapping[str, float], damage: str | None) -> bool:
    """Lets an update be applied that is finite (`policy.Allow`).

    Raises:
        RapoError: `damage` says what is not.
    """
    if damage is not None:
        raise RapoError(damage)
    return True


def check_finite(
    what: str, tensors: Mapping[str, Tensor], placement: Placement, remedy: str, bound: float = math.inf
) -> float:
    """As `find_damage`, but it raises what was found.

    Raises:
        RapoError: on every rank, where a tensor of any rank holds NaN, infinity, or more than `bound`.
    """
    largest, damage = find_damage(what, tensors, placement, remedy, bound)
    if damage is not None:
        raise RapoError(damage)
    return largest


def find_damage(
    what: str, tensors: Mapping[str, Tensor], placement: Placement, remedy: str, bound: float = math.inf
) -> tuple[float, str | None]:
    """One pass over this rank's tensors; all ranks call it.

    Args:
        what: they are, for the message: "weights".
        tensors: by name.
        placement: of this rank.
        remedy: how it may be mended.
        bound: magnitudes beyond it count as infinite.

    Returns:
        The largest magnitude of all ranks' tensors; and what is wrong where one of any rank holds NaN,
        infinity, or more than `bound`. The same on all ranks.
    """

    def damaged(largest: float) -> bool:
        return not (math.isfinite(largest) and largest <= bound)

    mine = _largest(list(tensors.values()))
    largest = placement.largest(math.inf if damaged(mine) else mine)
    if not damaged(largest):
        return largest, None
    stage = f"rank {placement.rank} (pipeline stage {placement.pipeline_rank})"
    found = [
        f"{name} on {stage}: {own:.3g}"
        for name, tensor in tensors.items()
        if damaged(own := _largest([tensor]))
    ]
    shares: list[list[str]] = [[] for _ in range(dist.get_world_size(placement.host_group))]
    dist.all_gather_object(shares, found, group=placement.host_group)
    first, *others = [name for share in shares for name in share]
    more = f", and {len(others)} more" if others else ""
    beyond = "" if bound == math.inf else f", or more than {bound:.3g}"
    return largest, f"{what} hold NaN or infinity{beyond}: {first}{more}; {remedy}"


def _largest(tensors: Sequence[Tensor]) -> float:
    """The largest magnitude; NaN where there is one."""
    return float(get_total_norm([tensor.detach() for tensor in tensors], math.inf))
