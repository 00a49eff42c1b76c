"""How long a trainer of some layout takes for annotation and updates.

A layer's forward is its matrix products and attention at the profile's rates for their sizes, the activations
written and read once (34 · hidden bytes a token in bf16, Korthikanti et al., arXiv 2205.05198), and
`layer_s`. A backward takes twice that, once where the weights are frozen under adapters (whose own products
are left out), and the forward again where it is recomputed. Tensor parallelism adds
two all-reduces a layer and pass; pipelines the bubble of 1F1B, (PP − 1) / VPP slots (Narayanan et al., arXiv
2104.04473); data parallelism one reduction of fp32 gradients and one gathering of weights an update. Experts
have the work that even choices give them; their tokens cross to them and back in each layer and pass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

from megatron_rapo.config import Adapter, Parallel
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.parameters import (
    count_adapter_parameters,
    count_expert_adapter_parameters,
    count_expert_parameters,
    count_parameters,
)
from megatron_rapo.planning.profile import Profile, all_reduce_s, all_to_all_s
from megatron_rapo.planning.workload import Workload
from megatron_rapo.scaling.flops import forward_flops

_PRODUCTS = 4  # of a layer: queries, keys and values; output; gate and up; down
_PASSES_OF_LOSS = 6  # over a chunk's fp32 logits: statistics and gradient, each read and written
_BYTES_OF_ADAM = 28  # of a parameter: gradient, main weight and moments read; weights and moments written


@dataclass(frozen=True)
class TrainerCost:
    """Seconds of a step, and what they come of.

    Attributes:
        annotate: old log-probs and the reference.
        update: all updates, with what follows.
        bubble: of `update`, what a stage waits for others.
        communication: of `update`, what is not hidden.
        optimizer: of `update`.
        microbatches: of an update.
    """

    annotate: float
    update: float
    bubble: float
    communication: float
    optimizer: float
    microbatches: int

    @property
    def total(self) -> float:
        """Of the step."""
        return self.annotate + self.update


@dataclass(frozen=True)
class TrainerModel:
    """The seconds of a workload on a device, by layout."""

    architecture: Architecture
    workload: Workload
    profile: Profile
    element: int
    """Bytes of a weight."""
    adapter: Adapter | None = None
    """What is trained, if not the weights."""

    def cost(
        self, layout: Parallel, budget: int, *, recompute: bool, distributed: bool, overlap: bool
    ) -> TrainerCost:
        """Of a step; `budget` is `algorithm.max_tokens_per_microbatch`."""
        load = self.workload
        number, tokens = self._microbatches(layout, budget)
        forward = self._layers_s(layout, tokens)
        wire = self._wire_s(layout, tokens)
        backward = self._backward_passes * forward + (forward + wire if recompute else 0.0)
        slot = forward + backward + 2 * wire
        head = self._head_s(layout, tokens, passes=1 + self._backward_passes) + (
            self._head_s(layout, tokens, passes=1) if load.frozen_logits else 0.0
        )
        stages = layout.pipeline_parallel
        bubble = (stages - 1) / (layout.virtual_pipeline_parallel or 1) * slot
        if stages > 1:
            bubble += number * head * (stages - 1) / stages  # others wait for the last; a mean over stages
        handed = self._handed_s(layout, tokens)
        reduced = self._reduce_s(layout, distributed=distributed)
        if overlap:
            reduced = max(0.0, reduced - (backward if number > 1 else backward / 2))
        optimizer = self._optimizer_s(layout, distributed=distributed)
        last = number * (slot + head) + (stages - 1) / (layout.virtual_pipeline_parallel or 1) * slot
        update = last + 2 * handed * (number + stages - 1) + reduced + optimizer
        communication = number * 2 * wire + 2 * handed * (number + stages - 1) + reduced
        return TrainerCost(
            annotate=load.updates
            * self._forward_passes_s(number, stages, forward + wire + handed, layout, tokens),
            update=load.updates * update,
            bubble=load.updates * bubble,
            communication=load.updates * communication,
            optimizer=load.updates * optimizer,
            microbatches=number,
        )

    def _forward_passes_s(
        self, number: int, stages: int, slot: float, layout: Parallel, tokens: float
    ) -> float:
        """Of annotation, of one update's microbatches."""
        load = self.workload
        one = (number + stages - 1) * slot
        policy = one + number * self._head_s(layout, tokens, passes=1) if load.old_log_probs else 0.0
        reference = one if load.reference else 0.0
        if load.reference and not load.frozen_logits:
            reference += number * self._head_s(layout, tokens, passes=1)
        return policy + reference

    def _microbatches(self, layout: Parallel, budget: int) -> tuple[int, float]:
        """How many a replica has in an update, and the tokens of each over all CP ranks."""
        load = self.workload
        sequences = load.responses / load.updates / layout.data_parallel
        each = max(1, math.floor(budget / load.sequence))
        number = math.ceil(math.ceil(sequences) / each)
        if layout.virtual_pipeline_parallel:
            number = -(-number // layout.pipeline_parallel) * layout.pipeline_parallel
        return number, math.ceil(sequences) * load.sequence / number

    def _layers_s(self, layout: Parallel, tokens: float) -> float:
        """A forward of one microbatch through a rank's layers."""
        layers = self.architecture.layers // layout.pipeline_parallel
        shards = layout.tensor_parallel * layout.context_parallel
        count = max(1, round(tokens))
        body = replace(self.architecture, vocabulary=0, layers=layers)
        matrix = forward_flops(body, [count], [0]) - self._expert_flops(layers, count)
        attention = forward_flops(body, [count], [round(self.workload.sequence)])
        attention -= forward_flops(body, [count], [0])
        norms = layout.tensor_parallel if layout.sequence_parallel else 1
        written = self.architecture.hidden * (10 / norms + 24 / layout.tensor_parallel) * self.element / 2
        moved = 2 * layers * written * tokens / layout.context_parallel
        return (
            self.profile.matrix_s(matrix / shards, layers * _PRODUCTS)
            + self.profile.attention_s(attention / shards, layers)
            + moved / self.profile.memory_bytes_per_s
            + layers * self.profile.layer_s
            + self._experts_s(layout, layers, count)
        )

    def _expert_flops(self, layers: int, tokens: int) -> int:
        """Of the matrix products of all experts that tokens choose; 0 of a dense model."""
        one = self.architecture
        if one.experts is None:
            return 0
        return 2 * tokens * layers * 3 * one.hidden * one.experts.chosen * one.feed_forward

    def _experts_s(self, layout: Parallel, layers: int, tokens: int) -> float:
        """A forward of a rank's experts: products of each, or reading its weights, and what tokens write.

        A rank has as much of the work as any, if tokens choose experts evenly.
        """
        one = self.architecture
        if one.experts is None:
            return 0.0
        shards = layout.tensor_parallel * layout.context_parallel
        computed = self.profile.matrix_s(
            self._expert_flops(layers, tokens) / shards,
            2 * layers * one.experts.count / layout.expert_parallel,
        )
        held = layers * count_expert_parameters(one) / layout.expert_parallel / layout.expert_tensor_parallel
        read = held * self.element / self.profile.memory_bytes_per_s
        inner = one.hidden * layout.expert_tensor_parallel + 3 * one.feed_forward
        written = layers * tokens / shards * one.experts.chosen * inner * self.element
        return max(computed, read) + 2 * written / self.profile.memory_bytes_per_s

    def _dispatch_s(self, layout: Parallel, tokens: float) -> float:
        """Of a layer and pass: tokens go to the ranks of their experts, and come back."""
        one = self.architecture
        if one.experts is None:
            return 0.0
        parts, sharing = layout.expert_parallel, layout.expert_tensor_parallel
        own = tokens / layout.context_parallel / layout.tensor_parallel
        nbytes = own * one.experts.chosen * one.hidden * self.element
        to_experts = all_to_all_s(self.profile.link(parts * sharing), parts, nbytes)
        # Gathered before an expert whose matrices are shared, and summed and scattered after it.
        gathered = all_reduce_s(self.profile.link(sharing), sharing, nbytes * sharing)
        return 2 * to_experts + gathered

    def _wire_s(self, layout: Parallel, tokens: float) -> float:
        """Of one pass through a rank's layers: TP's all-reduces, CP's keys and values."""
        layers = self.architecture.layers // layout.pipeline_parallel
        own = tokens / layout.context_parallel
        tensor = all_reduce_s(
            self.profile.link(layout.tensor_parallel),
            layout.tensor_parallel,
            own * self.architecture.hidden * self.element,
        )
        keys = 2 * self.architecture.kv_heads * self.architecture.head_dim * self.element
        span = layout.tensor_parallel * layout.context_parallel
        context = all_reduce_s(
            self.profile.link(span), layout.context_parallel, tokens * keys / layout.tensor_parallel
        )
        experts = self.architecture.experts
        # A layer's second half has none where tokens go to experts, unless all pass a shared one as well.
        times = 1 if experts is not None and experts.shared is None else 2
        return layers * (times * tensor + context / 2 + self._dispatch_s(layout, tokens))

    def _handed_s(self, layout: Parallel, tokens: float) -> float:
        """A microbatch's hidden states from one stage to the next."""
        if layout.pipeline_parallel == 1:
            return 0.0
        link = self.profile.link(layout.world_size)
        shards = layout.context_parallel * (layout.tensor_parallel if layout.sequence_parallel else 1)
        nbytes = tokens / shards * self.architecture.hidden * self.element
        return (layout.virtual_pipeline_parallel or 1) * (link.latency_s + nbytes / link.bytes_per_s)

    def _head_s(self, layout: Parallel, tokens: float, *, passes: int) -> float:
        """Logits of a microbatch's response tokens: a pass of products for each, and of their memory."""
        own = tokens / layout.context_parallel * self.workload.response_tokens / self.workload.sequence
        head = replace(self.architecture, layers=0)
        flops = passes * forward_flops(head, [max(1, round(own))]) / layout.tensor_parallel
        logits = 4 * own * self.architecture.vocabulary / layout.tensor_parallel
        moved = _PASSES_OF_LOSS * logits / 3 * passes
        return self.profile.matrix_s(flops, passes) + moved / self.profile.memory_bytes_per_s

    @property
    def _backward_passes(self) -> int:
        """Products of a backward for one of the forward: of inputs, and of weights that are trained."""
        return 2 if self.adapter is None else 1

    def _own_parameters(self, layout: Parallel) -> tuple[float, float]:
        """Trained ones of a rank: those of its experts, and all others."""
        stages = layout.pipeline_parallel
        others = (self._trained - self._trained_of_experts) / layout.tensor_parallel / stages
        return (
            self._trained_of_experts / layout.expert_parallel / layout.expert_tensor_parallel / stages,
            others,
        )

    @property
    def _trained_of_experts(self) -> int:
        if self.adapter is not None:
            return count_expert_adapter_parameters(self.architecture, self.adapter)
        return self.architecture.layers * count_expert_parameters(self.architecture)

    @cached_property
    def _trained(self) -> int:
        if self.adapter is None:
            return count_parameters(self.architecture)
        return count_adapter_parameters(self.architecture, self.adapter)

    def _copies(self, layout: Parallel) -> tuple[int, int]:
        """Ranks that have the same experts, and the same of all others."""
        return layout.expert_copies, layout.data_parallel * layout.context_parallel

    def _reduce_s(self, layout: Parallel, *, distributed: bool) -> float:
        """Of fp32 gradients over ranks with the same weights; with a distributed optimizer scattered, and
        weights gathered."""
        link = self.profile.link(layout.stage)
        seconds = 0.0
        for parameters, ranks in zip(self._own_parameters(layout), self._copies(layout), strict=True):
            if not parameters:
                continue
            whole = all_reduce_s(link, ranks, 4 * parameters)
            gathered = all_reduce_s(link, ranks, self.element * parameters)
            seconds += whole / 2 + gathered / 2 if distributed else whole
        return seconds

    def _optimizer_s(self, layout: Parallel, *, distributed: bool) -> float:
        pairs = zip(self._own_parameters(layout), self._copies(layout), strict=True)
        held = sum(parameters / (ranks if distributed else 1) for parameters, ranks in pairs)
        return held * _BYTES_OF_ADAM / self.profile.memory_bytes_per_s
