"""The certificate passes for every objective, and reports planted faults."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_rapo.certify.cases import CASES
from megatron_rapo.certify.certificate import DEFAULT, as_json, certify, table
from megatron_rapo.certify.measure import measure
from megatron_rapo.config import RunConfig
from megatron_rapo.methods.named import METHODS
from megatron_rapo.methods.rapo import RAPO
from megatron_rapo.model.architecture import Architecture

FEW = tuple(
    case for case in CASES if case.name in ("TP 2, sequence parallel", "CP 4", "TP 2, PP 2", "PP 2, VPP 2")
)
QWEN3 = replace(DEFAULT, family="qwen3", attention_bias=False, query_key_norm=True, tied=True)
SMOLLM3 = replace(DEFAULT, family="smollm3", attention_bias=False, layers_without_rope=(3,))
TENSOR = tuple(case for case in CASES if case.name in ("DP 4", "TP 2"))


def test_rapo_is_certified_at_every_layout() -> None:
    results = certify(RAPO.Options())
    assert len(results) == 2 * len(CASES)
    assert all(result.passed for result in results), table(results)
    assert '"passed": true' in as_json(results)


@pytest.mark.parametrize(
    ("options", "architecture"),
    [
        ({"method": "gspo", "clip_low": 0.2, "clip_high": 0.2}, QWEN3),
        ({"method": "grpo", "divergence": "reverse_exact", "clip_dual": 1.5}, QWEN3),
        ({"method": "rapo", "divergence": "forward_sampled", "audit_estimators": True}, SMOLLM3),
        ({"method": "grpo", "divergence": "k2", "loss_aggregation": "constant"}, SMOLLM3),
    ],
    ids=lambda given: given.family if isinstance(given, Architecture) else "-".join(map(str, given.values())),
)
def test_other_objectives_and_families_are_certified(
    options: dict[str, Any], architecture: Architecture
) -> None:
    method = METHODS[options["method"]].Options(**options)
    results = certify(method, architecture, partial(measure, cases=FEW))
    assert all(result.passed for result in results), table(results)


def test_a_plain_collective_is_reported() -> None:
    """Without its own backward, hidden states' gradients lack the other ranks' vocabulary."""
    failed = {r.case for r in certify(RAPO.Options(), DEFAULT, plain_collective) if not r.passed}
    assert failed == {"TP 2"}


def test_a_normaliser_without_one_ranks_tokens_is_reported() -> None:
    failed = {r.case for r in certify(RAPO.Options(), DEFAULT, short_normaliser) if not r.passed}
    assert failed == {"DP 4", "TP 2"}


def plain_collective(config: RunConfig, report: Path) -> None:
    """Hands hidden states on as they are, as a plain all-reduce under autograd would."""
    from megatron_rapo.policy import gradients

    gradients.shared_tokens = lambda hidden, placement: hidden
    measure(config, report, TENSOR)


def short_normaliser(config: RunConfig, report: Path) -> None:
    """On the last rank, the last response's tokens are not counted."""
    whole = RAPO.aggregate

    def short(method: RAPO, response_tokens: list[int]) -> np.ndarray:
        weights = whole(method, response_tokens)
        if torch.distributed.get_rank() == 3:
            weights *= sum(response_tokens) / sum(response_tokens[:-1])
        return weights

    RAPO.aggregate = short
    measure(config, report, TENSOR)
