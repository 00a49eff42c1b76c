"""Repairs checkpoints of Megatron's DistributedOptimizer where gradients lie in several padded buckets.

megatron/core/optimizer/distrib_optimizer.py: `get_parameter_state_dp_zero` strings the buckets together
without the padding at their ends, but `sharded_param_state_fully_reshardable` cuts each parameter out at an
offset that counts it (line 1497 of 0.16.1, 1790 of 0.19.2). Parameters and moments behind a padded bucket are
saved shifted, in silence. There are several buckets with tied embeddings in a pipeline, and with overlapped
communication.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

VERSIONS = ">=0.16.1,<0.20"


def repair() -> None:
    """Adds the padding to what is gathered."""
    gather = DistributedOptimizer.get_parameter_state_dp_zero

    def gather_padded(self: Any, *args: Any, **options: Any) -> dict[Any, Any] | None:
        state = gather(self, *args, **options)
        for index, buffer in enumerate(self.buffers if state is not None else []):
            for tensors in state[index].values():
                for key, value in tensors.items():
                    if torch.is_tensor(value):
                        tensors[key] = _with_padding(value, buffer)
        return state

    DistributedOptimizer.get_parameter_state_dp_zero = gather_padded


def _with_padding(packed: Tensor, buffer: Any) -> Tensor:
    """`packed` `[elements without padding]` laid out as `buffer` is, `[elements]`."""
    whole = packed.new_zeros(buffer.numel)
    start = 0
    for bucket in buffer.buckets:
        stop = start + bucket.numel_unpadded
        whole[bucket.offset : bucket.offset + bucket.numel_unpadded] = packed[start:stop]
        start = stop
    return whole
