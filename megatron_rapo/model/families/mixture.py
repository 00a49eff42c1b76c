"""What families with mixtures of experts have in common: a router and SwiGLU experts in place of each MLP."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_rapo.model.architecture import Architecture, Experts
from megatron_rapo.model.families import dense
from megatron_rapo.model.rules import COLUMNS, GATE_UP, ROWS, WHOLE, Rule


@dataclass(frozen=True)
class Names:
    """What a family's published weights call the parts of a layer's mixture; Qwen's, unless told."""

    router: str = "mlp.gate"
    experts: str = "mlp.experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"

    def of(self, expert: int) -> tuple[str, str, str]:
        """Gate, up and down matrices of one expert."""
        gate, up, down = (
            f"{self.experts}.{expert}.{name}.weight" for name in (self.gate, self.up, self.down)
        )
        return gate, up, down


QWEN = Names()


def refused(config: Any) -> Iterator[str]:
    """What a configuration has that layers as these do not."""
    yield from dense.refused(config, windows=True)
    if getattr(config, "mlp_only_layers", None):
        yield f"mlp_only_layers = {config.mlp_only_layers}"
    if (step := getattr(config, "decoder_sparse_step", 1)) != 1:
        yield f"decoder_sparse_step = {step}"
    if config.num_experts_per_tok == 1 and getattr(config, "norm_topk_prob", True):
        yield "num_experts_per_tok = 1 of probabilities that sum to 1, whose router cannot learn,"


def read(config: Any, architecture: Architecture, feed_forward: int, **experts: Any) -> Architecture:
    """The architecture of a mixture, from the one that its configuration gives a dense model.

    Args:
        config: HF's.
        architecture: as `dense.read` makes it.
        feed_forward: inner channels of an expert.
        experts: fields of `Experts` beyond `chosen`.
    """
    chosen = config.num_experts_per_tok
    return replace(architecture, feed_forward=feed_forward, experts=Experts(chosen=chosen, **experts))


def written(a: Architecture) -> dict[str, Any]:
    """The options of a HF configuration, under every family's names."""
    assert a.experts is not None
    return dense.written(
        a,
        num_experts=a.experts.count,
        num_local_experts=a.experts.count,
        num_experts_per_tok=a.experts.chosen,
        moe_intermediate_size=a.feed_forward,
        norm_topk_prob=a.experts.renormalised,
        shared_expert_intermediate_size=a.experts.shared,
        qkv_bias=a.attention_bias,
    )


def layer(a: Architecture, names: Names = QWEN) -> Iterator[Rule]:
    """The parameters of a layer."""
    assert a.experts is not None
    yield from dense.attention(a)
    # No linear of Transformer Engine's takes in the norm before a router.
    yield from (replace(rule, transformer_engine=None) for rule in dense.norms_of_mlp(a))
    yield Rule("mlp.router.weight", {f"{names.router}.weight": (a.experts.count, a.hidden)}, WHOLE)
    for expert in range(a.experts.count):
        gate, up, down = names.of(expert)
        gated = dict.fromkeys((gate, up), (a.feed_forward, a.hidden))
        inner = f"mlp.experts.{expert}"
        yield Rule(f"{inner}.linear_fc1.weight", gated, ROWS, GATE_UP, expert=expert)
        yield Rule(f"{inner}.linear_fc2.weight", {down: (a.hidden, a.feed_forward)}, COLUMNS, expert=expert)
    if a.experts.shared is not None:
        yield from _shared(a.hidden, a.experts.shared)


def _shared(hidden: int, channels: int) -> Iterator[Rule]:
    hf, megatron = "mlp.shared_expert", "mlp.shared_experts"
    gated = {f"{hf}.{name}_proj.weight": (channels, hidden) for name in ("gate", "up")}
    yield Rule(f"{megatron}.linear_fc1.weight", gated, ROWS, GATE_UP)
    yield Rule(f"{megatron}.linear_fc2.weight", {f"{hf}.down_proj.weight": (hidden, channels)}, COLUMNS)
    yield Rule(f"{megatron}.gate_weight", {f"{hf}_gate.weight": (1, hidden)}, WHOLE)


def transformer(a: Architecture) -> Mapping[str, Any]:
    """The fields of Megatron's `TransformerConfig` that say what a layer computes."""
    assert a.experts is not None
    return {
        **dense.transformer(a),
        "num_moe_experts": a.experts.count,
        "moe_router_topk": a.experts.chosen,
        "moe_ffn_hidden_size": a.feed_forward,
        # A softmax over the chosen ones alone is that over all, divided by the chosen ones' sum.
        "moe_router_pre_softmax": not a.experts.renormalised,
        "moe_shared_expert_intermediate_size": a.experts.shared,
        "moe_shared_expert_gate": a.experts.shared is not None,
    }
