"""A mixture of experts out of a dense model: sparse upcycling (arXiv 2212.05055)."""

from __future__ import annotations

import torch
from transformers import Qwen2ForCausalLM, Qwen2MoeConfig, Qwen2MoeForCausalLM

CHOSEN = 2  # experts of a token
SHARED_CHANNELS = 32
ROUTER_SPREAD = 0.1  # of its weights: its logits then are about 1, and all experts are chosen


@torch.no_grad()
def upcycle(dense: Qwen2ForCausalLM, experts: int) -> Qwen2MoeForCausalLM:
    """A Qwen2-MoE that computes what the Qwen2 does: each expert is a copy of the layer's MLP.

    The routers are random, and shared experts begin with an output of 0; training makes experts differ.
    """
    sizes = dense.config.to_dict()
    for name in ("model_type", "architectures", "layer_types", "transformers_version", "dtype"):
        sizes.pop(name, None)
    config = Qwen2MoeConfig(
        **sizes,
        num_experts=experts,
        num_experts_per_tok=CHOSEN,
        norm_topk_prob=True,
        moe_intermediate_size=dense.config.intermediate_size,
        shared_expert_intermediate_size=SHARED_CHANNELS,
    )
    mixture = Qwen2MoeForCausalLM(config).to(dense.dtype)
    weights = {name: values for name, values in dense.state_dict().items() if ".mlp." not in name}
    mixture.load_state_dict(weights, strict=False)
    for layer, own in zip(mixture.model.layers, dense.model.layers, strict=True):
        both = torch.cat((own.mlp.gate_proj.weight, own.mlp.up_proj.weight))
        layer.mlp.experts.gate_up_proj.copy_(both.expand_as(layer.mlp.experts.gate_up_proj))
        layer.mlp.experts.down_proj.copy_(own.mlp.down_proj.weight.expand_as(layer.mlp.experts.down_proj))
        layer.mlp.shared_expert.down_proj.weight.zero_()
        layer.mlp.gate.weight.normal_(std=ROUTER_SPREAD)
    mixture.tie_weights()
    return mixture
