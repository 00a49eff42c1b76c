"""What a model is, in the terms that the Megatron model is built from."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_rapo.config import Model, Parallel, Rollout
from megatron_rapo.errors import RapoError
from megatron_rapo.model.features import LLAMAS, Norms, Window
from megatron_rapo.model.rope import Rope


@dataclass(frozen=True)
class Experts:
    """The mixture of experts that each layer has in place of its MLP.

    Attributes:
        count: experts of a layer.
        chosen: by the router for each token.
        renormalised: whether the chosen ones' probabilities sum to 1; else they are those of all experts.
        shared: inner channels of an expert that every token passes, or None.
    """

    count: int
    chosen: int
    renormalised: bool
    shared: int | None = None


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer: RMSNorm, gated MLP, rotary positions, grouped-query attention.

    Attributes:
        family: HF model_type.
        feed_forward: inner channels of a layer's MLP; of each of its experts, if it has some.
        vocabulary: rows of the HF embedding, without Megatron's padding.
        rope: rotary positions; layers with a window may have others.
        attention_bias: biases on query, key and value projections.
        query_key_norm: RMSNorm on queries and keys: on each head's, or on those of all heads together.
        tied: whether the head is the embedding.
        layers_without_rope: counted from 0.
        norms: where a layer has the others.
        window: layers that attend to the last tokens alone.
        activation: of the gate; `gelu_tanh` is GELU's approximation by tanh.
        embedding_scale: that embedded tokens are multiplied by, rounded to the type of the weights.
        attention_scale: that scores are multiplied by; None: 1 / √head_dim.
        experts: None of a dense model.
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int
    norm_epsilon: float
    rope: Rope
    max_positions: int
    attention_bias: bool
    query_key_norm: Literal["head", "heads"] | None
    tied: bool
    layers_without_rope: tuple[int, ...] = ()
    norms: Norms = LLAMAS
    window: Window | None = None
    activation: Literal["silu", "gelu_tanh"] = "silu"
    embedding_scale: float | None = None
    attention_scale: float | None = None
    experts: Experts | None = None

    def padded_vocabulary(self, multiple: int, tensor_parallel: int) -> int:
        """Rows of the sharded embedding and head: a multiple of `multiple` × TP."""
        unit = multiple * tensor_parallel
        return -(-self.vocabulary // unit) * unit

    def check_layout(self, layout: Parallel, whose: str = "the model's") -> None:
        """Raises RapoError where TP, EP or PP × VPP does not divide the model; `whose` calls it."""
        for option, what, count in self._divided(layout):
            if count % getattr(layout, option):
                raise RapoError(
                    f"parallel.{option} = {getattr(layout, option)} does not divide {whose} {count} {what}; "
                    f"choose a divisor of {count}"
                )
        if self.experts is not None and layout.tensor_parallel > 1 and not layout.sequence_parallel:
            raise RapoError(
                f"parallel.tensor_parallel = {layout.tensor_parallel} of a mixture of experts needs "
                "parallel.sequence_parallel = true, by which each rank routes tokens of its own; set it"
            )
        chunks = layout.pipeline_parallel * (layout.virtual_pipeline_parallel or 1)
        if self.layers % chunks:
            raise RapoError(
                f"pipeline_parallel × virtual_pipeline_parallel = {chunks} does not divide {whose} "
                f"{self.layers} layers; choose a divisor of {self.layers}"
            )

    def _divided(self, layout: Parallel) -> Iterator[tuple[str, str, int]]:
        """What each option of the layout cuts into parts: the option, what, and how many there are."""
        yield "tensor_parallel", "attention heads", self.heads
        yield "tensor_parallel", "key-value heads", self.kv_heads
        if self.experts is None:
            yield "tensor_parallel", "feed-forward channels", self.feed_forward
            return
        yield "expert_parallel", "experts", self.experts.count
        yield "expert_tensor_parallel", "feed-forward channels of an expert", self.feed_forward
        if self.experts.shared is not None:
            yield "tensor_parallel", "feed-forward channels of the shared expert", self.experts.shared

    def check_experts(self, layout: Parallel, model: Model, routing_replay: str = "off") -> None:
        """Raises RapoError where options are of experts, and the model, the policy, has none."""
        if self.experts is not None:
            return
        options = {
            "parallel.expert_parallel": layout.expert_parallel - 1,
            "parallel.expert_tensor_parallel": layout.expert_tensor_parallel - 1,
            "model.balance_coefficient": model.balance_coefficient,
            "model.router_z_coefficient": model.router_z_coefficient,
            f'algorithm.routing_replay = "{routing_replay}"': routing_replay != "off",
        }
        for option in (option for option, chosen in options.items() if chosen):
            raise RapoError(f"{option} has no effect: a {self.family} has no experts; remove it")

    def check_lengths(self, rollout: Rollout, whose: str = "the model's") -> None:
        """Raises RapoError where prompt and response can be longer than the model has positions."""
        longest = rollout.max_prompt_tokens + rollout.max_response_tokens
        if longest > self.max_positions:
            room = self.max_positions - rollout.max_prompt_tokens
            remedy = (
                f"lower rollout.max_response_tokens to {room}, or both"
                if room > 0
                else "lower rollout.max_prompt_tokens"
            )
            raise RapoError(
                f"rollout.max_prompt_tokens + rollout.max_response_tokens = {longest} exceeds {whose} "
                f"max_position_embeddings = {self.max_positions}; {remedy}"
            )
