"""Low-rank adapters beside Megatron's linear layers, under tensor and sequence parallelism.

A linear layer W with several HF matrices fused in it (queries, keys, values; gate and up) has an A and a B
of each, as PEFT has them. Their As are stacked, `[n · rank, in]`, and their Bs fused as the matrices are,
each in columns of its own: `[out, n · rank]`, in which the other matrices' rows are 0. So two products make
the layer's part in the order that Megatron wants, and W + scale · B · A is theirs as well.

What crosses tensor-parallel ranks between the two products has n · rank channels a token, not `hidden`.
An expert is given all tokens that come to it, and its output is summed over the ranks that cut it, by the
dispatcher: there nothing crosses but the gradient of the matrix that is whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rapo.config import Adapter
from megatron_rapo.model.adapter_rules import MODULE, A, AdaptedLinear, B, adapted_linears
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.rules import COLUMNS, ROWS, Rule

MERGED_ROWS = 1024  # of a weight, at once, in fp64


class LowRank(torch.nn.Module):
    """The adapter of one linear layer.

    Attributes:
        on: whether it adds its part.
        scale: of B · A.
    """

    def __init__(
        self, linear: AdaptedLinear, adapter: Adapter, architecture: Architecture, config: TransformerConfig
    ) -> None:
        """Makes its parameters, uninitialised."""
        super().__init__()
        self.on = True
        self.scale = adapter.scale
        self._linear = linear
        self._architecture = architecture
        self._cuts_columns = linear.rule.cut == COLUMNS
        self._of_expert = linear.rule.expert is not None
        self._sequence_parallel = config.sequence_parallel
        self._group = (
            parallel_state.get_expert_tensor_parallel_group()
            if self._of_expert
            else parallel_state.get_tensor_model_parallel_group()
        )
        self._norm_epsilon = config.layernorm_epsilon
        self._norm_offset = float(config.layernorm_zero_centered_gamma)
        for rule in linear.rules(adapter.rank):
            # Directly the module's: parameters are gathered (overlap_communication) before it is called.
            self.register_parameter(rule.megatron.rpartition(".")[2], self._parameter(rule, config))

    def _parameter(self, rule: Rule, config: TransformerConfig) -> torch.nn.Parameter:
        (shape,) = rule.hf.values()
        local = list(shape)
        if rule.cut is not None:
            local[rule.cut] //= self._group.size()
        parameter: Any = torch.nn.Parameter(torch.empty(local, dtype=config.params_dtype))
        if self._of_expert:
            # Summed over the ranks that have the same experts, and in the norm once (`build.py`).
            parameter.allreduce, parameter.tensor_model_parallel = False, True
            parameter.shared = rule.cut is None and self._group.rank() > 0
            return parameter
        if rule.cut is not None:
            set_tensor_model_parallel_attributes(parameter, is_parallel=True, dim=rule.cut, stride=1)
        else:
            # Whole on each rank, which under sequence parallelism has the gradient of its own tokens alone.
            parameter.sequence_parallel = config.sequence_parallel
        parameter.allreduce = True
        return parameter

    def inner(self) -> Tensor:
        """`[n · rank, in (/ TP)]`, the As one below the other."""
        return torch.cat([self._of(target, A) for target in self._linear.targets.values()])

    def outer(self) -> Tensor:
        """`[out (/ TP), n · rank]`, the Bs fused as the layer's matrices are."""
        targets, rule = self._linear.targets, self._linear.rule
        order = {place: number for number, place in enumerate(targets)}
        if len(rule.hf) == 1:
            return self._of(targets[0], B)
        some = self._of(next(iter(targets.values())), B)
        rank, ranks = some.size(1), self._group.size()
        parts = []
        for place, (rows, _) in enumerate(rule.hf.values()):
            if place in order:
                before = order[place] * rank
                after = (len(order) - order[place] - 1) * rank
                parts.append(F.pad(self._of(targets[place], B), (before, after)))
            else:
                parts.append(some.new_zeros(rows // ranks, len(order) * rank))
        return rule.fusion.fuse(parts, self._architecture)

    def forward(self, given: Tensor, output: Tensor, norm: Tensor | None) -> Tensor:
        """Adds its part to what the linear layer made.

        Args:
            given: `[tokens (/ TP), 1, in (/ TP)]`, what the layer was given.
            output: `[tokens (/ TP), 1, out (/ TP)]`, what it made of it.
            norm: `[in]`, weight of the norm that the layer begins with (Transformer Engine's fused ones).
        """
        if norm is not None:
            given = F.rms_norm(given, (given.size(-1),), norm + self._norm_offset, self._norm_epsilon)
        inner, outer = self.inner(), self.outer()
        if self._of_expert and self._cuts_columns:
            outer = copy_to_tensor_model_parallel_region(outer, group=self._group)
        elif self._of_expert:
            inner = copy_to_tensor_model_parallel_region(inner, group=self._group)
        hidden = self._shared(F.linear(given, inner)) * self.scale
        added = torch.addmm(output.flatten(0, -2), hidden.flatten(0, -2), outer.T)
        return added.view_as(output)

    def _shared(self, hidden: Tensor) -> Tensor:
        """What both products meet in, on the ranks that the second one is computed on."""
        if self._of_expert:
            return hidden
        if self._cuts_columns:
            if self._sequence_parallel:
                return reduce_scatter_to_sequence_parallel_region(hidden, group=self._group)
            return reduce_from_tensor_model_parallel_region(hidden, group=self._group)
        if self._sequence_parallel:
            return gather_from_sequence_parallel_region(hidden, group=self._group)
        return copy_to_tensor_model_parallel_region(hidden, group=self._group)

    def _of(self, target: str, which: str) -> Tensor:
        return getattr(self, f"{target}_{which}")


def attach(chunk: Any, architecture: Architecture, adapter: Adapter) -> None:
    """Freezes a chunk's weights and puts adapters, still uninitialised, beside them."""
    chunk.requires_grad_(False)
    for linear in adapted_linears(architecture, adapter):
        assert linear.rule.cut in (ROWS, COLUMNS), f"{linear.name} is cut otherwise than by rows or columns"
        for module in _linears(chunk, linear):
            low_rank = LowRank(linear, adapter, architecture, chunk.config)
            module.add_module(MODULE, low_rank)
            module.weight.low_rank = low_rank
            module.register_forward_hook(_added)


def _linears(chunk: Any, linear: AdaptedLinear) -> Iterator[Any]:
    """The linear layer in each layer of a chunk; that of an expert where this rank has the expert."""
    for layer in chunk.decoder.layers:
        expert = linear.rule.expert
        if expert is None:
            yield layer.get_submodule(linear.name)
        elif expert in layer.mlp.local_expert_indices:
            place = layer.mlp.local_expert_indices.index(expert)
            _, _, inner = linear.name.rpartition(".")
            yield layer.mlp.experts.local_experts[place].get_submodule(inner)


def _added(module: Any, given: tuple[Any, ...], output: tuple[Tensor, Any]) -> tuple[Tensor, Any] | None:
    """A linear layer's hook: its output, bias left to the caller, with the adapter's part."""
    low_rank: LowRank = module.get_submodule(MODULE)
    if not low_rank.on:
        return None
    return low_rank(given[0], output[0], getattr(module, "layer_norm_weight", None)), *output[1:]


@contextmanager
def without_adapters(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """The model as it was before training, as long as the block lasts."""
    adapters = [m for chunk in chunks for m in chunk.modules() if isinstance(m, LowRank)]
    for adapter in adapters:
        adapter.on = False
    try:
        yield
    finally:
        for adapter in adapters:
            adapter.on = True


@torch.no_grad()
def merged(parameter: torch.nn.Parameter) -> Tensor:
    """A parameter as the model without adapters would have it: W + scale · B · A, where it has one.

    Computed in fp64 and rounded once, so that it does not depend on how the layout cuts it: of bfloat16
    matrices the products and their sums are exact.
    """
    low_rank: LowRank | None = getattr(parameter, "low_rank", None)
    if low_rank is None:
        return parameter.detach()
    inner, outer = low_rank.inner().double(), low_rank.outer()
    whole = torch.empty_like(parameter)
    for start in range(0, len(whole), MERGED_ROWS):
        rows = slice(start, start + MERGED_ROWS)
        whole[rows] = parameter[rows].double() + low_rank.scale * (outer[rows].double() @ inner)
    return whole
