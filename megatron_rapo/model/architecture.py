"""What a HF config.json says of a model, in the terms that the Megatron model is built from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rapo.config import Parallel, Rollout
from megatron_rapo.errors import RapoError

FAMILIES = ("qwen2", "qwen3", "llama")

# Llama 3's frequency scaling, as Megatron's rotary embedding hard-codes it; only the factor is free.
LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


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

    def padded_vocabulary(self, multiple: int, tensor_parallel: int) -> int:
        """Rows of the sharded embedding and head: a multiple of `multiple` × TP."""
        unit = multiple * tensor_parallel
        return -(-self.vocabulary // unit) * unit

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer."""
        query, key_value = self.heads * self.head_dim, 2 * self.kv_heads * self.head_dim
        attention = self.hidden * (2 * query + key_value)
        bias = (query + key_value) if self.attention_bias else 0
        norms = 2 * self.hidden + (2 * self.head_dim if self.query_key_norm else 0)
        return attention + bias + norms + 3 * self.hidden * self.feed_forward

    @property
    def parameters(self) -> int:
        """Parameters of the HF model."""
        ends = self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden
        return self.layers * self.layer_parameters + ends

    def check_layout(self, layout: Parallel) -> None:
        """Raises RapoError where TP or PP × VPP does not divide the model."""
        tensor = layout.tensor_parallel
        for what, count in (
            ("attention heads", self.heads),
            ("key-value heads", self.kv_heads),
            ("feed-forward channels", self.feed_forward),
        ):
            if count % tensor:
                raise RapoError(
                    f"parallel.tensor_parallel = {tensor} does not divide the model's {count} {what}; "
                    f"choose a divisor of {count}"
                )
        chunks = layout.pipeline_parallel * (layout.virtual_pipeline_parallel or 1)
        if self.layers % chunks:
            raise RapoError(
                f"pipeline_parallel × virtual_pipeline_parallel = {chunks} does not divide the model's "
                f"{self.layers} layers; choose a divisor of {self.layers}"
            )

    def check_lengths(self, rollout: Rollout) -> None:
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
                f"rollout.max_prompt_tokens + rollout.max_response_tokens = {longest} exceeds the model's "
                f"max_position_embeddings = {self.max_positions}; {remedy}"
            )


def read_architecture(path: Path) -> Architecture:
    """Reads a HF model directory's config.json, or a config.json itself.

    Raises:
        RapoError: it is missing or malformed, of another family, or uses a feature that has no counterpart.
    """
    file = path if path.suffix == ".json" else path / "config.json"
    if not file.is_file():
        raise RapoError(f"model {path} has no config.json; name a HF model directory in model.path")
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(file)
    except Exception as error:  # what a malformed file runs into inside transformers is not foreseeable
        raise RapoError(
            f"model configuration {file} cannot be read ({type(error).__name__}: {error}); copy it again"
        ) from error
    if config.model_type not in FAMILIES:
        raise RapoError(
            f"model {path} is of architecture {config.model_type!r}; supported are {', '.join(FAMILIES)}"
        )
    _refuse_unsupported(config, path)
    try:
        architecture = _architecture(config)
    except (TypeError, ValueError, ArithmeticError) as error:
        raise RapoError(f"model configuration {file} has a wrong value ({error}); copy it again") from error
    _check_sizes(architecture, file)
    return architecture


def _architecture(config: Any) -> Architecture:
    rope = config.rope_parameters
    return Architecture(
        family=config.model_type,
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads or config.num_attention_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        feed_forward=config.intermediate_size,
        vocabulary=config.vocab_size,
        norm_epsilon=config.rms_norm_eps,
        rope_theta=float(rope["rope_theta"]),
        rope_factor=float(rope["factor"]) if rope["rope_type"] == "llama3" else None,
        max_positions=config.max_position_embeddings,
        attention_bias=config.model_type == "qwen2",
        query_key_norm=config.model_type == "qwen3",
        tied=bool(config.tie_word_embeddings),
    )


def _check_sizes(architecture: Architecture, file: Path) -> None:
    sizes = {
        "num_hidden_layers": architecture.layers,
        "hidden_size": architecture.hidden,
        "num_attention_heads": architecture.heads,
        "num_key_value_heads": architecture.kv_heads,
        "head_dim": architecture.head_dim,
        "intermediate_size": architecture.feed_forward,
        "vocab_size": architecture.vocabulary,
        "max_position_embeddings": architecture.max_positions,
    }
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise RapoError(f"model configuration {file} has {name} = {size!r}, no size; copy it again")
    if architecture.heads % architecture.kv_heads:
        raise RapoError(
            f"model configuration {file} has num_attention_heads = {architecture.heads}, no multiple of "
            f"num_key_value_heads = {architecture.kv_heads}; copy it again"
        )


def _refuse_unsupported(config: Any, path: Path) -> None:
    rope = config.rope_parameters or {}
    unsupported = {
        f"hidden_act = {config.hidden_act!r}": config.hidden_act != "silu",
        "use_sliding_window = true": getattr(config, "use_sliding_window", False),
        "attention_bias = true": getattr(config, "attention_bias", False),
        "mlp_bias = true": getattr(config, "mlp_bias", False),
        f"rope_type = {rope.get('rope_type')!r}": rope.get("rope_type") not in ("default", "llama3"),
        f"rope scaling other than {LLAMA3_ROPE}": rope.get("rope_type") == "llama3"
        and any(float(rope[key]) != value for key, value in LLAMA3_ROPE.items()),
        "partial rotary positions": rope.get("partial_rotary_factor", 1.0) != 1.0,
    }
    for feature, present in unsupported.items():
        if present:
            raise RapoError(f"model {path} has {feature} in its config.json, which is not supported")
