"""Random HF models for tests: small, quick to make, and with no two parameters alike."""

from __future__ import annotations

import string
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from megatron_rapo.embedded_server.olmo3 import mend

PAD, EOS = 0, 1
# 61 tokens is odd on purpose: no tensor-parallel size divides it, so vocabulary padding is exercised.
SHAPE: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}
OF_FAMILY: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    # Windows shorter than the tests' sequences; GLM's configurations have biases unless told.
    "gemma3_text": {
        "sliding_window": 7,
        "query_pre_attn_scalar": 24,
        "sliding_window_pattern": 3,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4},
        },
    },
    "olmo3": {"sliding_window": 7},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
    },
    "qwen2_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 32,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48},
}


def make_hf_model(
    path: Path,
    *,
    family: str = "qwen2",
    tied: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> Path:
    """Writes a random model (config.json, model.safetensors, tokenizer) into the folder `path`.

    Args:
        family: its `model_type`.
        tied: whether embedding and head share their matrix.
        seed: of every parameter.
        dtype: of the saved parameters.
        overrides: options of the family's HF configuration, beyond `SHAPE` and `OF_FAMILY`.
    """
    options = deepcopy({**SHAPE, **OF_FAMILY.get(family, {}), **overrides})  # which transformers changes
    config = AutoConfig.for_model(family, **options, tie_word_embeddings=tied)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        _randomise_biases_and_norms(model)
    model.to(dtype).save_pretrained(path)
    make_tokenizer(config.vocab_size).save_pretrained(path)
    return Path(path)


def _randomise_biases_and_norms(model: torch.nn.Module) -> None:
    """HF starts biases at 0 and norms at 1, or 0, which would hide that they were dropped or swapped."""
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
        elif "norm" in name:
            torch.nn.init.normal_(parameter, mean=float(parameter[0].detach()), std=0.1)


def load_reference(path: Path) -> torch.nn.Module:
    """transformers' model in fp32; an OLMo 3 with the positions that its paper gives it."""
    return mend(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))


def make_tokenizer(vocab_size: int = SHAPE["vocab_size"]) -> PreTrainedTokenizerFast:
    """One token a character: pad is 0, eos is 1, then digits, signs and letters as far as they fit.

    Byte-level BPE without merges and Qwen's names for the special tokens: for `model_type` qwen2,
    `AutoTokenizer` builds Qwen2's own tokenizer whatever class was saved, and so builds this one.
    """
    characters = string.digits + "+-*/=(). ,:\n" + string.ascii_letters
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    symbols = [byte_level.pre_tokenize_str(character)[0][0] for character in characters]
    tokens = ["<|endoftext|>", "<|im_end|>", *symbols][:vocab_size]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=[]))
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|endoftext|>", eos_token="<|im_end|>"
    )
