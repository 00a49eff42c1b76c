"""One rank on a GPU: the model that the layer spec gives there against HF transformers, in bf16."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from megatron_rapo.config import Model, Parallel
from megatron_rapo.data.batching import Sample, pack
from megatron_rapo.episode.sequence import Sequence
from megatron_rapo.launch.local import run_local
from tests.gpu import needs_cuda
from tests.models import make_hf_model

LENGTHS = (9, 23, 14)


@needs_cuda
def test_packed_logits_equal_those_of_transformers(tmp_path):
    path = make_hf_model(tmp_path / "model", hidden_size=256, head_dim=64)
    report = tmp_path / "report.json"
    run_local(measure, (path, report), 1)
    # bf16 against fp32: what rounding alone makes of logits of about this size.
    assert json.loads(report.read_text()) < 5e-2


def measure(path: Path, report: Path) -> None:
    from transformers import AutoModelForCausalLM

    from megatron_rapo.model.build import build_chunks
    from megatron_rapo.model.hf_config import read_architecture
    from megatron_rapo.parallel.device import device
    from megatron_rapo.parallel.placement import process_groups
    from megatron_rapo.policy.pipeline import run_forward
    from megatron_rapo.weights.load import load_weights

    random = np.random.default_rng(0)
    sequences = [random.integers(2, 61, length).astype(np.int32) for length in LENGTHS]
    samples = [
        Sample(Sequence.of_response(ids[:1], ids[1:], np.zeros(len(ids) - 1, np.float32), 0), 0.0, 0.0, 1.0)
        for ids in sequences
    ]
    with process_groups(Parallel(), seed=1):
        architecture = read_architecture(path)
        chunks = build_chunks(architecture, Model(path=path), Parallel())
        load_weights(chunks, architecture, path, tensor_rank=0)
        microbatch = pack(samples, sequence_multiple=1, device=device())
        (hidden,) = run_forward(chunks, [microbatch], lambda _, hidden: hidden)
        logits = (hidden @ chunks[-1].head_weight.T).float().cpu()
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    worst, start = 0.0, 0
    for ids in sequences:
        with torch.no_grad():
            expected = reference(torch.from_numpy(ids).long()[None]).logits[0]
        difference = (logits[start : start + len(ids), : architecture.vocabulary] - expected).abs().max()
        worst, start = max(worst, float(difference / expected.std())), start + len(ids)
    report.write_text(json.dumps(worst))
