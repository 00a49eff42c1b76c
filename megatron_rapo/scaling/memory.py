"""An estimate of a trainer rank's memory, from the configuration alone."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

from megatron_rapo.config import Adapter, Parallel, RunConfig
from megatron_rapo.model.adapter_rules import adapter_rules
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.parameters import count_expert_parameters, count_layer_parameters

GIB = 1 << 30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one rank, at its peak; the largest stage's where stages differ.

    Attributes:
        weights: policy parameters, adapters among them.
        reference: the frozen reference's parameters.
        teacher: the teacher's.
        gradients: fp32 gradient buffer, of what is trained.
        optimizer: fp32 main weights (beside bf16 ones) and two Adam moments.
        activations: of the microbatches in flight.
        loss: a chunk's logits (and the reference's), fp32 work on them, and the head's fp32 gradient.
        reference_hidden: the reference's final hidden states of this rank's share of the rollout batch,
            if every sequence had its full length.
        teacher_hidden: the teacher's, likewise.
    """

    weights: int
    reference: int
    teacher: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    reference_hidden: int
    teacher_hidden: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(getattr(self, part.name) for part in fields(self))

    def lines(self) -> list[str]:
        """One line a part, in GiB."""
        parts = [(part.name.replace("_", " "), getattr(self, part.name)) for part in fields(self)]
        return [f"{name:<18}{size / GIB:9.2f} GiB" for name, size in [*parts, ("total", self.total)]]


def estimate_memory(
    config: RunConfig, architecture: Architecture, teacher: Architecture | None = None
) -> MemoryEstimate:
    """Estimates the rank with the most: the last pipeline stage, which holds the head and the loss.

    Activations follow Korthikanti et al. (arXiv 2205.05198), without the attention matrix, which fused
    attention does not keep: 34·h bytes a token and layer in bf16, 10 of which only sequence parallelism
    shards. Norms after the sublayers, where there are others before them, keep what they are given, and norms
    over all heads two fp32 copies of queries and keys. A mixture keeps what its experts compute as well: for
    each expert that a token chooses its input and three times its inner channels, if tokens are spread
    evenly. Buffers of CUDA, NCCL and the allocator come on top. Adapters alone have gradients and optimizer
    states, and need no reference beside the policy.

    `teacher` is the teacher's architecture, where there is one.
    """
    held = estimate_held(config, architecture, teacher)
    activations, loss = estimate_working(config, architecture)
    return replace(held, activations=activations, loss=loss)


def estimate_held(
    config: RunConfig, architecture: Architecture, teacher: Architecture | None = None
) -> MemoryEstimate:
    """What `estimate_memory` has of it that does not depend on microbatches: all but activations and loss."""
    layout, method = config.parallel, config.new_method()
    element = 2 if config.model.dtype == "bfloat16" else 4
    vocabulary_rows = _vocabulary_rows(config, architecture)
    table = vocabulary_rows * architecture.hidden
    experts = _experts(layout, architecture)
    parameters = _parameters(layout, architecture, vocabulary_rows)

    adapters, of_experts = (0, 0)
    if config.adapter is not None:
        adapters, of_experts = _adapters(layout, architecture, config.adapter)
    trained, trained_experts = (parameters, experts) if config.adapter is None else (adapters, of_experts)
    distributed = config.optimizer.distributed
    shards = layout.data_parallel * layout.context_parallel if distributed else 1
    sharded = (trained - trained_experts) // shards
    sharded += trained_experts // (layout.expert_copies if distributed else 1)
    main_weights = 4 if element == 2 else 0
    # In host memory the body goes; the head stays, for the loss.
    in_host_memory = config.model.reference_in_host_memory
    reference = table if in_host_memory else parameters
    if not method.wants_reference or (config.adapter is not None and config.model.reference_path is None):
        reference = 0
    hidden_kept = method.wants_reference_hidden and not in_host_memory
    of_teacher, teacher_hidden = 0, 0
    if teacher is not None and config.teacher is not None:
        of_teacher = vocabulary_rows * teacher.hidden * element
        if not config.teacher.in_host_memory:
            of_teacher = _parameters(layout, teacher, vocabulary_rows) * element
            teacher_hidden = _frozen_hidden(config, teacher, element)
    return MemoryEstimate(
        weights=(parameters + adapters) * element,
        reference=reference * element,
        teacher=of_teacher,
        gradients=trained * 4,
        optimizer=sharded * (8 + main_weights),
        activations=0,
        loss=0,
        reference_hidden=_frozen_hidden(config, architecture, element) if hidden_kept else 0,
        teacher_hidden=teacher_hidden,
    )


def estimate_working(config: RunConfig, architecture: Architecture) -> tuple[int, int]:
    """Bytes of `activations` and of `loss`, which do not depend on DP, nor on EP."""
    layout = config.parallel
    element = 2 if config.model.dtype == "bfloat16" else 4
    tokens = config.algorithm.max_tokens_per_microbatch // layout.context_parallel
    layers = architecture.layers // layout.pipeline_parallel
    vocabulary_rows = _vocabulary_rows(config, architecture)
    loss = _loss(config, tokens, vocabulary_rows, element)
    if config.adapter is None:
        loss += vocabulary_rows * architecture.hidden * 4
    return _activations(config, architecture, tokens, layers, element), loss


def _vocabulary_rows(config: RunConfig, architecture: Architecture) -> int:
    """Of a rank's part of the embedding, or the head."""
    tensor = config.parallel.tensor_parallel
    return architecture.padded_vocabulary(config.model.vocabulary_multiple, tensor) // tensor


def _parameters(layout: Parallel, architecture: Architecture, vocabulary_rows: int) -> int:
    """Numbers of a rank's part of the model, with so many rows of the vocabulary a rank."""
    layers = architecture.layers // layout.pipeline_parallel
    tables = 1 if architecture.tied or layout.pipeline_parallel > 1 else 2
    others = count_layer_parameters(architecture) - count_expert_parameters(architecture)
    of_layers = layers * others // layout.tensor_parallel + _experts(layout, architecture)
    return of_layers + tables * vocabulary_rows * architecture.hidden


def _adapters(layout: Parallel, architecture: Architecture, adapter: Adapter) -> tuple[int, int]:
    """Numbers of a rank's part of its layers' adapters, of which each has one matrix whole: all; experts'."""
    layers = architecture.layers // layout.pipeline_parallel
    others = of_experts = 0
    for rule in adapter_rules(architecture, adapter):
        (size,) = map(math.prod, rule.hf.values())
        if rule.expert is None:
            others += size // (1 if rule.cut is None else layout.tensor_parallel)
        else:
            of_experts += size // (1 if rule.cut is None else layout.expert_tensor_parallel)
    of_experts //= layout.expert_parallel
    return layers * (others + of_experts), layers * of_experts


def _experts(layout: Parallel, architecture: Architecture) -> int:
    """Numbers of a rank's part of its layers' experts."""
    layers = architecture.layers // layout.pipeline_parallel
    ranks = layout.expert_parallel * layout.expert_tensor_parallel
    return layers * count_expert_parameters(architecture) // ranks


def _activations(
    config: RunConfig, architecture: Architecture, tokens: int, layers: int, element: int
) -> int:
    layout = config.parallel
    in_flight = layout.pipeline_parallel
    hidden = architecture.hidden * element // 2
    sequence_shards = layout.tensor_parallel if layout.sequence_parallel else 1
    norms = architecture.norms
    of_norms = 14 if norms.before and norms.after else 10
    whole = tokens * hidden * (of_norms / sequence_shards + 24 / layout.tensor_parallel)
    if architecture.query_key_norm == "heads":
        channels = (architecture.heads + architecture.kv_heads) * architecture.head_dim
        whole += tokens * 8 * channels / layout.tensor_parallel
    if (experts := architecture.experts) is not None:
        # Ranks that share an expert's matrices have the inputs of all of them, and a part of the channels.
        inner = architecture.hidden * layout.expert_tensor_parallel + 3 * architecture.feed_forward
        whole += tokens / sequence_shards * experts.chosen * inner * element
    if config.model.recompute == "none":
        return int(in_flight * layers * whole)
    kept = in_flight * layers * tokens * 2 * hidden / sequence_shards
    return int(kept + whole)  # one layer is alive while it is recomputed


def _loss(config: RunConfig, tokens: int, vocabulary_rows: int, element: int) -> int:
    chunk = min(config.algorithm.loss_chunk_tokens, tokens)
    method = config.new_method()
    both = method.wants_reference_hidden or method.wants_teacher
    return chunk * vocabulary_rows * ((2 if both else 1) * element + (5 if both else 3) * 4)


def _frozen_hidden(config: RunConfig, architecture: Architecture, element: int) -> int:
    layout = config.parallel
    tokens = config.responses_per_step * config.longest_sequence
    shards = layout.data_parallel * layout.context_parallel
    if layout.sequence_parallel:
        shards *= layout.tensor_parallel
    return tokens * architecture.hidden * element // shards
