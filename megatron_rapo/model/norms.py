"""RMSNorms on any device: of channels, of all heads together, and of what a sublayer gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import set_tensor_model_parallel_attributes
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, marked so that Megatron sums its gradient over sequence-parallel ranks.

    Where the configuration says so it multiplies by 1 + weight, in fp32 at least: bf16 would lose the
    weight's last bits in the sum.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.zero_centred = config.layernorm_zero_centered_gamma
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """Norms the last dimension of `x`."""
        if not self.zero_centred:
            return super().forward(x)
        wide = torch.promote_types(x.dtype, torch.float32)
        weight = 1 + self.weight.to(wide)
        return F.rms_norm(x.to(wide), self.normalized_shape, weight, self.eps).to(x.dtype)


class HeadsNorm(torch.nn.Module):
    """RMSNorm over all heads together, which tensor parallelism shares between ranks (OLMo 2).

    Squares are summed over the ranks. A weight belongs to a channel of one head, so that each rank has the
    whole gradient of its own: Megatron must not sum it over tensor parallelism, as it does for weights
    called `q_layernorm`.

    Args:
        config: of the transformer.
        heads: of all ranks.
    """

    def __init__(self, config: TransformerConfig, heads: int) -> None:
        super().__init__()
        self.group = parallel_state.get_tensor_model_parallel_group()
        self.channels = heads * config.kv_channels
        self.eps = config.layernorm_epsilon
        here = self.channels // self.group.size()
        self.weight = torch.nn.Parameter(torch.empty(here, dtype=config.params_dtype))
        set_tensor_model_parallel_attributes(self.weight, is_parallel=True, dim=0, stride=1)

    def forward(self, x: Tensor) -> Tensor:
        """Norms `[…, heads / TP, dim]`."""
        wide = torch.promote_types(x.dtype, torch.float32)
        values = x.flatten(-2).to(wide)
        squares = _SumOverRanks.apply(values.square().sum(-1, keepdim=True), self.group)
        normed = values * (squares / self.channels + self.eps).rsqrt() * self.weight.to(wide)
        return normed.to(x.dtype).view_as(x)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> Any:
        """As Megatron's modules have it: the weight is cut over tensor parallelism."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"weight": 0}, sharded_offsets)


class _SumOverRanks(torch.autograd.Function):
    """A sum that all ranks use: each takes the gradient of what all of them made of it."""

    @staticmethod
    def forward(context: Any, part: Tensor, group: dist.ProcessGroup) -> Tensor:
        context.group = group
        whole = part.clone()
        dist.all_reduce(whole, group=group)
        return whole

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:
        whole = gradient.clone()
        dist.all_reduce(whole, group=context.group)
        return whole, None


def normed_addition(config: TransformerConfig, norm: Callable[..., Any]) -> type:
    """A module in place of Megatron's bias, dropout and addition: what a sublayer gives is normed before.

    Args:
        config: of the transformer, without dropout.
        norm: `RMSNorm`, or Transformer Engine's.
    """

    class NormedAddition(torch.nn.Module):
        """Called as Megatron's: with training and fusion, for the function that adds."""

        def __init__(self) -> None:
            super().__init__()
            self.norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

        def forward(self, training: bool, fused: bool) -> Callable[..., Tensor]:
            return self._add

        def _add(self, given: tuple[Tensor, Tensor | None], residual: Tensor, dropout: float) -> Tensor:
            values, bias = given
            return residual + self.norm(values if bias is None else values + bias)

    return NormedAddition
