"""What a model is, in the terms that the Megatron model is built from."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rapo.config import Parallel, Rollout
from megatron_rapo.errors import RapoError


@dataclass(frozen=True)
class Architecture:
    """A dense decoder-only transformer: RMSNorm, SwiGLU, rotary positions, grouped-query attention.

    Attributes:
        family: HF model_type.
        vocabulary: rows of the HF embedding, without Megatron's padding.
        rope_factor: Llama 3 frequency scaling, or None for plain rotary positions.
        attention_bias: biases on query, key and value projections.
        query_key_norm: RMSNorm on each head's queries and keys (Qwen3).
        tied: whether the head is the embedding.
        layers_without_rope: counted from 0 (SmolLM3).
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
    rope_theta: float
    rope_factor: float | None
    max_positions: int
    attention_bias: bool
    query_key_norm: bool
    tied: bool
    layers_without_rope: tuple[int, ...] = ()

    def padded_vocabulary(self, multiple: int, tensor_parallel: int) -> int:
        """Rows of the sharded embedding and head: a multiple of `multiple` × TP."""
        unit = multiple * tensor_parallel
        return -(-self.vocabulary // unit) * unit

    def check_layout(self, layout: Parallel, whose: str = "the model's") -> None:
        """Raises RapoError where TP or PP × VPP does not divide the model; `whose` calls it."""
        tensor = layout.tensor_parallel
        for what, count in (
            ("attention heads", self.heads),
            ("key-value heads", self.kv_heads),
            ("feed-forward channels", self.feed_forward),
        ):
            if count % tensor:
                raise RapoError(
                    f"parallel.tensor_parallel = {tensor} does not divide {whose} {count} {what}; "
                    f"choose a divisor of {count}"
                )
        chunks = layout.pipeline_parallel * (layout.virtual_pipeline_parallel or 1)
        if self.layers % chunks:
            raise RapoError(
                f"pipeline_parallel × virtual_pipeline_parallel = {chunks} does not divide {whose} "
                f"{self.layers} layers; choose a divisor of {self.layers}"
            )

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
