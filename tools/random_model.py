"""A random HF model of any size, written a layer at a time: for benchmarks."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch

from megatron_rapo.model.hf_config import read_architecture
from megatron_rapo.weights.hf_directory import save_tensors, write_companions
from megatron_rapo.weights.stored_parameters import stored_parameters


def add_size_options(parser: argparse.ArgumentParser) -> None:
    """The options that `make_random_model` reads; by default a model of 1B parameters."""
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--feed-forward", type=int, default=6144)
    parser.add_argument("--vocabulary", type=int, default=151_936)


def make_random_model(directory: Path, options: argparse.Namespace) -> int:
    """Writes a random Qwen2, or Qwen3-MoE where `options` has experts. Returns its parameters' number.

    bfloat16, tied embeddings, a file a parameter; normal numbers of deviation `options.std`, or 1. Of experts
    `options.feed_forward` is the size of each.
    """
    std = getattr(options, "std", 1.0)
    directory.mkdir()
    config: dict[str, Any] = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "vocab_size": options.vocabulary,
        "hidden_size": options.hidden,
        "intermediate_size": options.feed_forward,
        "num_hidden_layers": options.layers,
        "num_attention_heads": options.hidden // 128,
        "num_key_value_heads": max(1, options.hidden // 1024),
        "max_position_embeddings": 32_768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    if experts := getattr(options, "experts", 0):
        config |= {
            "model_type": "qwen3_moe",
            "architectures": ["Qwen3MoeForCausalLM"],
            "head_dim": 128,
            "moe_intermediate_size": options.feed_forward,
            "num_experts": experts,
            "num_experts_per_tok": options.chosen,
            "norm_topk_prob": True,
        }
    (directory / "config.json").write_text(json.dumps(config))
    architecture = read_architecture(directory)
    weight_map: dict[str, str] = {}
    for parameter in stored_parameters(architecture):
        file = "-".join(map(str, (parameter.key, *parameter.place))) + ".safetensors"
        tensors = {
            name: std * torch.randn(shape, dtype=torch.bfloat16) for name, shape in parameter.rule.hf.items()
        }
        save_tensors(tensors, directory / file)
        weight_map.update(dict.fromkeys(tensors, file))
    write_companions(directory, directory.parent, weight_map)
    return sum(math.prod(parameter.shape) for parameter in stored_parameters(architecture))
