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
from megatron_rapo.planning.remembered import remembered, remembered_by
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


def _of_cost(layout: Parallel, *others: float) -> tuple[float | None, ...]:
    """What it depends on, of a layout and all else: several budgets may come to the same microbatches."""
    return (
        *(layout.tensor_parallel, layout.pipeline_parallel, layout.virtual_pipeline_parallel),
        *(layout.context_parallel, layout.data_parallel, layout.sequence_parallel),
        *(layout.expert_parallel, layout.expert_tensor_parallel, *others),
    )


def _of_after_backward(layout: Parallel, distributed: bool) -> tuple[int, ...]:
    return (
        *(layout.tensor_parallel, layout.pipeline_parallel, layout.context_parallel, layout.data_parallel),
        *(layout.expert_parallel, layout.expert_tensor_parallel, distributed),
    )


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
        return self._cost(layout, *self._microbatches(layout, budget), recompute, distributed, overlap)

    @remembered_by(_of_cost)
    def _cost(
        self,
        layout: Parallel,
        number: int,
        tokens: float,
        recompute: bool,
        distributed: bool,
        overlap: bool,
    ) -> TrainerCost:
        """Of a step in so many microbatches an update, of so many tokens each."""
        load, stages = self.workload, layout.pipeline_parallel
        forward = self._layers_s(layout, tokens)
        wire = self._wire_s(layout, tokens)
        backward = self._backward_passes * forward + (forward + wire if recompute else 0.0)
        slot = forward + backward + 2 * wire
        shards = layout.tensor_parallel, layout.context_parallel
        one_head = self._head_s(*shards, tokens, 1)
        head = self._head_s(*shards, tokens, 1 + self._backward_passes)
        head += one_head if load.frozen_logits else 0.0
        ends = (stages - 1) / (layout.virtual_pipeline_parallel or 1) * slot
        # Others wait for the last stage's head; a mean over stages.
        bubble = ends + number * head * (stages - 1) / stages
        handed = self._handed_s(layout, tokens)
        reduced, optimizer = self._after_backward_s(layout, distributed)
        if overlap:
            reduced = max(0.0, reduced - (backward if number > 1 else backward / 2))
        passed = 2 * handed * (number + stages - 1)
        update = number * (slot + head) + ends + passed + reduced + optimizer
        annotate = self._forward_passes_s(number, stages, forward + wire + handed, one_head)
        return TrainerCost(
            annotate=load.updates * annotate,
            update=load.updates * update,
            bubble=load.updates * bubble,
            communication=load.updates * (number * 2 * wire + passed + reduced),
            optimizer=load.updates * optimizer,
            microbatches=number,
        )

    def _forward_passes_s(self, number: int, stages: int, slot: float, head: float) -> float:
        """Of annotation, of one update's microbatches."""
        load = self.workload
        one = (number + stages - 1) * slot
        policy = one + number * head if load.old_log_probs else 0.0
        reference = one if load.reference else 0.0
        if load.reference and not load.frozen_logits:
            reference += number * head
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
        shards = layout.tensor_parallel, layout.context_parallel
        one = self._layer_s(*shards, layout.sequence_parallel, tokens)
        if self.architecture.experts is not None:
            one += self._experts_s(*shards, layout.expert_parallel, layout.expert_tensor_parallel, tokens)
        return self.architecture.layers // layout.pipeline_parallel * one

    @remembered
    def _layer_s(self, tensor: int, context: int, sequence_parallel: bool, tokens: float) -> float:
        """Of a layer, without its experts; the mean one's, where layers differ."""
        count, shards = max(1, round(tokens)), tensor * context
        norms = tensor if sequence_parallel else 1
        written = self.architecture.hidden * (10 / norms + 24 / tensor) * self.element / 2
        return (
            self.profile.matrix_s(count * self._matrix_flops / shards, _PRODUCTS)
            + self.profile.attention_s(count * self._attention_flops / shards, 1)
            + 2 * written * tokens / context / self.profile.memory_bytes_per_s
            + self.profile.layer_s
        )

    @cached_property
    def _matrix_flops(self) -> float:
        """Of a token's products with a layer's matrices, without its experts'."""
        body = replace(self.architecture, vocabulary=0)
        return forward_flops(body, [1], [0]) / body.layers - self._expert_flops

    @cached_property
    def _attention_flops(self) -> float:
        """Of a token's attention in a layer, to a sequence of mean length."""
        one = self.architecture
        attended = forward_flops(one, [1], [round(self.workload.sequence)])
        return (attended - forward_flops(one, [1], [0])) / one.layers

    @cached_property
    def _expert_flops(self) -> int:
        """Of a token's products in the experts of a layer that it chooses; 0 of a dense model."""
        one = self.architecture
        return 0 if one.experts is None else 2 * 3 * one.hidden * one.experts.chosen * one.feed_forward

    @remembered
    def _experts_s(self, tensor: int, context: int, parts: int, sharing: int, tokens: float) -> float:
        """A forward of a rank's experts of a layer: products of each, or reading its weights, and what tokens
        write.

        A rank has as much of the work as any, if tokens choose experts evenly.
        """
        one = self.architecture
        assert one.experts is not None
        count, shards = max(1, round(tokens)), tensor * context
        computed = self.profile.matrix_s(count * self._expert_flops / shards, 2 * one.experts.count / parts)
        held = self._expert_parameters / parts / sharing
        read = held * self.element / self.profile.memory_bytes_per_s
        inner = one.hidden * sharing + 3 * one.feed_forward
        written = count / shards * one.experts.chosen * inner * self.element
        return max(computed, read) + 2 * written / self.profile.memory_bytes_per_s

    @remembered
    def _dispatch_s(self, tensor: int, context: int, parts: int, sharing: int, tokens: float) -> float:
        """Of a layer and pass: tokens go to the ranks of their experts, and come back."""
        one = self.architecture
        assert one.experts is not None
        nbytes = tokens / context / tensor * one.experts.chosen * one.hidden * self.element
        to_experts = all_to_all_s(self.profile.link(parts * sharing), parts, nbytes)
        # Gathered before an expert whose matrices are shared, and summed and scattered after it.
        gathered = all_reduce_s(self.profile.link(sharing), sharing, nbytes * sharing)
        return 2 * to_experts + gathered

    def _wire_s(self, layout: Parallel, tokens: float) -> float:
        """Of one pass through a rank's layers: TP's all-reduces, CP's keys and values, tokens to experts."""
        shards = layout.tensor_parallel, layout.context_parallel
        one = self._layer_wire_s(*shards, tokens)
        if self.architecture.experts is not None:
            one += self._dispatch_s(*shards, layout.expert_parallel, layout.expert_tensor_parallel, tokens)
        return self.architecture.layers // layout.pipeline_parallel * one

    @remembered
    def _layer_wire_s(self, tensor: int, context: int, tokens: float) -> float:
        """Of a layer and pass, without what goes to experts."""
        one = self.architecture
        nbytes = tokens / context * one.hidden * self.element
        reduced = all_reduce_s(self.profile.link(tensor), tensor, nbytes)
        keys = 2 * one.kv_heads * one.head_dim * self.element
        exchanged = all_reduce_s(self.profile.link(tensor * context), context, tokens * keys / tensor)
        # A layer's second half has none where tokens go to experts, unless all pass a shared one as well.
        times = 1 if one.experts is not None and one.experts.shared is None else 2
        return times * reduced + exchanged / 2

    def _handed_s(self, layout: Parallel, tokens: float) -> float:
        """A microbatch's hidden states from one stage to the next."""
        if layout.pipeline_parallel == 1:
            return 0.0
        link = self.profile.link(layout.world_size)
        shards = layout.context_parallel * (layout.tensor_parallel if layout.sequence_parallel else 1)
        nbytes = tokens / shards * self.architecture.hidden * self.element
        return (layout.virtual_pipeline_parallel or 1) * (link.latency_s + nbytes / link.bytes_per_s)

    @remembered
    def _head_s(self, tensor: int, context: int, tokens: float, passes: int) -> float:
        """Logits of a microbatch's response tokens: a pass of products for each, and of their memory."""
        one = self.architecture
        own = tokens / context * self.workload.response_tokens / self.workload.sequence
        flops = passes * max(1, round(own)) * 2 * one.hidden * one.vocabulary / tensor
        logits = 4 * own * one.vocabulary / tensor
        moved = _PASSES_OF_LOSS * logits / 3 * passes
        return self.profile.matrix_s(flops, passes) + moved / self.profile.memory_bytes_per_s

    @property
    def _backward_passes(self) -> int:
        """Products of a backward for one of the forward: of inputs, and of weights that are trained."""
        return 2 if self.adapter is None else 1

    @remembered_by(_of_after_backward)
    def _after_backward_s(self, layout: Parallel, distributed: bool) -> tuple[float, float]:
        """Of an update: its gradients' reduction, with the weights' gathering, and the optimizer.

        fp32 gradients are reduced over ranks with the same weights; with a distributed optimizer scattered,
        and weights gathered.
        """
        link = self.profile.link(layout.stage)
        of_experts = self._trained_of_experts
        sharing = layout.expert_parallel * layout.expert_tensor_parallel
        reduced = held = 0.0
        for parameters, shards, copies in (
            (of_experts, sharing, layout.expert_copies),
            (
                self._trained - of_experts,
                layout.tensor_parallel,
                layout.data_parallel * layout.context_parallel,
            ),
        ):
            own = parameters / shards / layout.pipeline_parallel
            whole = all_reduce_s(link, copies, 4 * own)
            gathered = all_reduce_s(link, copies, self.element * own)
            if parameters:
                reduced += whole / 2 + gathered / 2 if distributed else whole
            held += own / (copies if distributed else 1)
        return reduced, held * _BYTES_OF_ADAM / self.profile.memory_bytes_per_s

    @cached_property
    def _expert_parameters(self) -> int:
        """Numbers in the experts of a layer."""
        return count_expert_parameters(self.architecture)

    @cached_property
    def _trained_of_experts(self) -> int:
        """Of all experts: their numbers, or those of their adapters."""
        if self.adapter is not None:
            return count_expert_adapter_parameters(self.architecture, self.adapter)
        return self.architecture.layers * self._expert_parameters

    @cached_property
    def _trained(self) -> int:
        if self.adapter is None:
            return count_parameters(self.architecture)
        return count_adapter_parameters(self.architecture, self.adapter)
