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
    "training has diverged; go on from an earlier checkpoint with a lower optimizer.learning_rate "
    "(or optimizer.clip_gradient)"
)


def named_parameters(chunks: Sequence[torch.nn.Module]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """This rank's parameters; of several chunks each with its chunk's number."""
    for index, chunk in enumerate(chunks):
        prefix = f"chunk {index}, " if len(chunks) > 1 else ""
        for name, parameter in chunk.named_parameters():
            yield f"{prefix}{name}", parameter


def check_finite(what: str, tensors: Mapping[str, Tensor], placement: Placement, remedy: str) -> None:
    """One pass over this rank's tensors; all ranks call it.

    Args:
        what: they are, for the message: "weights".
        tensors: by name.
        placement: of this rank.
        remedy: how it may be mended.

    Raises:
        RapoError: on every rank, where a tensor of any rank holds NaN or infinity.
    """
    damaged = not math.isfinite(_largest(list(tensors.values())))
    if not placement.largest(float(damaged)):
        return
    stage = f"rank {placement.rank} (pipeline stage {placement.pipeline_rank})"
    mine = [f"{name} on {stage}" for name, tensor in tensors.items() if not math.isfinite(_largest([tensor]))]
    shares: list[list[str]] = [[] for _ in range(dist.get_world_size(placement.host_group))]
    dist.all_gather_object(shares, mine, group=placement.host_group)
    found = [name for share in shares for name in share]
    others = f" and {len(found) - 1} more" if len(found) > 1 else ""
    raise RapoError(f"{what} hold NaN or infinity: {found[0]}{others}; {remedy}")


def _largest(tensors: Sequence[Tensor]) -> float:
    """The largest magnitude; NaN where there is one."""
    return float(get_total_norm([tensor.detach() for tensor in tensors], math.inf))
