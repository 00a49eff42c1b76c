"""What a decoding step of the embedded engine takes beside its arithmetic, and verifications a second."""

from __future__ import annotations

import threading
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_rapo.calibration.timing import fastest
from megatron_rapo.config.verifiers import built_in
from megatron_rapo.embedded_server.decode import Sample
from megatron_rapo.embedded_server.engine import Engine
from megatron_rapo.episode.problem import Problem
from megatron_rapo.planning.profile import EngineRates
from megatron_rapo.reward.verifier import Verifier

_FEW, _MANY = 2, 6  # layers
_BATCH = 64
_SHORT, _LONG = 4, 20  # tokens: the difference leaves prefill and set-up out
_ANSWERS = 64
_RESPONSE = "We compute step by step. " * 40 + "The answer is \\boxed{{{}}}."


def engine_rates(where: torch.device, dtype: str, folder: Path) -> EngineRates:
    """Of models so narrow that arithmetic is nothing beside launches and Python."""
    few, many = (_engine(layers, where, dtype, folder) for layers in (_FEW, _MANY))
    one, deep, wide = _step_s(few, 1), _step_s(many, 1), _step_s(few, _BATCH)
    layer_s = max(0.0, deep - one) / (_MANY - _FEW)
    return EngineRates(
        step_s=max(0.0, one - _FEW * layer_s),
        layer_s=layer_s,
        response_s=max(0.0, wide - one) / (_BATCH - 1),
    )


def verifications_per_s() -> float:
    """Of one process, of ordinary right and wrong answers."""
    items = [(_RESPONSE.format(number), Problem("", "", str(number % 2))) for number in range(_ANSWERS)]
    with Verifier(built_in("math"), workers=1, time_limit_s=30.0) as verifier:
        return _ANSWERS / fastest(lambda: verifier.verify(items))


def _engine(layers: int, where: torch.device, dtype: str, folder: Path) -> Engine:
    path = folder / f"engine-{layers}"
    shape = Qwen2Config(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        eos_token_id=None,
        bos_token_id=None,
    )
    Qwen2ForCausalLM(shape).save_pretrained(path)
    return Engine(path, where.type, dtype)


def _step_s(engine: Engine, batch: int) -> float:
    def seconds(tokens: int) -> float:
        samples = [Sample((1, 2, 3), tokens, 1.0, frozenset(), seed) for seed in range(batch)]
        return fastest(lambda: engine.generate(samples, threading.Event()))

    return max(0.0, seconds(_LONG) - seconds(_SHORT)) / (_LONG - _SHORT)
