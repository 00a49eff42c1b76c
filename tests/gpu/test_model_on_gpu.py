"""One rank on a GPU: the model that the layer spec gives there against HF transformers, in bf16."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_rapo.config import Model, Parallel
from megatron_rapo.data.batching import Sample, pack
from megatron_rapo.data.trees import pack_trees
from megatron_rapo.episode.beginnings import beginnings
from megatron_rapo.episode.sequence import Sequence
from megatron_rapo.launch.local import run_local
from tests.gpu import needs_cuda
from tests.models import load_reference, make_hf_model

LENGTHS, PROMPT = (9, 23, 14), 5


@needs_cuda
@pytest.mark.parametrize("family", ["qwen2", "gemma3_text", "olmo3", "glm4"])
def test_packed_logits_equal_those_of_transformers(tmp_path, family):
    path = make_hf_model(tmp_path / "model", family=family, hidden_size=256, head_dim=64)
    report = tmp_path / "report.json"
    run_local(measure, (path, report), 1)
    # bf16 against fp32: what rounding alone makes of logits of about this size; on a CPU, 0.08.
    apart, shared = json.loads(report.read_text())
    assert apart < 0.15
    assert shared < 0.15, "what sequences begin with, computed once"


def measure(path: Path, report: Path) -> None:
    from megatron_rapo.model.build import build_chunks
    from megatron_rapo.model.hf_config import read_architecture
    from megatron_rapo.parallel.device import device
    from megatron_rapo.parallel.placement import process_groups
    from megatron_rapo.policy.pipeline import run_forward
    from megatron_rapo.weights.load import load_weights

    random = np.random.default_rng(0)
    sequences = [random.integers(2, 61, length).astype(np.int32) for length in LENGTHS]
    for ids in sequences:
        ids[:PROMPT] = sequences[0][:PROMPT]
    shared = beginnings(sequences, sequences[0][:PROMPT].tolist())
    samples = [
        Sample(
            Sequence.of_response(ids[:1], ids[1:], np.zeros(len(ids) - 1, np.float32), 0),
            0.0,
            0.0,
            1.0,
            beginnings=own,
        )
        for ids, own in zip(sequences, shared, strict=True)
    ]
    with process_groups(Parallel(), seed=1):
        architecture = read_architecture(path)
        chunks = build_chunks(architecture, Model(path=path), Parallel())
        load_weights(chunks, architecture, path, tensor_rank=0)
        microbatches = [
            pack(samples, sequence_multiple=1, device=device()),
            pack_trees(samples, multiple=1, device=device()),
        ]
        assert len(microbatches[0].token_ids) - len(microbatches[1].token_ids) == 2 * PROMPT
        found = run_forward(chunks, microbatches, lambda one, hidden: one.at_responses(hidden))
        logits = [(hidden @ chunks[-1].head_weight.T).float().cpu() for hidden in found]
    reference = load_reference(path)
    with torch.no_grad():
        expected = torch.cat(
            [reference(torch.from_numpy(ids).long()[None]).logits[0, :-1] for ids in sequences]
        )
    apart = [each[:, : architecture.vocabulary] - expected for each in logits]
    report.write_text(json.dumps([float(each.abs().max() / expected.std()) for each in apart]))
