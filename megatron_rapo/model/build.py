"""Megatron GPTModels from an architecture: this rank's model chunks, not yet filled with weights."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_rapo.config import Adapter, Model, Parallel
from megatron_rapo.model.adapter_rules import adapts_experts
from megatron_rapo.model.adapters import attach
from megatron_rapo.model.architecture import Architecture
from megatron_rapo.model.branches import Branches
from megatron_rapo.model.dtypes import DTYPES
from megatron_rapo.model.families.named import family_of
from megatron_rapo.model.layer_spec import block_spec, uses_transformer_engine
from megatron_rapo.model.rotary import Angles
from megatron_rapo.model.routing_replay import hand_on
from megatron_rapo.parallel.device import device

# float64 is no option of the configuration: it is for certificates.


def transformer_config(
    architecture: Architecture,
    layout: Parallel,
    *,
    dtype: torch.dtype,
    recompute: bool,
    adapter: Adapter | None = None,
) -> TransformerConfig:
    """Megatron's configuration of the transformer and of its pipeline communication."""
    return TransformerConfig(
        **family_of(architecture).transformer(architecture),
        **(_routing(layout, dtype, adapts_experts(architecture, adapter)) if architecture.experts else {}),
        hidden_dropout=0.0,
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline_parallel,
        context_parallel_size=layout.context_parallel,
        sequence_parallel=layout.sequence_parallel,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # Microbatches are padded to one length instead: with two stages under the interleaved schedule,
        # megatron-core 0.16.1 exchanges the shapes of activations and gradients in crossed order.
        variable_seq_lengths=False,
        # Sums, not means, over microbatches and ranks: the loss's own weights already add up to one.
        calculate_per_token_loss=True,
        # On gloo, freeing outputs under the interleaved schedule and batched p2p without overlap both
        # corrupt losses silently (megatron-core 0.16.1).
        deallocate_pipeline_outputs=torch.cuda.is_available(),
        batch_p2p_comm=False,
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=False,  # every parameter is loaded
        recompute_granularity="full" if recompute else None,
        recompute_method="uniform" if recompute else None,
        recompute_num_layers=1 if recompute else None,
    )


def _routing(layout: Parallel, dtype: torch.dtype, adapted: bool) -> dict[str, Any]:
    """How tokens come to their experts, of whom each takes all that choose it. Adapted ones are modules of
    their own, one after the other: no adapter is grouped."""
    return {
        "expert_model_parallel_size": layout.expert_parallel,
        "expert_tensor_parallel_size": layout.expert_tensor_parallel,
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_dtype": "fp64" if dtype is torch.float64 else "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": uses_transformer_engine() and not adapted,
    }


class Body(GPTModel):
    """A GPTModel that ends in final hidden states: its head is applied in the loss, chunk by chunk.

    Attributes:
        embedding_scale: as `Architecture` has it.
    """

    embedding_scale: float | None = None

    def _preprocess(self, input_ids: Tensor, position_ids: Tensor, *given: Any, **options: Any) -> Any:
        # Megatron's rotary embedding counts positions by itself, from 0 in each sequence. Given as many
        # angles as there are rows, it takes one for each: rows of branches have positions that they are told.
        embedded, angles, *rest = super()._preprocess(input_ids, position_ids, *given, **options)
        if isinstance(options.get("packed_seq_params"), Branches):
            angles = angles[:, position_ids[0]]
        if embedded is not None and self.embedding_scale is not None:
            embedded = embedded * torch.tensor(self.embedding_scale, dtype=torch.float32).to(embedded.dtype)
        if self.config.recompute_granularity and embedded is not None and torch.is_grad_enabled():
            # Recomputed layers have gradients where what they are given has one: a frozen embedding has none.
            embedded = embedded if embedded.requires_grad else embedded.detach().requires_grad_()
        return embedded, angles, *rest

    def _postprocess(self, hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        # Last: [tokens, 1, hidden] becomes [1, tokens, hidden], as Megatron returns logits.
        return hidden_states.transpose(0, 1).contiguous() if self.post_process else hidden_states

    @property
    def head_weight(self) -> Tensor:
        """`[padded vocabulary / TP, hidden]`, of the last chunk; under tied embeddings the embedding."""
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight


def build_chunks(
    architecture: Architecture,
    model: Model,
    layout: Parallel,
    vocabulary_rows: int | None = None,
    adapter: Adapter | None = None,
) -> list[Body]:
    """This rank's model chunks (one, or VPP of them), on its device, with uninitialised weights.

    All ranks of the layout must call it together.

    Args:
        architecture: of the model.
        model: type, recomputation and padding.
        layout: of all ranks.
        vocabulary_rows: of embedding and head over all TP ranks; default: the architecture's, padded.
        adapter: what is trained beside the weights, which are frozen then; None: the weights are trained.
    """
    architecture.check_layout(layout)
    config = transformer_config(
        architecture,
        layout,
        dtype=DTYPES[model.dtype],
        recompute=model.recompute == "full",
        adapter=adapter,
    )
    stages = range(layout.virtual_pipeline_parallel) if layout.virtual_pipeline_parallel else [None]
    rows = vocabulary_rows or architecture.padded_vocabulary(
        model.vocabulary_multiple, layout.tensor_parallel
    )
    return [_build_chunk(architecture, config, rows, stage, adapter) for stage in stages]


def _build_chunk(
    architecture: Architecture,
    config: TransformerConfig,
    vocabulary_rows: int,
    vp_stage: int | None,
    adapter: Adapter | None,
) -> Body:
    chunk = Body(
        config=config,
        transformer_layer_spec=block_spec(architecture, config, vp_stage),
        vocab_size=vocabulary_rows,
        max_sequence_length=architecture.max_positions,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=architecture.tied,
        position_embedding_type="rope",
        vp_stage=vp_stage,
    )
    chunk.rotary_pos_emb = Angles(architecture)
    chunk.embedding_scale = architecture.embedding_scale
    _mark_shards(chunk)
    _mark_experts(chunk)
    hand_on(chunk)
    if adapter is not None:
        attach(chunk, architecture, adapter)
    return chunk.to(device())


def _mark_shards(chunk: GPTModel) -> None:
    """Tells Megatron which weights TP cuts, as its initialisation (left out here) would have.

    The global gradient norm counts an unmarked weight on TP rank 0 alone.
    """
    for module in chunk.modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear | VocabParallelEmbedding):
            weight, cut = module.weight, int(isinstance(module, RowParallelLinear))
            if weight is not None and not hasattr(weight, "tensor_model_parallel"):
                set_tensor_model_parallel_attributes(weight, is_parallel=True, dim=cut, stride=1)


def _mark_experts(chunk: GPTModel) -> None:
    """Has experts' gradients summed over the ranks that hold the same experts, at any expert parallelism.

    By itself Megatron does so under expert parallelism alone. Without it experts that TP does not cut would
    lack what the other TP ranks' tokens give (megatron-core 0.16.1), and checkpoints of the optimizer would
    have another form than under it. Each is counted once in the gradient norm: no rank has it twice.
    """
    for module in chunk.modules():
        if isinstance(module, MoELayer):
            for weight in module.experts.parameters():
                weight.allreduce = False
                weight.tensor_model_parallel = True
