"""Which engines serve which families, and take new weights of them: docs/families.md has what is found."""

from __future__ import annotations

import json

import pytest
import torch

from tests.engines.conftest import Checkpoint, Engine
from tests.engines.servers import EMBEDDED, SGLANG_CPU, VLLM_CPU, running, why_not
from tests.engines.trainer import Broadcasting
from tests.models import make_hf_model

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024}
# Heads that all engines have kernels for; windows that most tokens are beyond.
SHAPE = {"hidden_size": 128, "head_dim": 32, "max_position_embeddings": 4096, "initializer_range": 0.06}
FAMILIES = {
    # As 270M and 1B are: SGLang reads no head of its own, and knows no stretched positions of Gemma 3.
    "gemma3_text": {
        "tied": True,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
            "full_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    },
    "olmo2": {},
    "olmo3": {"rope_parameters": {**YARN, "rope_theta": 5e5}},
    "glm": {},
    "glm4": {},
    "mistral": {"sliding_window": 7},
    "smollm3": {},
    "qwen3": {"rope_parameters": YARN},
}
NOT_SERVED = {
    (SGLANG_CPU, "mistral"): "it computes no windows of Mistral's (refused before a run starts)",
    (SGLANG_CPU, "glm"): "it has no such model",
}
TOLERANCE = 0.1  # of bf16 activations; another checkpoint is apart by more than 2
PROMPTS = [[10, 20, 30], [5], [*range(7, 31)]]


def as_published(path):
    """OLMo 3's YaRN under the names that its files have: newer transformers overlook what 5.12 writes."""
    file = path / "config.json"
    config = json.loads(file.read_text())
    if config["model_type"] == "olmo3":
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        file.write_text(json.dumps({**config, "rope_scaling": rope}))
    return path


def gaps(engine, checkpoint):
    answers = engine.greedy(PROMPTS)
    return [
        checkpoint.gap(prompt, answer.token_ids, answer.log_probs)
        for prompt, answer in zip(PROMPTS, answers, strict=True)
    ]


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", [EMBEDDED, SGLANG_CPU, VLLM_CPU])
def test_an_engine_serves_a_family_and_takes_its_weights(tmp_path, kind, family):
    if reason := why_not(kind) or NOT_SERVED.get((kind, family)):
        pytest.skip(reason)
    options = {**SHAPE, **FAMILIES[family], "family": family, "dtype": torch.bfloat16}
    first, second = (
        Checkpoint(as_published(make_hf_model(tmp_path / str(seed), seed=seed, **options)))
        for seed in range(2)
    )
    with running(kind, first.path, tmp_path / "log") as url:
        engine = Engine(kind, url, tmp_path / "log")
        engine.anew()
        try:
            assert max(gaps(engine, first)) < TOLERANCE
            engine.ask(lambda client: client.begin_update())
            with Broadcasting(engine) as group:
                group.send(second.tensors, 7)
            engine.ask(lambda client: client.end_update(7))
            assert max(gaps(engine, second)) < TOLERANCE
            assert min(gaps(engine, first)) > 1.0
        finally:
            engine.close()
